// Merging chunks on a GPU (merge.h): one pass over memory, and nothing else takes long. Chunks come `stages`
// at a time: all their loads are in flight before the first is used, and so are the LSEs of the next ones,
// which decide what is to be read at all.
#pragma once

#include "attune/cuda/merge_lanes.cuh"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/vector.cuh"
#include "attune/merge.h"
#include "attune/num.h"
#include "attune/params.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
class Merge {
  using Lanes = MergeLanes<S>;
  using Row = typename Lanes::Row;
  using Lses = float[S.stages];
  using Values = Row[S.stages];

  static_assert(S.stages >= 1);

 public:
  static ATTUNE_DEVICE void run(const MergeParams& params) {
    if constexpr (begins_early(S)) ptx::griddepcontrol_wait();
    MergeRow row;
    if (!Lanes::find_row(params, row)) return;
    if (S.blocks == Blocks::varlen && (row.query < *params.row_begin || row.query >= *params.row_end)) return;
    Merge(params, row).run();
  }

 private:
  ATTUNE_DEVICE Merge(const MergeParams& params, const MergeRow& row) : p_(params), row_(row) {}

  ATTUNE_DEVICE void run() {
    Lanes::clear(output_);
    Lses lses, next;
    load_lses(lses, 0);
#pragma unroll 1
    for (i32 chunk = 0; chunk < p_.chunks; chunk += S.stages) {
      Values values;
      if constexpr (S.split == Split::on) {
        load_parts(values, chunk);
      } else {
        Lanes::load_chunks(values, lses, p_, row_, chunk);
      }
      load_lses(next, chunk + S.stages);
      accumulate(values, lses);
#pragma unroll
      for (i32 i = 0; i < S.stages; ++i) lses[i] = next[i];
    }
    finish();
  }

  /// Of the chunks from `chunk` on; a chunk that there is not saw no key.
  ATTUNE_DEVICE void load_lses(Lses& lses, i32 chunk) const {
#pragma unroll
    for (i32 i = 0; i < S.stages; ++i) {
      lses[i] = neg_inf();
      if (chunk + i >= p_.chunks) continue;
      const Chunk& source = p_.chunk[S.split == Split::on ? 0 : chunk + i];
      const i64 part = S.split == Split::on ? (chunk + i) * p_.lse_step : 0;
      lses[i] = source.lse[part + offset_of(row_, source.lse_strides)];
    }
  }

  /// Without a look at the LSEs, for which they would have to wait: what saw no key has output 0.
  ATTUNE_DEVICE void load_parts(Values& values, i32 part) const {
    const auto* first = static_cast<const float*>(p_.chunk[0].output);
    const i64 offset = offset_of(row_, p_.chunk[0].output_strides);
#pragma unroll
    for (i32 i = 0; i < S.stages; ++i) {
      Lanes::template load<S.dtype>(values[i], first, offset + min(part + i, p_.chunks - 1) * p_.output_step);
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
    for (i32 c = 0; c < Lanes::kColumns; ++c) output_[c] = scale4(output_[c], decay);
#pragma unroll
    for (i32 i = 0; i < S.stages; ++i) {
      const float weight = ptx::ex2_approx_ftz((lses[i] - shift) * kLog2e);
      sum_ += weight;
#pragma unroll
      for (i32 c = 0; c < Lanes::kColumns; ++c) output_[c] = add_scaled4(output_[c], weight, values[i][c]);
    }
  }

  /// A row that saw no key: output 0, LSE -inf + log2(0).
  ATTUNE_DEVICE void finish() const {
    if (S.lse == Lse::write && Lanes::lane() == 0)
      p_.lse[lse_offset(p_, row_)] = largest_ + log2f(sum_) * kLn2;
    Lanes::template store<S.output_dtype>(p_.output, offset_of(row_, p_.output_strides), output_,
                                          inverse_sum(sum_));
  }

  const MergeParams& p_;
  const MergeRow row_;
  Row output_;
  float largest_ = neg_inf();
  float sum_ = 0.0f;
};

template <KernelSpec S>
ATTUNE_DEVICE void merge(const MergeParams& params) {
  Merge<S>::run(params);
}

}  // namespace attune::kernel
