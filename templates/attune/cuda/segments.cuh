// Which keys the rows of a tile are, on a GPU: for_each_segment() of backward.h, by a warp.
#pragma once

#include "attune/backward.h"
#include "attune/cuda/ptx.cuh"
#include "attune/hd.h"
#include "attune/params.h"
#include "attune/spec.h"

namespace attune::kernel {

/// Bit l of the result, the same in all lanes: do the rows [begin, end) hold a key of place first + l?
template <KernelSpec S>
ATTUNE_DEVICE u32 places_with_keys(const ForwardParams& p, i32 begin, i32 end, i64 first) {
  const i64 place = first + threadIdx.x % 32;
  bool holds = false;
  if (place < places<S>(p)) {
    const KeySegment segment = segment_at<S>(p, 0, begin, end, place);
    holds = segment.begin < segment.end;
  }
  return __ballot_sync(0xffffffffu, holds);
}

/// Calls visit(segment) for every segment of the rows [begin, end) that holds a key, in the order of
/// for_each_segment(). Each warp looks for itself, 64 places at a time, whose loads are in flight together.
/// All warps of a block find the same, so visit() may wait for the whole block.
template <KernelSpec S, typename Visit>
ATTUNE_DEVICE void for_each_segment_of_block(const ForwardParams& p, i32 batch, i32 begin, i32 end,
                                             Visit&& visit) {
  if constexpr (S.blocks == Blocks::dense) {
    visit(segment_at<S>(p, batch, begin, end, 0));
  } else {
    const i64 count = places<S>(p);
#pragma unroll 1
    for (i64 first = 0; first < count; first += 64) {
      u64 found = places_with_keys<S>(p, begin, end, first) |
                  u64{places_with_keys<S>(p, begin, end, first + 32)} << 32;
#pragma unroll 1
      while (found != 0) {
        visit(segment_at<S>(p, batch, begin, end, first + __ffsll(static_cast<i64>(found)) - 1));
        found &= found - 1;
      }
    }
  }
}

}  // namespace attune::kernel
