// Forward attention on a CPU: lanes over queries.
//
// One task computes block_m queries of one head. Everything is transposed, so that a vector holds one number
// of `lanes` queries each:
//
//              block_m queries                block_m queries                 block_m queries
//             +---------------+              +---------------+               +---------------+
//   head_dim  |  Q^T, scaled  |     block_n  |  S^T -> P^T   |   head_dim_v  |      O^T      |
//             +---------------+       keys   +---------------+               +---------------+
//
// S^T = K Q^T and O^T += V^T P^T are register tiles of tile_n rows (keys, value columns) x tile_m vectors of
// queries: an element of K or V, straight from where it lies, is broadcast and multiplied with tile_m vectors
// of Q or P. So the softmax is vertical, without any horizontal reduction; every head_dim is exact, without
// padding; and any stride will do. 16-bit keys and values are widened a block at a time, and those behind a
// table of pages gathered.
#pragma once

#include "attune/blocks.h"
#include "attune/cpu/products.h"
#include "attune/cpu/query_lanes.h"
#include "attune/cpu/rows.h"
#include "attune/cpu/simd.h"
#include "attune/cpu/task.h"
#include "attune/params.h"
#include "attune/semantics.h"

namespace attune::kernel {

/// What a task keeps in memory: small enough for the level-1 or, with a large head_dim, the level-2 cache.
template <KernelSpec S>
struct alignas(64) ForwardScratch {
  float query[S.head_dim][S.block_m];  // times scale * log2(e): scores are then in base 2
  PairNumbers<S> scores;               // of one register tile of queries; then probabilities
  float output[S.head_dim_v][S.block_m];
  float row_max[S.block_m];
  float row_sum[S.block_m];
  float rescale[Task<S>::kTileQueries];
  float key[Task<S>::kCopiedRows][S.head_dim];
  float value[Task<S>::kCopiedRows][S.head_dim_v];
};

/// One step of the online softmax for V vectors of queries: scores become probabilities relative to the new
/// maximum, and `rescale` what earlier sums and outputs are multiplied with.
template <KernelSpec S, i32 V>
ATTUNE_HD void softmax_step(i32 count, i32 m, ForwardScratch<S>& scratch) {
  constexpr i32 L = S.lanes;
  using F = Floats<L>;
  F old_max[V], new_max[V], subtrahend[V], sum[V];
#pragma clang loop unroll(full)
  for (i32 v = 0; v < V; ++v) new_max[v] = old_max[v] = load<F>(&scratch.row_max[m + v * L]);
#pragma clang loop unroll_count(2)
  for (i32 n = 0; n < count; ++n) {
#pragma clang loop unroll(full)
    for (i32 v = 0; v < V; ++v) new_max[v] = max<L>(load<F>(&scratch.scores[n][v * L]), new_max[v]);
  }
#pragma clang loop unroll(full)
  for (i32 v = 0; v < V; ++v) {
    subtrahend[v] = safe_max(new_max[v]);
    const F rescale = exp2<L>(old_max[v] - subtrahend[v]);
    sum[v] = load<F>(&scratch.row_sum[m + v * L]) * rescale;
    store(&scratch.rescale[v * L], rescale);
    store(&scratch.row_max[m + v * L], new_max[v]);
  }
#pragma clang loop unroll_count(2)
  for (i32 n = 0; n < count; ++n) {
#pragma clang loop unroll(full)
    for (i32 v = 0; v < V; ++v) {
      float* score = &scratch.scores[n][v * L];
      const F probability = exp2<L>(load<F>(score) - subtrahend[v]);
      store(score, probability);
      sum[v] += probability;
    }
  }
#pragma clang loop unroll(full)
  for (i32 v = 0; v < V; ++v) store(&scratch.row_sum[m + v * L], sum[v]);
}

/// O^T of C value columns from column c on and V vectors of queries from query m on: O^T * rescale + V^T P^T.
template <KernelSpec S, i32 V, i32 C>
__attribute__((noinline)) void accumulate_tile(Rows values, i32 c, i32 m, ForwardScratch<S>& scratch) {
  using F = Floats<S.lanes>;
  F output[C][V];
#pragma clang loop unroll(full)
  for (i32 v = 0; v < V; ++v) {
    const F rescale = load<F>(&scratch.rescale[v * S.lanes]);
#pragma clang loop unroll(full)
    for (i32 r = 0; r < C; ++r) output[r][v] = load<F>(&scratch.output[c + r][m + v * S.lanes]) * rescale;
  }
  add_products<S.lanes>(values, c, scratch.scores, output);
#pragma clang loop unroll(full)
  for (i32 r = 0; r < C; ++r) {
#pragma clang loop unroll(full)
    for (i32 v = 0; v < V; ++v) store(&scratch.output[c + r][m + v * S.lanes], output[r][v]);
  }
}

/// A block of keys and values for V vectors of queries, which visit only the keys that they see.
template <KernelSpec S, i32 V>
ATTUNE_HD void attend(const Task<S>& task, KeyRange block, Rows keys, Rows values, Queries queries,
                      ForwardScratch<S>& scratch) {
  const i32 begin = queries.begin, end = queries.begin + queries.count;
  const i32 len_k = task.slot.block.len_k;
  const KeyRange visited = visited_keys<S>(task.window, len_k, begin, end);
  const KeyRange unmasked = unmasked_keys<S>(task.window, len_k, begin, end);
  const KeyRange seen{max(block.begin, visited.begin), min(block.end, visited.end)};
  if (seen.begin >= seen.end) return;
  keys = slice(keys, seen.begin - block.begin, seen.end - block.begin);
  values = slice(values, seen.begin - block.begin, seen.end - block.begin);

  multiply<S.lanes, S.tile_n, V>(keys, queries.m, scratch.query, scratch.scores);
  if constexpr (S.bias != Bias::none) add_bias<S>(task, queries, seen, scratch.scores);
  mask_scores<S, V>(task.window, begin, seen.begin, {seen.begin, min(seen.end, unmasked.begin)},
                    scratch.scores);
  mask_scores<S, V>(task.window, begin, seen.begin, {max(seen.begin, unmasked.end), seen.end},
                    scratch.scores);
  softmax_step<S, V>(keys.count, queries.m, scratch);
  if constexpr (S.dropout == Dropout::on) drop<S>(task, queries, seen, scratch.scores);
  for_each_column_tile<S.head_dim_v, S.tile_n>(
      [&]<i32 C>(i32 c) { accumulate_tile<S, V, C>(values, c, queries.m, scratch); });
}

/// What the output's rows are multiplied with, for the vector of queries at m.
template <KernelSpec S>
ATTUNE_HD Floats<S.lanes> output_factor(const ForwardParams& params, i32 m,
                                        const ForwardScratch<S>& scratch) {
  const auto factor = inverse_sum(load<Floats<S.lanes>>(&scratch.row_sum[m]));
  return S.dropout == Dropout::on ? factor * params.dropout.rescale : factor;
}

/// Natural log of the sum of exponentials; -inf for a row that saw no key.
template <KernelSpec S>
ATTUNE_HD void store_lse(float* lse, i32 count, const ForwardScratch<S>& scratch) {
  constexpr i32 L = S.lanes;
#pragma clang loop unroll(disable)
  for (i32 m = 0; m < count; m += L) {
    const Floats<L> sum = load<Floats<L>>(&scratch.row_sum[m]);
    const Floats<L> lse2 = load<Floats<L>>(&scratch.row_max[m]) + log2<L>(sum);
    const Floats<L> result = sum == 0.0f ? Floats<L>(neg_inf()) : lse2 * kLn2;
    if (m + L <= count) {
      store(lse + m, result);
    } else {
#pragma clang loop unroll(disable) vectorize(disable)
      for (i32 i = 0; m + i < count; ++i) lse[m + i] = result[i];
    }
  }
}

template <KernelSpec S>
ATTUNE_HD void clear(ForwardScratch<S>& scratch) {
  using F = Floats<S.lanes>;
#pragma clang loop unroll(disable)
  for (i32 m = 0; m < S.block_m; m += S.lanes) {
    store(&scratch.row_max[m], F(neg_inf()));
    store(&scratch.row_sum[m], F(0.0f));
#pragma clang loop unroll(disable)
    for (i32 c = 0; c < S.head_dim_v; ++c) store(&scratch.output[c][m], F(0.0f));
  }
}

template <KernelSpec S>
constexpr i32 forward_cpu_scratch_bytes() {
  return sizeof(ForwardScratch<S>);
}

/// Computes one slot: a tile of queries of one head.
template <KernelSpec S>
ATTUNE_HD void forward_cpu(const ForwardParams& params, i64 number, void* memory) {
  using T = Element<S.dtype>;
  const Slot slot = slot_of<S>(params, number);
  if (slot.begin >= slot.end) return;
  const Task<S> task{params, slot, window_of_block<S>(params, slot.block)};
  auto& scratch = *static_cast<ForwardScratch<S>*>(memory);
  const i32 count = slot.end - slot.begin;
  const i64 first_row = slot.block.q_begin + slot.begin;
  const T* query = static_cast<const T*>(params.query) + head_offset(slot, params.query_strides);
  const T* key = static_cast<const T*>(params.key) + head_offset(slot, params.key_strides);
  const T* value = static_cast<const T*>(params.value) + head_offset(slot, params.value_strides);
  auto* output =
      static_cast<Element<S.output_dtype>*>(params.output) + head_offset(slot, params.output_strides);

  clear(scratch);
  load_transposed<S.dtype, S.lanes>(query + first_row * params.query_strides.seq, params.query_strides.seq,
                                    count, params.scale * kLog2e, scratch.query);

  for_each_key_block<S>(task, [&](KeyRange block) {
    const Rows keys = fetch_keys<S>(task, key, params.key_strides.seq, block, scratch.key);
    const Rows values = fetch_keys<S>(task, value, params.value_strides.seq, block, scratch.value);
    for_each_register_tile<S>(
        task, [&]<i32 V>(Queries queries) { attend<S, V>(task, block, keys, values, queries, scratch); });
  });

  store_transposed<S.output_dtype, S.lanes>(scratch.output, output + first_row * params.output_strides.seq,
                                            params.output_strides.seq, count,
                                            [&](i32 m) { return output_factor<S>(params, m, scratch); });
  if constexpr (S.lse == Lse::write) {
    store_lse<S>(params.lse + lse_offset(params, slot, slot.begin), count, scratch);
  }
}

}  // namespace attune::kernel
