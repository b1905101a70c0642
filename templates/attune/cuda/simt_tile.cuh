// Register tiles on ordinary float units: what every simt kernel computes with.
//
// The threads of a block are groups of kLanes lanes, each group part of one warp. Of a tile of scores a
// thread holds kTileRows rows (group + r * kGroups) by kTileColumns columns (lane + c * kLanes); of sums over
// such a tile's columns the same rows, by vectors of 4 columns of the result (lane + c * kLanes).
//
//            lane 0 1 2 3 | 0 1 2 3          kLanes = 4, kTileColumns = 2: a row of 8 scores
//   group 0       . x . . | . x . .          x: the scores of thread (0, 1), whose other rows lie kGroups
//   group 1       . . . . | . . . .             further down
//
// Operands are read from shared memory as vectors of 4 along the summed axis: (kTileRows + kTileColumns)
// loads feed 4 * kTileRows * kTileColumns multiplications. Row pitches are odd numbers of vectors (shared.h):
// no bank conflicts. 16-bit inputs are widened on their way into shared memory; all arithmetic is float32.
#pragma once

#include "attune/cuda/ptx.cuh"
#include "attune/cuda/shared.h"
#include "attune/cuda/vector.cuh"
#include "attune/hd.h"
#include "attune/spec.h"

namespace attune::kernel {

/// Are the rows of a kernel's tiles of scores keys? They are what its results have rows of.
constexpr bool rows_are_keys(const KernelSpec& spec) {
  return spec.operation == Operation::grad_key_value;
}

template <KernelSpec S>
struct SimtTile {
  static constexpr bool kRowsAreKeys = rows_are_keys(S);
  static constexpr i32 kRows = kRowsAreKeys ? S.block_n : S.block_m;
  static constexpr i32 kColumns = kRowsAreKeys ? S.block_m : S.block_n;
  static constexpr i32 kTileRows = kRowsAreKeys ? S.tile_n : S.tile_m;
  static constexpr i32 kTileColumns = kRowsAreKeys ? S.tile_m : S.tile_n;
  static constexpr i32 kThreads = S.warps * 32;
  static constexpr i32 kLanes = kColumns / kTileColumns;
  static constexpr i32 kGroups = kThreads / kLanes;
  static constexpr i32 kWeightPitch = odd_pitch(kColumns);

  static_assert(S.family == Family::simt && 32 % kLanes == 0 && kColumns % 4 == 0);
  static_assert(kRows == kGroups * kTileRows && kColumns == kLanes * kTileColumns);
  static_assert(S.head_dim >= 1 && S.head_dim <= kMaxHeadDim);
  static_assert(S.head_dim_v >= 1 && S.head_dim_v <= kMaxHeadDim);

  using Scores = float[kTileRows][kTileColumns];
  /// Sums for a result of this many columns.
  template <i32 Columns>
  using Sums = float4[kTileRows][ceil_div(ceil_div(Columns, 4), kLanes)];

  static ATTUNE_DEVICE i32 lane() { return static_cast<i32>(threadIdx.x % kLanes); }
  static ATTUNE_DEVICE i32 group() { return static_cast<i32>(threadIdx.x / kLanes); }
  /// Of a tile, the r-th row and the c-th column that this thread holds.
  static ATTUNE_DEVICE i32 row_of(i32 r) { return group() + r * kGroups; }
  static ATTUNE_DEVICE i32 column_of(i32 c) { return lane() + c * kLanes; }

  /// Fills a tile of shared memory with rows of global memory, of which it takes the columns [column, column
  /// + Width) of HeadDim. Rows outside [valid_begin, valid_end) and columns past HeadDim become zero: what
  /// lies there in memory, NaN included, is never read. Loads are in flight by the batch.
  template <i32 Rows, i32 HeadDim, i32 Width = HeadDim, i32 Pitch = odd_pitch(Width), typename RowAt>
  static ATTUNE_DEVICE void load_rows(float4* tile, i32 valid_begin, i32 valid_end, RowAt&& row_at,
                                      i32 column = 0) {
    constexpr i32 kVectors = ceil_div(Width, 4);
    constexpr i32 kRowLanes = min(bit_ceil(kVectors), kThreads);
    constexpr i32 kStep = kThreads / kRowLanes;
    constexpr i32 kBatch = min(ceil_div(Rows, kStep), 8);
    const i32 first_row = static_cast<i32>(threadIdx.x / kRowLanes);
#pragma unroll
    for (i32 first_vector = 0; first_vector < kVectors; first_vector += kRowLanes) {
      const i32 vector = first_vector + static_cast<i32>(threadIdx.x % kRowLanes);
      if (kVectors % kRowLanes != 0 && vector >= kVectors) return;
      const i32 valid = HeadDim % 4 == 0 && HeadDim % Width == 0 ? 4 : HeadDim - column - vector * 4;
#pragma unroll 1
      for (i32 begin = first_row; begin < Rows; begin += kBatch * kStep) {
        float4 batch[kBatch];
#pragma unroll
        for (i32 b = 0; b < kBatch; ++b) {
          const i32 row = begin + b * kStep;
          batch[b] = float4{0, 0, 0, 0};
          if (row >= valid_begin && row < valid_end) {
            batch[b] =
                load4<S.dtype, S.copy_bytes>(row_at(row) + (column + vector * 4) * size_of(S.dtype), valid);
          }
        }
#pragma unroll
        for (i32 b = 0; b < kBatch; ++b) {
          const i32 row = begin + b * kStep;
          if (Rows % (kBatch * kStep) == 0 || row < Rows) tile[row * Pitch + vector] = batch[b];
        }
      }
    }
  }

