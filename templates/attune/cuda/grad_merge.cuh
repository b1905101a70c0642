// The backward of a merge on a GPU (merge.h): one pass over memory, as forward. The merged row and its
// gradient stay in registers; chunks come `stages` at a time, as in merge.cuh.
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
class GradMerge {
  using Lanes = MergeLanes<S>;
  using Row = typename Lanes::Row;
  using Lses = float[S.stages];
  using Values = Row[S.stages];

  static_assert(S.stages >= 1);

 public:
  static ATTUNE_DEVICE void run(const GradMergeParams& params) {
    MergeRow row;
    if (Lanes::find_row(params, row)) GradMerge(params, row).run();
  }

 private:
  ATTUNE_DEVICE GradMerge(const GradMergeParams& params, const MergeRow& row) : p_(params), row_(row) {}

  ATTUNE_DEVICE void run() {
    load_merged();
    Lses lses, next;
    load_lses(lses, 0);
#pragma unroll 1
    for (i32 chunk = 0; chunk < p_.chunks; chunk += S.stages) {
      Values values;
      Lanes::load_chunks(values, lses, p_, row_, chunk);
      load_lses(next, chunk + S.stages);
      give_back(values, lses, chunk);
#pragma unroll
      for (i32 i = 0; i < S.stages; ++i) lses[i] = next[i];
    }
  }

  /// A row that saw no key is not read.
  ATTUNE_DEVICE void load_merged() {
    Lanes::clear(output_);
    Lanes::clear(grad_output_);
    lse_ = p_.lse[offset_of(row_, p_.lse_strides)];
    if (lse_ == neg_inf()) return;
    if (p_.grad_lse != nullptr) grad_lse_ = p_.grad_lse[offset_of(row_, p_.grad_lse_strides)];
    Lanes::template load<S.output_dtype>(output_, p_.output, offset_of(row_, p_.output_strides));
    load_grad_output();
  }

  /// Its columns may be any distance apart, or all the same one.
  ATTUNE_DEVICE void load_grad_output() {
    constexpr i32 kElement = size_of(S.output_dtype);
    const i64 offset = offset_of(row_, p_.grad_output_strides);
    if (p_.grad_output_column == 1) {
      Lanes::template load<S.output_dtype>(grad_output_, p_.grad_output, offset);
      return;
    }
    const auto at = [&](i32 column) {
      if (column >= S.head_dim_v) return 0.0f;
      const i64 element = offset + column * p_.grad_output_column;
      const u8* source = static_cast<const u8*>(p_.grad_output) + element * kElement;
      return load4<S.output_dtype, kElement>(source, 1).x;
    };
#pragma unroll
    for (i32 c = 0; c < Lanes::kColumns; ++c) {
      const i32 column = Lanes::column_of(c);
      grad_output_[c] = {at(column), at(column + 1), at(column + 2), at(column + 3)};
    }
  }

  /// Of the chunks from `chunk` on; a chunk that there is not saw no key, nor did any where the row did not.
  ATTUNE_DEVICE void load_lses(Lses& lses, i32 chunk) const {
#pragma unroll
    for (i32 i = 0; i < S.stages; ++i) {
      lses[i] = neg_inf();
      if (chunk + i >= p_.chunks || lse_ == neg_inf()) continue;
      const Chunk& source = p_.chunk[chunk + i].chunk;
      lses[i] = source.lse[offset_of(row_, source.lse_strides)];
    }
  }

  ATTUNE_DEVICE void give_back(const Values& values, const Lses& lses, i32 chunk) const {
#pragma unroll
    for (i32 i = 0; i < S.stages; ++i) {
      if (chunk + i < p_.chunks) give_back(values[i], lses[i], p_.chunk[chunk + i]);
    }
  }

  ATTUNE_DEVICE void give_back(const Row& values, float lse, const GradChunk& chunk) const {
    float product = 0.0f;
#pragma unroll
    for (i32 c = 0; c < Lanes::kColumns; ++c) {
      product = dot4(add_scaled4(values[c], -1.0f, output_[c]), grad_output_[c], product);
    }
    product = Lanes::sum(product);
    const i64 grad_offset = offset_of(row_, chunk.grad_output_strides);
    float grad_lse = 0.0f;
    if (lse == neg_inf()) {
      Row zeros;
      Lanes::clear(zeros);
      Lanes::template store<S.dtype>(chunk.grad_output, grad_offset, zeros, 1.0f);
    } else {
      const float weight = ptx::ex2_approx_ftz((lse - lse_) * kLog2e);
      Lanes::template store<S.dtype>(chunk.grad_output, grad_offset, grad_output_, weight);
      grad_lse = weight * (grad_lse_ + product);
    }
    if (Lanes::lane() == 0) chunk.grad_lse[lse_offset(p_, row_)] = grad_lse;
  }

  const GradMergeParams& p_;
  const MergeRow row_;
  Row output_;
  Row grad_output_;
  float lse_ = neg_inf();
  float grad_lse_ = 0.0f;
};

template <KernelSpec S>
ATTUNE_DEVICE void grad_merge(const GradMergeParams& params) {
  GradMerge<S>::run(params);
}

}  // namespace attune::kernel
