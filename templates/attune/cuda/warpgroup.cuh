// Warpgroups: who a thread of one is, and the products of 64 rows (wgmma) that one issues on tiles of panels
// (panels.cuh).
#pragma once

#include "attune/cuda/panels.cuh"
#include "attune/cuda/ptx_wgmma.cuh"
#include "attune/hd.h"
#include "attune/spec.h"

namespace attune::kernel {

/// Base of what a thread of a warpgroup runs: where it stands.
class WarpgroupThread {
 protected:
  static ATTUNE_DEVICE u32 thread() { return threadIdx.x % kWarpgroup; }
  static ATTUNE_DEVICE u32 lane() { return threadIdx.x % 32; }
  /// Does it do what one thread does for all?
  static ATTUNE_DEVICE bool elected() { return thread() == 0; }
};

/// d = A B^T over `Steps` k16 steps, asynchronous: A is 64 rows of a tile of `RowsA`, from the address `a`
/// on, B the tile at `b`, of as many rows as d has columns.
template <DType T, i32 RowsA, i32 Steps, i32 N>
ATTUNE_DEVICE void multiply_rows(float (&d)[N], u32 a, u32 b) {
  const u64 row = ptx::wgmma_descriptor(a);
  const u64 column = ptx::wgmma_descriptor(b);
  ptx::pin(d);
  ptx::wgmma_fence();
#pragma unroll
  for (i32 k = 0; k < Steps; ++k) {
    const u64 row_k = row + static_cast<u64>(k / 4 * (kPanelBytes<RowsA> >> 4) + k % 4 * 2);
    const u64 column_k = column + static_cast<u64>(k / 4 * (kPanelBytes<2 * N> >> 4) + k % 4 * 2);
    ptx::Wgmma<2 * N>::template multiply<T>(d, row_k, column_k, k > 0);
  }
  ptx::wgmma_commit_group();
}

/// d += A B, asynchronous: A in registers, B the tile at `b`, of as many rows as A has columns.
template <DType T, i32 Steps, i32 N>
ATTUNE_DEVICE void multiply_columns(float (&d)[N], const u32 (&a)[Steps][4], u32 b) {
  const u64 columns = ptx::wgmma_descriptor(b, kPanelBytes<16 * Steps>);
  ptx::pin(d);
  ptx::wgmma_fence();
#pragma unroll
  for (i32 k = 0; k < Steps; ++k) {
    ptx::Wgmma<2 * N>::template multiply<T, ptx::Major::mn>(
        d, a[k], columns + static_cast<u64>(k * (kPanelBytes<16> >> 4)), true);
  }
  ptx::wgmma_commit_group();
}

}  // namespace attune::kernel