  template <typename T, i32 Rows, i32 Columns>
  static ATTUNE_DEVICE void clear(T (&tile)[Rows][Columns]) {
#pragma unroll
    for (i32 r = 0; r < Rows; ++r) {
#pragma unroll
      for (i32 c = 0; c < Columns; ++c) tile[r][c] = T{};
    }
  }

  /// scores += A B^T, where A's rows are those of the scores and B's rows their columns, of this many
  /// columns.
  template <i32 Width, i32 RowPitch = odd_pitch(Width), i32 ColumnPitch = odd_pitch(Width)>
  static ATTUNE_DEVICE void multiply(Scores& scores, const float4* a, const float4* b) {
    const float4* rows = a + group() * RowPitch;
    const float4* columns = b + lane() * ColumnPitch;
#pragma unroll 1
    for (i32 v = 0; v < ceil_div(Width, 4); ++v) {
      float4 column[kTileColumns];
#pragma unroll
      for (i32 c = 0; c < kTileColumns; ++c) column[c] = columns[c * kLanes * ColumnPitch + v];
#pragma unroll
      for (i32 r = 0; r < kTileRows; ++r) {
        const float4 row = rows[r * kGroups * RowPitch + v];
#pragma unroll
        for (i32 c = 0; c < kTileColumns; ++c) scores[r][c] = dot4(row, column[c], scores[r][c]);
      }
    }
  }

  /// A row's scores are written, and read by accumulate(), by the lanes of one group, which is part of one
  /// warp: the warp's barrier orders them.
  static ATTUNE_DEVICE void store_weights(float4* weights, const Scores& scores) {
    float* rows = reinterpret_cast<float*>(weights);
#pragma unroll
    for (i32 r = 0; r < kTileRows; ++r) {
#pragma unroll
      for (i32 c = 0; c < kTileColumns; ++c) rows[row_of(r) * kWeightPitch * 4 + column_of(c)] = scores[r][c];
    }
  }

  /// sums += W B, where W are stored weights and B has a row for each of their columns; four rows at a time.
  /// Of B's HeadDim columns, Columns ones from `first` on, a multiple of 4.
  template <i32 HeadDim, i32 Pitch = odd_pitch(HeadDim), i32 Columns = HeadDim>
  static ATTUNE_DEVICE void accumulate(Sums<Columns>& sums, const float4* weights, const float4* b,
                                       i32 first = 0) {
    constexpr i32 kVectors = ceil_div(HeadDim, 4);
    constexpr i32 kOwnVectors = ceil_div(ceil_div(Columns, 4), kLanes);
    constexpr bool kWhole = Columns == HeadDim && kVectors % kLanes == 0;
    const float4* weight_rows = weights + group() * kWeightPitch;
#pragma unroll 1
    for (i32 v = 0; v < kColumns / 4; ++v) {
      float4 weight[kTileRows];
#pragma unroll
      for (i32 r = 0; r < kTileRows; ++r) weight[r] = weight_rows[r * kGroups * kWeightPitch + v];
#pragma unroll
      for (i32 k = 0; k < 4; ++k) {
#pragma unroll
        for (i32 c = 0; c < kOwnVectors; ++c) {
          // Lanes past the last column repeat it; they do not store.
          const i32 column = kWhole ? column_of(c) : min(first / 4 + column_of(c), kVectors - 1);
          const float4 value = b[(v * 4 + k) * Pitch + column];
#pragma unroll
          for (i32 r = 0; r < kTileRows; ++r) {
            sums[r][c] = add_scaled4(sums[r][c], element(weight[r], k), value);
          }
        }
      }
    }
  }

  /// Writes the r-th row of sums, times a factor, to the columns from `first` on of a row of HeadDim.
  template <DType T, i32 HeadDim, i32 Columns = HeadDim>
  static ATTUNE_DEVICE void store_row(u8* row, const Sums<Columns>& sums, i32 r, float factor,
                                      i32 first = 0) {
#pragma unroll
    for (i32 c = 0; c < ceil_div(ceil_div(Columns, 4), kLanes); ++c) {
      if (column_of(c) * 4 >= Columns) continue;
      const i32 column = first + column_of(c) * 4;
      store4<T, S.copy_bytes>(row + column * size_of(T), scale4(sums[r][c], factor), HeadDim - column);
    }
  }
};

}  // namespace attune::kernel
