// Merging chunks on a GPU (merge.h): one pass over memory, and nothing else takes long. A row belongs to
// kLanes neighbouring threads, each to kColumns vectors of 4 of its columns. Chunks come `stages` at a time:
// all their loads are in flight before the first is used, and so are the LSEs of the next ones, which decide
// what is to be read at all.
#pragma once

#include "attune/cuda/ptx.cuh"
#include "attune/cuda/vector.cuh"
#include "attune/merge.h"
#include "attune/num.h"
#include "attune/params.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
class Merge {
  static constexpr i32 kLanes = S.warps * 32 / S.block_m;
  static constexpr i32 kVectors = ceil_div(S.head_dim_v, 4);
  static constexpr i32 kColumns = ceil_div(kVectors, kLanes);

  static_assert(S.family == Family::merge && 32 % kLanes == 0 && S.stages >= 1);
  static_assert(S.head_dim_v >= 1 && S.head_dim_v <= kMaxHeadDim);

  using Lses = float[S.stages];
  using Values = float4[S.stages][kColumns];

 public:
  static ATTUNE_DEVICE void run(const MergeParams& params) {
    const i64 rows = merge_rows(params);
    const i64 number = i64{blockIdx.x} * S.block_m + threadIdx.x / kLanes;
    if (number >= rows) return;
    const bool is_short = rows <= 0xffffffffll;
    Merge(params, is_short ? merge_row(params, static_cast<u32>(number)) : merge_row(params, number)).run();
  }

 private:
  ATTUNE_DEVICE Merge(const MergeParams& params, const MergeRow& row) : p_(params), row_(row) {}

  ATTUNE_DEVICE void run() {
#pragma unroll
    for (i32 c = 0; c < kColumns; ++c) output_[c] = float4{0, 0, 0, 0};
    Lses lses, next;
    load_lses(lses, 0);
#pragma unroll 1
    for (i32 chunk = 0; chunk < p_.chunks; chunk += S.stages) {
      Values values;
      load_values(values, lses, chunk);
      load_lses(next, chunk + S.stages);
      accumulate(values, lses);
#pragma unroll
      for (i32 i = 0; i < S.stages; ++i) lses[i] = next[i];
    }
    finish();
  }

  static ATTUNE_DEVICE i32 lane() {
    return static_cast<i32>(threadIdx.x % kLanes);
  }
  /// The c-th of this thread's vectors of columns.
  static ATTUNE_DEVICE i32 vector_of(i32 c) {
    return lane() + c * kLanes;
  }
  static ATTUNE_DEVICE bool exists(i32 vector) {
    return kVectors % kLanes == 0 || vector < kVectors;
  }

  /// Of the chunks from `chunk` on; a chunk that there is not saw no key.
  ATTUNE_DEVICE void load_lses(Lses& lses, i32 chunk) const {
#pragma unroll
    for (i32 i = 0; i < S.stages; ++i) {
      lses[i] = neg_inf();
      if (chunk + i >= p_.chunks) continue;
      const Chunk& source = p_.chunk[chunk + i];
      lses[i] = source.lse[offset_of(row_, source.lse_strides)];
    }
  }

  /// Chunks that saw no key are not read: their values are 0.
  ATTUNE_DEVICE void load_values(Values& values, const Lses& lses, i32 chunk) const {
#pragma unroll
    for (i32 i = 0; i < S.stages; ++i) {
#pragma unroll
      for (i32 c = 0; c < kColumns; ++c) values[i][c] = float4{0, 0, 0, 0};
      if (lses[i] == neg_inf()) continue;
      const Chunk& source = p_.chunk[chunk + i];
      const u8* values_of_row =
          static_cast<const u8*>(source.output) + offset_of(row_, source.output_strides) * size_of(S.dtype);
#pragma unroll
      for (i32 c = 0; c < kColumns; ++c) {
        const i32 column = vector_of(c) * 4;
        if (!exists(vector_of(c))) continue;
        values[i][c] = load4<S.dtype, S.copy_bytes>(values_of_row + column * size_of(S.dtype),
                                                    S.head_dim_v % 4 == 0 ? 4 : S.head_dim_v - column);
      }
    }
  }

  /// As in attention's online softmax: weights are relative to the largest LSE so far.
  ATTUNE_DEVICE void accumulate(const Values& values, const Lses& lses) {
    const float before = largest_;
#pragma unroll
    for (i32 i = 0; i < S.stages; ++i) largest_ = fmaxf(largest_, lses[i]);
    const float shift = safe_max(largest_);
    const float decay = ptx::ex2_approx_ftz((before - shift) * kLog2e);
    sum_ *= decay;
#pragma unroll
    for (i32 c = 0; c < kColumns; ++c) output_[c] = scale4(output_[c], decay);
#pragma unroll
    for (i32 i = 0; i < S.stages; ++i) {
      const float weight = ptx::ex2_approx_ftz((lses[i] - shift) * kLog2e);
      sum_ += weight;
#pragma unroll
      for (i32 c = 0; c < kColumns; ++c) output_[c] = add_scaled4(output_[c], weight, values[i][c]);
    }
  }

  /// A row that saw no key: output 0, LSE -inf + log2(0).
  ATTUNE_DEVICE void finish() const {
    if (S.lse == Lse::write && lane() == 0) p_.lse[lse_offset(p_, row_)] = largest_ + log2f(sum_) * kLn2;
    const float factor = inverse_sum(sum_);
    u8* output = static_cast<u8*>(p_.output) + offset_of(row_, p_.output_strides) * size_of(S.output_dtype);
#pragma unroll
    for (i32 c = 0; c < kColumns; ++c) {
      const i32 column = vector_of(c) * 4;
      if (!exists(vector_of(c))) continue;
      store4<S.output_dtype, S.copy_bytes>(output + column * size_of(S.output_dtype),
                                           scale4(output_[c], factor), S.head_dim_v - column);
    }
  }

  const MergeParams& p_;
  const MergeRow row_;
  float4 output_[kColumns];
  float largest_ = neg_inf();
  float sum_ = 0.0f;
};

template <KernelSpec S>
ATTUNE_DEVICE void merge(const MergeParams& params) {
  Merge<S>::run(params);
}

}  // namespace attune::kernel
