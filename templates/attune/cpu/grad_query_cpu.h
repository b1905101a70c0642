// The query's gradient on a CPU: lanes over queries, as in forward_cpu.h.
//
// One task computes block_m queries of one head. For each block of keys and values, transposed so that a
// vector holds one number of `lanes` queries each:
//
//   S^T = K Q^T     dP^T = V dO^T     dS^T = P^T * (Z dP^T - delta)     dQ^T += K^T dS^T
#pragma once

#include "attune/backward.h"
#include "attune/blocks.h"
#include "attune/cpu/gradients.h"
#include "attune/cpu/products.h"
#include "attune/cpu/query_lanes.h"
#include "attune/cpu/rows.h"
#include "attune/cpu/simd.h"
#include "attune/cpu/task.h"
#include "attune/params.h"
#include "attune/semantics.h"

namespace attune::kernel {

template <KernelSpec S>
struct alignas(64) GradQueryScratch {
  /// One vector more than a tile keeps rows from falling on the same sets of a cache.
  static constexpr i32 kColumns = S.block_m + S.lanes;
  float query[S.head_dim][kColumns];  // times scale * log2(e)
  float grad_output[S.head_dim_v][kColumns];
  float sums[S.head_dim][kColumns];  // the gradient before the scale
  float lse2[S.block_m];
  float delta[S.block_m];
  PairNumbers<S> scores;       // of one register tile of queries
  PairNumbers<S> grad_scores;  // dP first
  float key[Task<S>::kCopiedRows][S.head_dim];
  float value[Task<S>::kCopiedRows][S.head_dim_v];
};

template <KernelSpec S>
constexpr i32 grad_query_cpu_scratch_bytes() {
  return sizeof(GradQueryScratch<S>);
}

/// dS^T of `count` keys for V vectors of queries.
template <KernelSpec S, i32 V>
ATTUNE_HD void score_gradients(const DropoutParams& dropout, i32 count, i32 m, GradQueryScratch<S>& scratch) {
  constexpr i32 L = S.lanes;
  using F = Floats<L>;
  F lse2[V], delta[V];
#pragma clang loop unroll(full)
  for (i32 v = 0; v < V; ++v) {
    lse2[v] = load<F>(&scratch.lse2[m + v * L]);
    delta[v] = load<F>(&scratch.delta[m + v * L]);
  }
#pragma clang loop unroll(disable)
  for (i32 n = 0; n < count; ++n) {
#pragma clang loop unroll(full)
    for (i32 v = 0; v < V; ++v) {
      float* number = &scratch.grad_scores[n][v * L];
      F grad_weight = load<F>(number);
      if constexpr (S.dropout == Dropout::on) grad_weight *= dropout.rescale;
      const F score2 = load<F>(&scratch.scores[n][v * L]);
      store(number, pair_gradients<L>(score2, lse2[v], grad_weight, delta[v]).grad_score);
    }
  }
}

/// Adds what a block of keys and values gives to V vectors of queries.
template <KernelSpec S, i32 V>
ATTUNE_HD void add_keys(const Task<S>& task, KeyRange block, Rows keys, Rows values, Queries queries,
                        GradQueryScratch<S>& scratch) {
  constexpr i32 L = S.lanes;
  const i32 begin = queries.begin, end = queries.begin + queries.count;
  const i32 len_k = task.slot.block.len_k;
  const KeyRange visited = visited_keys<S>(task.window, len_k, begin, end);
  const KeyRange unmasked = unmasked_keys<S>(task.window, len_k, begin, end);
  const KeyRange seen{max(block.begin, visited.begin), min(block.end, visited.end)};
  if (seen.begin >= seen.end) return;
  keys = slice(keys, seen.begin - block.begin, seen.end - block.begin);
  values = slice(values, seen.begin - block.begin, seen.end - block.begin);

  multiply<L, S.tile_n, V>(keys, queries.m, scratch.query, scratch.scores);
  multiply<L, S.tile_n, V>(values, queries.m, scratch.grad_output, scratch.grad_scores);
  if constexpr (S.bias != Bias::none) add_bias<S>(task, queries, seen, scratch.scores);
  mask_scores<S, V>(task.window, begin, seen.begin, {seen.begin, min(seen.end, unmasked.begin)},
                    scratch.scores);
  mask_scores<S, V>(task.window, begin, seen.begin, {max(seen.begin, unmasked.end), seen.end},
                    scratch.scores);
  if constexpr (S.dropout == Dropout::on) drop<S>(task, queries, seen, scratch.grad_scores);
  score_gradients<S, V>(task.params.dropout, keys.count, queries.m, scratch);
  accumulate<L, S.tile_n, V, false>(keys, queries.m, V * L, scratch.grad_scores, scratch.sums);
}

/// Computes one slot: a tile of queries of one head.
template <KernelSpec S>
ATTUNE_HD void grad_query_cpu(const BackwardParams& params, i64 number, void* memory) {
  using T = Element<S.dtype>;
  constexpr i32 L = S.lanes;
  const ForwardParams& p = params.forward;
  const Slot slot = slot_of<S>(p, number);
  if (slot.begin >= slot.end) return;
  const Task<S> task{p, slot, window_of_block<S>(p, slot.block)};
  auto& scratch = *static_cast<GradQueryScratch<S>*>(memory);
  const i32 count = slot.end - slot.begin;
  const i64 first_row = slot.block.q_begin + slot.begin;
  const i64 first_number = lse_offset(p, slot, slot.begin);
  const auto rows_of = [&](auto* tensor, const Strides& strides) {
    return tensor + head_offset(slot, strides) + first_row * strides.seq;
  };
  const T* key = static_cast<const T*>(p.key) + head_offset(slot, p.key_strides);
  const T* value = static_cast<const T*>(p.value) + head_offset(slot, p.value_strides);

  load_transposed<S.dtype, L>(rows_of(static_cast<const T*>(p.query), p.query_strides), p.query_strides.seq,
                              count, p.scale * kLog2e, scratch.query);
  load_transposed<S.dtype, L>(rows_of(static_cast<const T*>(params.grad_output), params.grad_output_strides),
                              params.grad_output_strides.seq, count, 1.0f, scratch.grad_output);
  load_numbers<L>(params.lse2 + first_number, count, -neg_inf(), scratch.lse2);
  load_numbers<L>(params.delta + first_number, count, 0.0f, scratch.delta);
  clear<L>(count, scratch.sums);

  for_each_key_block<S>(task, [&](KeyRange block) {
    const Rows keys = fetch_keys<S>(task, key, p.key_strides.seq, block, scratch.key);
    const Rows values = fetch_keys<S>(task, value, p.value_strides.seq, block, scratch.value);
    for_each_register_tile<S>(
        task, [&]<i32 V>(Queries queries) { add_keys<S, V>(task, block, keys, values, queries, scratch); });
  });

  store_transposed<S.dtype, L>(scratch.sums,
                               rows_of(static_cast<T*>(params.grad_query), params.grad_query_strides),
                               params.grad_query_strides.seq, count, [&](i32) { return Floats<L>(p.scale); });
}

}  // namespace attune::kernel
