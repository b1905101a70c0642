// Products of tiles on mma.m16n8k16: of rows with rows (Q K^T), and of what a warp holds in fragments with
// the columns of a tile (P^T dO). Tiles are swizzled (tile.cuh); a lane carries the address of its part of
// the tile's first matrices, and everything else is an offset from there. (Forward issues its own: it may
// keep the fragments of its queries.)
#pragma once

#include "attune/cuda/ptx.cuh"
#include "attune/cuda/tile.cuh"
#include "attune/hd.h"
#include "attune/spec.h"

namespace attune::kernel {

/// Computed anew where it is asked for: addresses that follow from it would occupy registers through loops.
ATTUNE_DEVICE i32 lane_of_warp() {
  return static_cast<i32>(ptx::opaque(threadIdx.x) % kWarpSize);
}

/// The row (the other is 8 below) and the first of the two columns that a lane holds of a 16x8 accumulator.
ATTUNE_DEVICE i32 accumulator_row() {
  return lane_of_warp() / 4;
}
ATTUNE_DEVICE i32 accumulator_column() {
  return lane_of_warp() % 4 * 2;
}

/// Tile of rows of so many elements of 16 bits.
template <i32 Columns>
using RowTile = SwizzledTile<round_up(Columns, 16) / kChunkElements>;

/// The lane's address for 16x16 elements, from `row` and `chunk` on, in the order of an A fragment: ldmatrix
/// gives the A fragment of the rows, ldmatrix.trans the B fragments of two n8 tiles of columns.
template <typename Tile>
ATTUNE_DEVICE u32 rows_first(u32 tile, i32 row, i32 chunk) {
  const i32 lane = lane_of_warp();
  return tile + Tile::offset(row + lane % 16, chunk + lane / 16);
}

/// The same with the second and third matrix exchanged: ldmatrix gives the B fragments of two n8 tiles of
/// rows, ldmatrix.trans the A fragment of the columns.
template <typename Tile>
ATTUNE_DEVICE u32 chunks_first(u32 tile, i32 row, i32 chunk) {
  const i32 lane = lane_of_warp();
  return tile + Tile::offset(row + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2);
}

template <i32 M, i32 N>
ATTUNE_DEVICE void clear(float (&d)[M][N][4]) {
#pragma unroll
  for (i32 m = 0; m < M; ++m) {
#pragma unroll
    for (i32 n = 0; n < N; ++n) {
#pragma unroll
      for (i32 e = 0; e < 4; ++e) d[m][n][e] = 0.0f;
    }
  }
}

template <i32 M, i32 N>
ATTUNE_DEVICE void scale(float (&d)[M][N][4], float factor) {
#pragma unroll
  for (i32 m = 0; m < M; ++m) {
#pragma unroll
    for (i32 n = 0; n < N; ++n) {
#pragma unroll
      for (i32 e = 0; e < 4; ++e) d[m][n][e] *= factor;
    }
  }
}

/// d += A B^T over `Steps` k16 steps: A is 16 * M rows of one tile at rows_first() `a`, B 8 * N rows of
/// another at chunks_first() `b`.
template <DType T, typename Tile, i32 Steps, i32 M, i32 N>
ATTUNE_DEVICE void multiply_rows(float (&d)[M][N][4], u32 a, u32 b) {
  static_assert(N % 2 == 0);
#pragma unroll
  for (i32 step = 0; step < Steps; ++step) {
    u32 left[M][4];
#pragma unroll
    for (i32 m = 0; m < M; ++m) ptx::ldmatrix_x4(left[m], Tile::moved(a, m * 16, step * 2));
#pragma unroll
    for (i32 pair = 0; pair < N / 2; ++pair) {
      u32 right[4];
      ptx::ldmatrix_x4(right, Tile::moved(b, pair * 16, step * 2));
#pragma unroll
      for (i32 m = 0; m < M; ++m) {
        ptx::mma_m16n8k16<T>(d[m][pair * 2], left[m], right[0], right[1]);
        ptx::mma_m16n8k16<T>(d[m][pair * 2 + 1], left[m], right[2], right[3]);
      }
    }
  }
}

/// How `Groups` warps, a power of two, share `Columns` columns: in turns, 16 columns at a time. So a constant
/// leads from one pair of n8 tiles to the next, whatever the group.
template <i32 Columns, i32 Groups>
struct ColumnShare {
  static_assert(bit_ceil(Groups) == Groups);
  static constexpr i32 kAll = ceil_div(Columns, 16);
  static constexpr i32 kPairs = ceil_div(kAll, Groups);

