// The query's gradient from the float32 sums that grad_key_value has added up (QueryGradient): scaled and
// rounded. A row belongs to kLanes neighbouring threads.
#pragma once

#include "attune/backward.h"
#include "attune/blocks.h"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/vector.cuh"
#include "attune/params.h"
#include "attune/spec.h"

namespace attune::kernel {

/// Four neighbours of a fragment's row: two of one lane's and two of the next's.
ATTUNE_DEVICE float4 load_fragment4(const float* fragment, i32 row, i32 column) {
  const float* pair = fragment + (row % 8 * 4 + column / 2) * 4 + row / 8 * 2;
  const float2 left = *reinterpret_cast<const float2*>(pair);
  const float2 right = *reinterpret_cast<const float2*>(pair + 4);
  return {left.x, left.y, right.x, right.y};
}

/// Four sums of a query.
template <KernelSpec S>
ATTUNE_DEVICE float4 load_sums4(const BackwardParams& p, const Slot& slot, i32 query, i32 column) {
  if (p.sum_fragments == 0) {
    const float* row = p.query_sums + sum_row(p, slot, query) * S.head_dim;
    return load4<DType::f32, packed_alignment(S.head_dim * 4)>(reinterpret_cast<const u8*>(row + column),
                                                               S.head_dim - column);
  }
  if (column >= S.head_dim) return {};
  const i32 row = query % kFragmentRows;
  const float* fragments = p.query_sums + sum_row(p, slot, query - row) * S.head_dim;
  return load_fragment4(fragments + column / kFragmentColumns * kFragmentElements, row,
                        column % kFragmentColumns);
}

template <KernelSpec S>
ATTUNE_DEVICE void round_query(const BackwardParams& p) {
  constexpr i32 kLanes = S.warps * 32 / S.block_m;
  constexpr i32 kBytes = size_of(S.dtype);
  static_assert(S.family == Family::rows && S.block_v == S.head_dim);

  static_assert(begins_early(S));

  ptx::griddepcontrol_wait();
  const Slot slot = slot_of<S>(p.forward, blockIdx.x);
  const i32 query = slot.begin + static_cast<i32>(threadIdx.x / kLanes);
  if (query >= slot.end) return;
  const Strides& strides = p.grad_query_strides;
  u8* row = static_cast<u8*>(p.grad_query) +
            (head_offset(slot, strides) + (slot.block.q_begin + query) * strides.seq) * kBytes;
  // One that sees no key has a gradient of 0, whatever that of its output holds.
  const bool blind = p.lse2[lse_offset(p.forward, slot, query)] == -neg_inf();
#pragma unroll
  for (i32 first = 0; first < S.head_dim; first += kLanes * 4) {
    const i32 column = first + static_cast<i32>(threadIdx.x % kLanes) * 4;
    const float4 sum = blind ? float4{0, 0, 0, 0} : load_sums4<S>(p, slot, query, column);
    store4<S.dtype, S.copy_bytes>(row + column * kBytes, scale4(sum, p.forward.scale), S.head_dim - column);
  }
}

}  // namespace attune::kernel
