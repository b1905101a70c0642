// Merging chunks on a CPU (merge.h): a task takes block_m rows, one after the other; lanes over value
// columns.
#pragma once

#include "attune/cpu/simd.h"
#include "attune/merge.h"
#include "attune/params.h"
#include "attune/semantics.h"

namespace attune::kernel {

/// The chunks of one row that saw a key.
template <KernelSpec S>
struct alignas(64) MergeScratch {
  static_assert(kMaxChunks % S.lanes == 0, "weights are computed in whole vectors");
  float weight[kMaxChunks];  // its lse first
  const Element<S.dtype>* output[kMaxChunks];
};

template <KernelSpec S>
constexpr i32 merge_cpu_scratch_bytes() {
  return sizeof(MergeScratch<S>);
}

/// Notes the chunks of a row that saw a key and how much each weighs; weights add up to 1. Returns the row's
/// lse.
template <KernelSpec S>
ATTUNE_HD float weigh_chunks(const MergeParams& params, const MergeRow& row, i32& count,
                             MergeScratch<S>& scratch) {
  constexpr i32 L = S.lanes;
  float largest = neg_inf();
  count = 0;
#pragma clang loop unroll(disable) vectorize(disable)
  for (i32 i = 0; i < params.chunks; ++i) {
    const Chunk& chunk = params.chunk[i];
    const float lse = chunk.lse[offset_of(row, chunk.lse_strides)];
    if (lse == neg_inf()) continue;
    scratch.weight[count] = lse;
    scratch.output[count++] =
        static_cast<const Element<S.dtype>*>(chunk.output) + offset_of(row, chunk.output_strides);
    largest = lse > largest ? lse : largest;
  }
  if (count == 0) return neg_inf();
  for (i32 i = count; i % L != 0; ++i) scratch.weight[i] = neg_inf();

  float sum = 0;
#pragma clang loop unroll(disable)
  for (i32 i = 0; i < count; i += L) {
    const Floats<L> weight = exp2<L>((load<Floats<L>>(&scratch.weight[i]) - largest) * kLog2e);
    store(&scratch.weight[i], weight);
    for (i32 l = 0; l < L; ++l) sum += weight[l];
  }
#pragma clang loop unroll(disable) vectorize(disable)
  for (i32 i = 0; i < count; ++i) scratch.weight[i] /= sum;
  return largest + log2<L>(Floats<L>(sum))[0] * kLn2;
}

/// Columns c onwards of a merged row.
template <KernelSpec S, i32 L>
ATTUNE_HD void merge_columns(Element<S.output_dtype>* output, i32 c, i32 count,
                             const MergeScratch<S>& scratch) {
  Floats<L> sum = Floats<L>(0.0f);
#pragma clang loop unroll(disable)
  for (i32 i = 0; i < count; ++i) {
    sum = fma<L>(Floats<L>(scratch.weight[i]), load_as_float<S.dtype, L>(scratch.output[i] + c), sum);
  }
  store_as<S.output_dtype, L>(output + c, sum);
}

/// Computes one slot: block_m rows.
template <KernelSpec S>
ATTUNE_HD void merge_cpu(const MergeParams& params, i64 number, void* memory) {
  auto& scratch = *static_cast<MergeScratch<S>*>(memory);
  const i64 begin = number * S.block_m;
  const i64 left = merge_rows(params) - begin;
  const i32 rows = left < S.block_m ? static_cast<i32>(left) : S.block_m;
#pragma clang loop unroll(disable)
  for (i32 r = 0; r < rows; ++r) {
    const MergeRow row = merge_row(params, begin + r);
    i32 count = 0;
    const float lse = weigh_chunks<S>(params, row, count, scratch);
    if constexpr (S.lse == Lse::write) params.lse[lse_offset(params, row)] = lse;
    auto* output =
        static_cast<Element<S.output_dtype>*>(params.output) + offset_of(row, params.output_strides);
    constexpr i32 L = S.lanes;
    constexpr i32 kWhole = S.head_dim_v / L * L;
#pragma clang loop unroll(disable)
    for (i32 c = 0; c < kWhole; c += L) merge_columns<S, L>(output, c, count, scratch);
#pragma clang loop unroll(disable)
    for (i32 c = kWhole; c < S.head_dim_v; ++c) merge_columns<S, 1>(output, c, count, scratch);
  }
}

}  // namespace attune::kernel
