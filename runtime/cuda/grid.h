// How many blocks a launch has.
#pragma once

#include "base/result.h"

#include <fmt/format.h>

namespace attune::runtime {

inline constexpr long long kMaxBlocks = 2147483647;  // on the grid's x axis, of every GPU

/// One block for each slot of the work, of block_m rows. Fails with unsupported beyond what a launch can
/// have.
inline Result<unsigned> blocks_of(long long slots, int block_m) {
  if (slots <= kMaxBlocks) return static_cast<unsigned>(slots);
  return unsupported(
      fmt::format("this call needs {} thread blocks of {} rows, CUDA launches {} at once: split the batch",
                  slots, block_m, kMaxBlocks));
}

}  // namespace attune::runtime
