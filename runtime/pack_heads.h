// Grouped heads with one query each, as in decoding: their queries fill one tile, so that the keys are read
// once.
#pragma once

#include "attune/params.h"
#include "attune/spec.h"

#include <optional>

namespace attune::runtime {

/// The same launch with the heads of a group as queries of one head: the same memory, the same visible keys,
/// results in the same places. None where that is not so: there are more queries, keys of their own, a bias
/// tensor or dropout, which know heads from queries, or sequences.
std::optional<kernel::ForwardParams> packed_heads(const kernel::KernelSpec& spec,
                                                  const kernel::ForwardParams& params);

}  // namespace attune::runtime
