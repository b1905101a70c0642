// How the threads of a GPU block share the rows of a merge: a row belongs to kLanes neighbouring threads,
// each to kColumns vectors of 4 of its columns.
#pragma once

#include "attune/cuda/ptx.cuh"
#include "attune/cuda/vector.cuh"
#include "attune/merge.h"
#include "attune/num.h"
#include "attune/params.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
struct MergeLanes {
  static constexpr i32 kLanes = S.warps * 32 / S.block_m;
  static constexpr i32 kVectors = ceil_div(S.head_dim_v, 4);
  static constexpr i32 kColumns = ceil_div(kVectors, kLanes);

  static_assert(S.family == Family::merge && 32 % kLanes == 0);
  static_assert(S.head_dim_v >= 1 && S.head_dim_v <= kMaxHeadDim);

  /// This thread's columns of a row.
  using Row = float4[kColumns];

  static ATTUNE_DEVICE i32 lane() { return static_cast<i32>(threadIdx.x % kLanes); }
  /// The first column of the c-th vector; beyond the row where the lanes do not divide it.
  static ATTUNE_DEVICE i32 column_of(i32 c) { return (lane() + c * kLanes) * 4; }
  static ATTUNE_DEVICE bool exists(i32 c) { return kVectors % kLanes == 0 || lane() + c * kLanes < kVectors; }

  /// The row of this thread; false where it is past the last.
  template <typename Params>
  static ATTUNE_DEVICE bool find_row(const Params& params, MergeRow& row) {
    const i64 rows = merge_rows(params);
    const i64 number = i64{blockIdx.x} * S.block_m + threadIdx.x / kLanes;
    if (number >= rows) return false;
    const bool is_short = rows <= 0xffffffffll;
    row = is_short ? merge_row(params, static_cast<u32>(number)) : merge_row(params, number);
    return true;
  }

  static ATTUNE_DEVICE void clear(Row& row) {
#pragma unroll
    for (i32 c = 0; c < kColumns; ++c) row[c] = float4{0, 0, 0, 0};
  }

  /// Of the row that begins `offset` elements into a tensor.
  template <DType T>
  static ATTUNE_DEVICE void load(Row& row, const void* tensor, i64 offset) {
    const u8* source = static_cast<const u8*>(tensor) + offset * size_of(T);
    clear(row);
#pragma unroll
    for (i32 c = 0; c < kColumns; ++c) {
      if (!exists(c)) continue;
      row[c] = load4<T, S.copy_bytes>(source + column_of(c) * size_of(T),
                                      S.head_dim_v % 4 == 0 ? 4 : S.head_dim_v - column_of(c));
    }
  }

  template <DType T>
  static ATTUNE_DEVICE void store(void* tensor, i64 offset, const Row& row, float factor) {
    u8* destination = static_cast<u8*>(tensor) + offset * size_of(T);
#pragma unroll
    for (i32 c = 0; c < kColumns; ++c) {
      if (!exists(c)) continue;
      store4<T, S.copy_bytes>(destination + column_of(c) * size_of(T), scale4(row[c], factor),
                              S.head_dim_v - column_of(c));
    }
  }

  /// Of the row in the chunks from `chunk` on. One that saw no key is not read: its values are 0.
  template <typename Params>
  static ATTUNE_DEVICE void load_chunks(Row (&rows)[S.stages], const float (&lses)[S.stages],
                                        const Params& params, const MergeRow& row, i32 chunk) {
#pragma unroll
    for (i32 i = 0; i < S.stages; ++i) {
      clear(rows[i]);
      if (lses[i] == neg_inf()) continue;
      const Chunk& source = chunk_of(params, chunk + i);
      load<S.dtype>(rows[i], source.output, offset_of(row, source.output_strides));
    }
  }

  /// The sum over the row's threads, in each of them. All that are left of the warp take part.
  static ATTUNE_DEVICE float sum(float x) {
#pragma unroll
    for (i32 distance = kLanes / 2; distance > 0; distance /= 2) {
      x += __shfl_xor_sync(0xffffffffu, x, distance);
    }
    return x;
  }
};

}  // namespace attune::kernel
