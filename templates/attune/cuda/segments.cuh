// Which keys the rows of a tile are: for_each_segment() of backward.h on a GPU, where a warp looks at 32
// places at a time.
#pragma once

#include "attune/backward.h"
#include "attune/cuda/ptx.cuh"
#include "attune/hd.h"
#include "attune/params.h"
#include "attune/spec.h"

namespace attune::kernel {

/// Number of a place. Every entry of a table of pages is one, so 32 bits may not be enough; for sm90 the host
/// has checked that they are.
template <bool Many>
struct PlaceNumber {
  using Type = i32;
};
template <>
struct PlaceNumber<true> {
  using Type = i64;
};
template <KernelSpec S>
using Place = typename PlaceNumber<S.keys == Keys::paged && S.family != Family::sm90>::Type;

/// The first place from `from` on of which the rows [begin, end) hold a key, the same in all lanes; places()
/// when there is none.
template <KernelSpec S>
ATTUNE_DEVICE Place<S> next_place(const ForwardParams& p, i32 begin, i32 end, Place<S> from) {
  const auto count = static_cast<Place<S>>(places<S>(p));
#pragma unroll 1
  for (; from < count; from += 32) {
    const Place<S> place = from + static_cast<Place<S>>(threadIdx.x % 32);
    bool holds = false;
    if (place < count) {
      const KeySegment segment = segment_at<S>(p, 0, begin, end, place);
      holds = segment.begin < segment.end;
    }
    const u32 found = __ballot_sync(0xffffffffu, holds);
    if (found != 0) return from + __ffs(static_cast<i32>(found)) - 1;
  }
  return count;
}

/// Calls visit(segment) for every segment of the rows [begin, end) that holds a key, in the order of
/// for_each_segment(). Each warp looks for itself, and all warps of a block find the same, so visit() may
/// wait for the whole block. A place is all that is kept meanwhile: visit() may need every register.
template <KernelSpec S, typename Visit>
ATTUNE_DEVICE void for_each_segment_of_block(const ForwardParams& p, i32 batch, i32 begin, i32 end,
                                             Visit&& visit) {
  if constexpr (S.blocks == Blocks::dense) {
    visit(segment_at<S>(p, batch, begin, end, 0));
  } else {
    auto place = next_place<S>(p, begin, end, 0);
#pragma unroll 1
    while (place < places<S>(p)) {
      visit(segment_at<S>(p, batch, begin, end, place));
      place = next_place<S>(p, begin, end, place + 1);
    }
  }
}

}  // namespace attune::kernel
