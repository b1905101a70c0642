// How warpgroups of wide head dims leave scores of 64 keys, and columns of their gradients, in tiles of
// panels.
#pragma once

#include "attune/cuda/grad_key_value_sm90_tiles.cuh"
#include "attune/cuda/panels.cuh"
#include "attune/cuda/ptx_sm90.cuh"
#include "attune/cuda/vector.cuh"

namespace attune::kernel {

/// Of the k-th 16 queries' 8x8 matrices, which are transposed on their way: this lane's row.
template <KernelSpec S>
ATTUNE_DEVICE u32 score_row(u32 tile, i32 k) {
  const u32 lane = threadIdx.x % 32;
  const u32 row = lane / 16 * 8 + lane % 8;
  const i32 chunk = static_cast<i32>(threadIdx.x % kWarpgroup / 32 * 2 + lane / 8 % 2);
  return tile + panel_offset<S.block_m>(row, chunk) + k * kPanelBytes<16>;
}

/// To shared memory, with queries as rows.
template <KernelSpec S>
ATTUNE_DEVICE void store_scores(u32 tile, i32 k, const u32 (&d)[4]) {
  ptx::stmatrix_x4_trans(score_row<S>(tile, k), d[0], d[1], d[2], d[3]);
}

template <DType T>
ATTUNE_DEVICE float2 widen_pair(u32 pair) {
  return {widen(T, static_cast<u16>(pair)), widen(T, static_cast<u16>(pair >> 16))};
}

/// A gradient's columns from `first` on, to a tile of keys.
template <KernelSpec S, i32 N>
ATTUNE_DEVICE void write_columns(u32 tile, const float (&gradient)[N], i32 first) {
  const u32 lane = threadIdx.x % 32;
  const u32 row = threadIdx.x % kWarpgroup / 32 * 16 + lane % 16;
#pragma unroll
  for (i32 k = 0; k < N / 8; ++k) {
    const float* g = gradient + k * 8;
    const i32 chunk = first / 8 + k * 2 + static_cast<i32>(lane / 16);
    ptx::stmatrix_x4(tile + panel_offset<S.block_n>(row, chunk), pack<S.dtype>(g[0], g[1]),
                     pack<S.dtype>(g[2], g[3]), pack<S.dtype>(g[4], g[5]), pack<S.dtype>(g[6], g[7]));
  }
}

/// So many of them, as far as the gradient has them, from there to memory; by a warpgroup.
template <KernelSpec S, i32 First, i32 Columns>
ATTUNE_DEVICE void store_columns(const BackwardParams& p, const Sm90Work& work, u32 tile, void* gradient,
                                 const Strides& strides, i32 head_dim) {
  constexpr i32 kChunks = max(Columns / 8, 1);
  // Places of several chunks at once, of which a division is part, spill; and some kernels are long enough.
  constexpr bool kNoDivision = S.head_dim % 64 == 0 && S.head_dim_v % 64 == 0;
  constexpr i32 kAtOnce = kNoDivision && !is_laden(S) && !has_turns_of_pages(S) ? 2 : 1;
  if (gradient == nullptr || Columns == 0) return;
  const i32 heads = p.key_heads;
  u16* rows = static_cast<u16*>(gradient) + work.batch * strides.batch + work.head / heads * strides.group +
              work.head % heads * strides.head + work.begin * strides.seq;
  const i32 count = min(p.forward.len_k - work.begin, S.block_n) * kChunks;
#pragma unroll kAtOnce
  for (i32 i = static_cast<i32>(threadIdx.x % kWarpgroup); i < count; i += kWarpgroup) {
    const i32 row = i / kChunks;
    const i32 chunk = First / 8 + i % kChunks;
    if (chunk * 8 >= head_dim) continue;
    const ptx::Word4 w = ptx::ld_shared_word4(tile + panel_offset<S.block_n>(static_cast<u32>(row), chunk));
    *reinterpret_cast<int4*>(rows + row * strides.seq + chunk * 8) = make_int4(w.x, w.y, w.z, w.w);
  }
}

}  // namespace attune::kernel
