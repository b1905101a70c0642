// The gradient of a bias tensor on a CPU: lanes over keys (key_lanes.h).
//
// One task computes block_m x block_n of its elements, or block_n of one row that serves all queries, and
// adds up dS over all that they were added to.
#pragma once

#include "attune/backward.h"
#include "attune/cpu/key_lanes.h"
#include "attune/cpu/simd.h"
#include "attune/params.h"
#include "attune/semantics.h"

namespace attune::kernel {

template <KernelSpec S>
struct BiasSums {
  float rows[S.block_m][KeyScratch<S>::kColumns];
  i32 first_row;  // row of the query that row 0 is; -1: row 0 is all

  template <i32 V>
  ATTUNE_HD void add(const KeyTask<S>& task, const TilePairs& pairs) {
    constexpr i32 L = S.lanes;
    using F = Floats<L>;
    const i32 row0 = first_row < 0 ? 0 : task.slot.block.q_begin + pairs.queries.begin - first_row;
#pragma clang loop unroll(disable)
    for (i32 r = 0; r < pairs.query.count; ++r) {
      float* sums = &rows[first_row < 0 ? 0 : row0 + r][task.column + pairs.keys.offset];
#pragma clang loop unroll(full)
      for (i32 v = 0; v < V; ++v) {
        const Ints<L> counts = lane_numbers<L>() + v * L < pairs.keys.count;
        const F grad_score = load<F>(&task.scratch.grad_scores[r][v * L]);
        store(sums + v * L, load<F>(sums + v * L) + (counts ? grad_score : F(0.0f)));
      }
    }
  }
};

template <KernelSpec S>
struct alignas(64) GradBiasScratch {
  KeyScratch<S> pairs;
  BiasSums<S> sums;
};

template <KernelSpec S>
constexpr i32 grad_bias_cpu_scratch_bytes() {
  return sizeof(GradBiasScratch<S>);
}

/// Computes one slot: a tile of the bias.
template <KernelSpec S>
ATTUNE_HD void grad_bias_cpu(const BackwardParams& params, i64 number, void* memory) {
  constexpr i32 L = S.lanes;
  constexpr DType kDType = BiasElementOf<S.bias>::dtype;
  auto& scratch = *static_cast<GradBiasScratch<S>*>(memory);
  BiasSums<S>& sums = scratch.sums;
  const BiasSlot slot = bias_slot_of<S>(params, number);
  const bool one_row = params.bias_rows == 1;
  const i32 rows = one_row ? 1 : slot.m_end - slot.m_begin;
  const i32 columns = slot.end - slot.begin;
  clear<L>(columns, sums.rows);
  sums.first_row = one_row ? -1 : slot.m_begin;
  const auto within = [&](const Block& block) {
    return QueryRange{max(slot.m_begin - block.q_begin, 0), min(slot.m_end - block.q_begin, block.len_q)};
  };
#pragma clang loop unroll(disable)
  for (i32 b = 0; b < biased_batches(params); ++b) {
#pragma clang loop unroll(disable)
    for (i32 n = 0; n < biased_heads(params); ++n) {
      add_head<S>(params, slot.batch + b, biased_head(params, slot, n), slot.begin, slot.end, scratch.pairs,
                  sums, within);
    }
  }
  const BiasStrides& strides = params.grad_bias_strides;
  auto* bias = static_cast<Element<kDType>*>(params.grad_bias) + slot.batch * strides.batch +
               slot.group * strides.group + slot.head * strides.head +
               (one_row ? 0 : slot.m_begin) * strides.query + slot.begin * strides.key;
#pragma clang loop unroll(disable)
  for (i32 r = 0; r < rows; ++r) {
    Element<kDType>* row = bias + r * strides.query;
#pragma clang loop unroll(disable) vectorize(disable)
    for (i32 n = 0; n < columns; ++n) store_as<kDType>(row + n * strides.key, sums.rows[r][n]);
  }
}

}  // namespace attune::kernel