  static ATTUNE_DEVICE i32 first_chunk(i32 group) { return group * 2; }
  static ATTUNE_DEVICE i32 column(i32 group, i32 pair) { return (pair * Groups + group) * 16; }
  /// Has the group a pair of this number? The last one may be missing.
  static ATTUNE_DEVICE bool has(i32 group, i32 pair) {
    return (pair + 1) * Groups <= kAll || pair * Groups + group < kAll;
  }
};

/// d += A B for one k16 step: `a` are A's fragments, B is 16 rows of a tile, of whose columns the group takes
/// its share; rows_first() of the first of them is `b` moved down by `row`.
template <DType T, typename Tile, typename Share, i32 M, i32 N>
ATTUNE_DEVICE void multiply_columns(float (&d)[M][N][4], const u32 (&a)[M][4], u32 b, i32 row, i32 group) {
  static_assert(N == Share::kPairs * 2);
#pragma unroll
  for (i32 pair = 0; pair < Share::kPairs; ++pair) {
    if (!Share::has(group, pair)) continue;
    u32 right[4];
    ptx::ldmatrix_x4_trans(right, Tile::moved(b, row, Share::column(0, pair) / kChunkElements));
#pragma unroll
    for (i32 m = 0; m < M; ++m) {
      ptx::mma_m16n8k16<T>(d[m][pair * 2], a[m], right[0], right[1]);
      ptx::mma_m16n8k16<T>(d[m][pair * 2 + 1], a[m], right[2], right[3]);
    }
  }
}

/// The A fragments of 16 columns of an accumulator, rounded to 16 bits.
template <DType T, i32 M, i32 N>
ATTUNE_DEVICE void pack_fragments(u32 (&a)[M][4], const float (&d)[M][N][4], i32 step) {
#pragma unroll
  for (i32 m = 0; m < M; ++m) {
#pragma unroll
    for (i32 r = 0; r < 4; ++r) {
      const float(&pairs)[4] = d[m][step * 2 + r / 2];
      a[m][r] = pack<T>(pairs[r % 2 * 2], pairs[r % 2 * 2 + 1]);
    }
  }
}

/// Writes 16 columns of rows, held in A fragments, to a tile; `row` and `chunk` (even) are the first.
template <typename Tile, i32 M>
ATTUNE_DEVICE void store_fragments(u32 tile, i32 row, i32 chunk, const u32 (&a)[M][4]) {
  const u32 origin =
      tile + Tile::offset(row + accumulator_row(), chunk) + static_cast<u32>(accumulator_column()) * 2;
#pragma unroll
  for (i32 m = 0; m < M; ++m) {
#pragma unroll
    for (i32 r = 0; r < 4; ++r) {
      const u32 at = Tile::moved(origin, m * 16 + r % 2 * 8, 0);
      ptx::st_shared_b32(r < 2 ? at : at ^ kChunkBytes, a[m][r]);
    }
  }
}

/// Rounds a warp's rows of sums and writes them to global memory, the group's share of the columns. They
/// leave through the warp's rows of a tile that nobody reads any longer, so that stores are as wide as the
/// alignment allows. `rows` is where the tile's first row lies, `valid_rows` how many there are.
template <DType T, typename Tile, typename Share, i32 HeadDim, i32 CopyBytes, i32 M, i32 N>
ATTUNE_DEVICE void store_rows(const float (&sums)[M][N][4], u32 tile, i32 warp_row, i32 group, u16* rows,
                              i64 stride, i32 valid_rows) {
#pragma unroll
  for (i32 pair = 0; pair < Share::kPairs; ++pair) {
    if (!Share::has(group, pair)) continue;
    u32 packed[M][4];
    pack_fragments<T>(packed, sums, pair);
    store_fragments<Tile>(tile, warp_row, Share::column(group, pair) / kChunkElements, packed);
  }
  __syncwarp();
  constexpr i32 kChunks = Share::kPairs * 2;  // of a row
#pragma unroll 2
  for (i32 index = lane_of_warp(); index < M * 16 * kChunks; index += kWarpSize) {
    const i32 row = warp_row + index / kChunks;
    const i32 column = Share::column(group, index % kChunks / 2) + index % 2 * kChunkElements;
    if (row >= valid_rows || column >= HeadDim) continue;
    store_chunk<CopyBytes>(rows + row * stride + column,
                           ptx::ld_shared_v4(tile + Tile::offset(row, column / kChunkElements)),
                           (HeadDim - column) * 2);
  }
}

}  // namespace attune::kernel
