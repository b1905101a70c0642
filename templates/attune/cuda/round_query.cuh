// The query's gradient from the float32 sums that grad_key_value has added up (QueryGradient::atomic): scaled
// and rounded. A row belongs to kLanes neighbouring threads.
#pragma once

#include "attune/backward.h"
#include "attune/blocks.h"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/vector.cuh"
#include "attune/params.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
ATTUNE_DEVICE void round_query(const BackwardParams& p) {
  constexpr i32 kLanes = S.warps * 32 / S.block_m;
  constexpr i32 kBytes = size_of(S.dtype);
  static_assert(S.family == Family::rows && S.block_v == S.head_dim);

  const Slot slot = slot_of<S>(p.forward, blockIdx.x);
  const i32 query = slot.begin + static_cast<i32>(threadIdx.x / kLanes);
  if (query >= slot.end) return;
  const Strides& strides = p.grad_query_strides;
  const u8* sums =
      reinterpret_cast<const u8*>(p.query_sums + lse_offset(p.forward, slot, query) * S.head_dim);
  u8* row = static_cast<u8*>(p.grad_query) +
            (head_offset(slot, strides) + (slot.block.q_begin + query) * strides.seq) * kBytes;
#pragma unroll
  for (i32 first = 0; first < S.head_dim; first += kLanes * 4) {
    const i32 column = first + static_cast<i32>(threadIdx.x % kLanes) * 4;
    const float4 sum =
        load4<DType::f32, packed_alignment(S.head_dim * 4)>(sums + column * 4, S.head_dim - column);
    store4<S.dtype, S.copy_bytes>(row + column * kBytes, scale4(sum, p.forward.scale), S.head_dim - column);
  }
}

}  // namespace attune::kernel
