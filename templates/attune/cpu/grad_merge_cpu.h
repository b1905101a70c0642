// The backward of a merge on a CPU (merge.h): a task takes block_m rows, one after the other; lanes over
// value columns.
#pragma once

#include "attune/cpu/rows.h"
#include "attune/cpu/simd.h"
#include "attune/merge.h"
#include "attune/params.h"
#include "attune/spec.h"

namespace attune::kernel {

/// One merged row as float32.
template <KernelSpec S>
struct alignas(64) GradMergeScratch {
  float output[S.head_dim_v];
  float grad_output[S.head_dim_v];
  float grad_lse;
};

template <KernelSpec S>
constexpr i32 grad_merge_cpu_scratch_bytes() {
  return sizeof(GradMergeScratch<S>);
}

template <KernelSpec S>
ATTUNE_HD void load_merged(const GradMergeParams& params, const MergeRow& row, GradMergeScratch<S>& scratch) {
  using Merged = Element<S.output_dtype>;
  const auto* output = static_cast<const Merged*>(params.output) + offset_of(row, params.output_strides);
  const auto* grad =
      static_cast<const Merged*>(params.grad_output) + offset_of(row, params.grad_output_strides);
  load_row<S.output_dtype, S.lanes>(output, 1, scratch.output);
  load_row<S.output_dtype, S.lanes>(grad, params.grad_output_column, scratch.grad_output);
  scratch.grad_lse =
      params.grad_lse != nullptr ? params.grad_lse[offset_of(row, params.grad_lse_strides)] : 0;
}

/// A chunk that saw a key.
template <KernelSpec S>
ATTUNE_HD void give_back(const GradChunk& given, const MergeRow& row, float weight, float& grad_lse,
                         const GradMergeScratch<S>& scratch) {
  const Chunk& chunk = given.chunk;
  const auto* output =
      static_cast<const Element<S.dtype>*>(chunk.output) + offset_of(row, chunk.output_strides);
  auto* grad = static_cast<Element<S.dtype>*>(given.grad_output) + offset_of(row, given.grad_output_strides);
  Floats<S.lanes> sums = Floats<S.lanes>(0.0f);
  for_each_vector<S.head_dim_v, S.lanes>([&]<i32 L>(i32 c) {
    const auto grad_output = load<Floats<L>>(&scratch.grad_output[c]);
    store_as<S.dtype, L>(grad + c, weight * grad_output);
    const Floats<L> difference = load_as_float<S.dtype, L>(output + c) - load<Floats<L>>(&scratch.output[c]);
    if constexpr (L == S.lanes) {
      sums = fma<L>(difference, grad_output, sums);
    } else {
      sums[0] += difference[0] * grad_output[0];
    }
  });
  float sum = scratch.grad_lse;
  for (i32 l = 0; l < S.lanes; ++l) sum += sums[l];
  grad_lse = weight * sum;
}

/// A chunk that saw no key; it is not read.
template <KernelSpec S>
ATTUNE_HD void give_nothing(const GradChunk& given, const MergeRow& row, float& grad_lse) {
  auto* grad = static_cast<Element<S.dtype>*>(given.grad_output) + offset_of(row, given.grad_output_strides);
  for_each_vector<S.head_dim_v, S.lanes>(
      [&]<i32 L>(i32 c) { store_as<S.dtype, L>(grad + c, Floats<L>(0.0f)); });
  grad_lse = 0;
}

/// Computes one slot: block_m rows.
template <KernelSpec S>
ATTUNE_HD void grad_merge_cpu(const GradMergeParams& params, i64 number, void* memory) {
  auto& scratch = *static_cast<GradMergeScratch<S>*>(memory);
  const i64 begin = number * S.block_m;
  const i64 left = merge_rows(params) - begin;
  const i32 rows = left < S.block_m ? static_cast<i32>(left) : S.block_m;
#pragma clang loop unroll(disable)
  for (i32 r = 0; r < rows; ++r) {
    const MergeRow row = merge_row(params, begin + r);
    const float merged_lse = params.lse[offset_of(row, params.lse_strides)];
    if (merged_lse != neg_inf()) load_merged<S>(params, row, scratch);
#pragma clang loop unroll(disable)
    for (i32 i = 0; i < params.chunks; ++i) {
      const GradChunk& given = params.chunk[i];
      const float lse = given.chunk.lse[offset_of(row, given.chunk.lse_strides)];
      float& grad_lse = given.grad_lse[lse_offset(params, row)];
      if (lse == neg_inf() || merged_lse == neg_inf()) {
        give_nothing<S>(given, row, grad_lse);
      } else {
        const float weight = exp2<S.lanes>(Floats<S.lanes>((lse - merged_lse) * kLog2e))[0];
        give_back<S>(given, row, weight, grad_lse, scratch);
      }
    }
  }
}

}  // namespace attune::kernel
