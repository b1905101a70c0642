// Grouped heads with one query each, as in decoding: their queries fill one tile, so that the keys are read
// once.
#pragma once

#include "attune/params.h"
#include "attune/spec.h"

#include <optional>

namespace attune::runtime {

/// Do the heads of a group, whose keys are the same, have one query each? Not where something knows heads
/// from queries, such as a bias tensor or dropout. Traits are a KernelSpec or a Problem.
template <typename Traits>
bool packs_heads(const Traits& traits, const kernel::ForwardParams& p) {
  return p.len_q == 1 && p.heads > 1 && p.key_strides.head == 0 && p.value_strides.head == 0 &&
         traits.blocks == kernel::Blocks::dense && traits.bias == kernel::Bias::none &&
         traits.dropout == kernel::Dropout::off;
}

/// The same launch with the heads of a group as queries of one head: the same memory, the same visible keys,
/// results in the same places. None where that is not so.
std::optional<kernel::ForwardParams> packed_heads(const kernel::KernelSpec& spec,
                                                  const kernel::ForwardParams& params);

}  // namespace attune::runtime
