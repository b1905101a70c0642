// A task whose lanes are keys: a tile of rows of key and value, of one head (grad_key_value_cpu.h,
// grad_bias_cpu.h). The queries that see them are taken a block at a time:
//
//   S = Q K^T     dP = dO V^T     P = exp2(S - lse2)     dS = P * (Z dP - delta)
//
// with K^T and V^T in scratch, so that a vector holds one number of `lanes` keys each.
#pragma once

#include "attune/backward.h"
#include "attune/cpu/gradients.h"
#include "attune/cpu/products.h"
#include "attune/cpu/rows.h"
#include "attune/cpu/simd.h"
#include "attune/philox.h"
#include "attune/semantics.h"

namespace attune::kernel {

/// What a task keeps in memory besides its sums.
template <KernelSpec S>
struct alignas(64) KeyScratch {
  static_assert(S.head_dim >= 1 && S.head_dim <= kMaxHeadDim && S.head_dim_v >= 1 &&
                    S.head_dim_v <= kMaxHeadDim,
                "head dims are 1 to 512");
  static_assert(S.block_n % (S.lanes * S.tile_n) == 0, "a block holds whole register tiles of keys");
  static_assert(S.block_m % S.tile_m == 0, "a block holds whole register tiles of queries");
  static_assert(S.block_m % (S.lanes / 4) == 0, "bits are drawn for lanes / 4 queries at a time");
  static constexpr i32 kTileKeys = S.lanes * S.tile_n;
  /// One vector more than a tile: a sequence may begin at any row, so that its last vector hangs over the
  /// tile's end. Also keeps rows from falling on the same sets of a cache.
  static constexpr i32 kColumns = S.block_n + S.lanes;
  static constexpr bool kDrops = S.dropout == Dropout::on;
  /// Keys of a sequence may begin anywhere in a group that shares random bits.
  static constexpr i32 kDrawn = kDrops ? (ceil_div(S.block_n, kDropoutGroup) + 1) * kDropoutGroup : 1;

  float key[S.head_dim][kColumns];  // times scale * log2(e): scores are then in base 2
  float value[S.head_dim_v][kColumns];
  float weights[S.block_m][kTileKeys];      // of one register tile of keys: scores, then P Z
  float grad_scores[S.block_m][kTileKeys];  // dP first
  float query[S.block_m][S.head_dim];
  float grad_output[S.block_m][S.head_dim_v];
  u16 random[kDrops ? S.block_m : 1][kDrawn];
};

/// A segment of the slot's rows, for one head of the query. Column `column` of the scratch is its first row.
template <KernelSpec S>
struct KeyTask {
  const BackwardParams& params;
  const KeySegment segment;
  const Slot slot;
  const Window window;
  const i32 column;
  KeyScratch<S>& scratch;
};

/// The keys [offset, offset + count) of the segment, at most kTileKeys.
struct TileKeys {
  i32 offset;
  i32 count;
};

/// Scores of the queries with their bias.
template <KernelSpec S>
__attribute__((noinline)) void add_key_bias(const KeyTask<S>& task, QueryRange queries, TileKeys keys) {
  constexpr i32 L = S.lanes;
  const ForwardParams& p = task.params.forward;
  const BiasStrides& strides = p.bias_strides;
  const auto* bias = static_cast<const BiasElement<S.bias>*>(p.bias) + head_offset(task.slot, strides) +
                     (task.segment.begin + keys.offset) * strides.key;
#pragma clang loop unroll(disable)
  for (i32 i = queries.begin; i < queries.end; ++i) {
    const auto* row = bias + (task.slot.block.q_begin + i) * strides.query;
#pragma clang loop unroll(disable)
    for (i32 n = 0; n < keys.count; n += L) {
      const i32 lanes = min(L, keys.count - n);
      float elements[L] = {};
      if (strides.key == 1 && lanes == L) {
        store(elements, load_bias_as_float<S.bias, L>(row + n));
      } else {
#pragma clang loop unroll(disable) vectorize(disable)
        for (i32 l = 0; l < lanes; ++l) elements[l] = load_bias_as_float<S.bias>(row + (n + l) * strides.key);
      }
      float* score = &task.scratch.weights[i - queries.begin][n];
      store(score, with_bias<S.bias>(load<Floats<L>>(score), load<Floats<L>>(elements)));
    }
  }
}

/// Scores of the queries [queries.begin, queries.end) become -inf for keys that they do not see. The scores
/// are those of query i0 onwards.
template <KernelSpec S, i32 V>
ATTUNE_HD void mask_keys(const KeyTask<S>& task, i32 i0, QueryRange queries, TileKeys keys) {
  constexpr i32 L = S.lanes;
  const Ints<L> key = lane_numbers<L>() + (task.segment.key + keys.offset);
#pragma clang loop unroll(disable)
  for (i32 i = queries.begin; i < queries.end; ++i) {
#pragma clang loop unroll(full)
    for (i32 v = 0; v < V; ++v) {
      float* score = &task.scratch.weights[i - i0][v * L];
      const Ints<L> seen = visible_lanes<S>(task.window, Ints<L>(i), key + v * L);
      store(score, seen ? load<Floats<L>>(score) : Floats<L>(neg_inf()));
    }
  }
}

/// The group that shares random bits with the segment's first key: its own first key.
template <KernelSpec S>
ATTUNE_HD i32 first_drawn(const KeyTask<S>& task) {
  return task.segment.key / kDropoutGroup * kDropoutGroup;
}

/// 16 random bits for each of the queries and each key of the segment (philox.h). The lanes of a vector are
/// the 4 calls of a group of keys for lanes / 4 queries: of the 16-bit halves of a word, 8 neighbours then
/// belong to 8 neighbouring keys of one query.
template <KernelSpec S>
__attribute__((noinline)) void draw(const KeyTask<S>& task, QueryRange queries) {
  constexpr i32 L = S.lanes;
  const i32 head = head_number(task.params.forward, task.slot);
  const i32 first = first_drawn<S>(task);
  const i32 end = task.segment.key + task.segment.end - task.segment.begin;
  const Ints<L> lane = lane_numbers<L>();
#pragma clang loop unroll(disable)
  for (i32 i = queries.begin; i < queries.end; i += L / 4) {
    const Words<L> query = __builtin_convertvector(lane / 4 + i, Words<L>);
#pragma clang loop unroll(disable)
    for (i32 group = first; group < end; group += kDropoutGroup) {
      const Words<L> call = __builtin_convertvector(lane % 4 + dropout_call(group), Words<L>);
      const Philox<Words<L>> bits =
          dropout_bits(task.params.forward.dropout, task.slot.block.index, head, query, call);
#pragma clang loop unroll(full)
      for (i32 w = 0; w < 4; ++w) {
        u16 halves[L / 4][8];
        store(halves, bits.word[w]);
#pragma clang loop unroll(full)
        for (i32 r = 0; r < L / 4; ++r) {
          u16* random = task.scratch.random[i - queries.begin + r] + group - first + 8 * w;
          __builtin_memcpy(random, halves[r], sizeof halves[r]);
        }
      }
    }
  }
}

/// P Z and dS of the queries and V vectors of keys. Bits were drawn from query `drawn` on.
template <KernelSpec S, i32 V>
ATTUNE_HD void score_gradients(const KeyTask<S>& task, i32 drawn, QueryRange queries, TileKeys keys) {
  constexpr i32 L = S.lanes;
  using F = Floats<L>;
  const DropoutParams& dropout = task.params.forward.dropout;
  const i64 first_number = lse_offset(task.params.forward, task.slot, queries.begin);
  const float* lse2 = task.params.lse2 + first_number;
  const float* delta = task.params.delta + first_number;
#pragma clang loop unroll(disable)
  for (i32 r = 0; r < queries.end - queries.begin; ++r) {
#pragma clang loop unroll(full)
    for (i32 v = 0; v < V; ++v) {
      float* weight = &task.scratch.weights[r][v * L];
      float* grad_score = &task.scratch.grad_scores[r][v * L];
      F grad_weight = load<F>(grad_score);
      Ints<L> keep = Ints<L>(-1);
      if constexpr (S.dropout == Dropout::on) {
        typedef u16 Halves __attribute__((ext_vector_type(L)));
        const u16* row = task.scratch.random[queries.begin - drawn + r];
        const u16* random = row + (task.segment.key + keys.offset - first_drawn(task)) + v * L;
        keep = kept(dropout, __builtin_convertvector(load<Halves>(random), Words<L>), 0);
        grad_weight = keep ? grad_weight * dropout.rescale : F(0.0f);
      }
      PairGradients<L> pair = pair_gradients<L>(load<F>(weight), F(lse2[r]), grad_weight, F(delta[r]));
      if constexpr (S.dropout == Dropout::on) pair.weight = keep ? pair.weight * dropout.rescale : F(0.0f);
      store(weight, pair.weight);
      store(grad_score, pair.grad_score);
    }
  }
}

/// What a register tile of keys adds to the sums: rows of a block's queries, and in scratch the weights and
/// gradients of the scores of each with the keys.
struct TilePairs {
  QueryRange queries;
  Rows query;
  Rows grad_output;
  TileKeys keys;
};

/// Computes weights and gradients of the scores of V vectors of keys with those queries of the block that see
/// them, whose rows are given, and has `sums` add them.
template <KernelSpec S, i32 V, typename Sums>
ATTUNE_HD void add_queries(const KeyTask<S>& task, QueryRange block, Rows query, Rows grad_output,
                           TileKeys keys, Sums& sums) {
  constexpr i32 L = S.lanes;
  const i32 begin = task.segment.key + keys.offset, end = begin + keys.count;
  const i32 len_q = task.slot.block.len_q;
  const QueryRange visiting = visiting_queries<S>(task.window, len_q, begin, end);
  const QueryRange unmasked = unmasked_queries<S>(task.window, len_q, begin, end);
  const QueryRange seeing{max(block.begin, visiting.begin), min(block.end, visiting.end)};
  if (seeing.begin >= seeing.end) return;
  query = slice(query, seeing.begin - block.begin, seeing.end - block.begin);
  grad_output = slice(grad_output, seeing.begin - block.begin, seeing.end - block.begin);

  KeyScratch<S>& scratch = task.scratch;
  const i32 column = task.column + keys.offset;
  multiply<L, S.tile_m, V>(query, column, scratch.key, scratch.weights);
  multiply<L, S.tile_m, V>(grad_output, column, scratch.value, scratch.grad_scores);
  if constexpr (S.bias != Bias::none) add_key_bias<S>(task, seeing, keys);
  mask_keys<S, V>(task, seeing.begin, {seeing.begin, min(seeing.end, unmasked.begin)}, keys);
  mask_keys<S, V>(task, seeing.begin, {max(seeing.begin, unmasked.end), seeing.end}, keys);
  score_gradients<S, V>(task, block.begin, seeing, keys);
  sums.template add<V>(task, TilePairs{seeing, query, grad_output, keys});
}

/// Does so for all keys of the task's segment and those of the queries `some` that see them.
template <KernelSpec S, typename Sums>
ATTUNE_HD void add_segment(const KeyTask<S>& task, QueryRange some, Sums& sums) {
  using T = Element<S.dtype>;
  constexpr i32 kTile = KeyScratch<S>::kTileKeys;
  const BackwardParams& params = task.params;
  const Strides& strides = params.forward.query_strides;
  const Strides& grad_strides = params.grad_output_strides;
  const i64 q_begin = task.slot.block.q_begin;
  const T* query =
      static_cast<const T*>(params.forward.query) + head_offset(task.slot, strides) + q_begin * strides.seq;
  const T* grad_output = static_cast<const T*>(params.grad_output) + head_offset(task.slot, grad_strides) +
                         q_begin * grad_strides.seq;
  const i32 count = task.segment.end - task.segment.begin;
  const QueryRange visiting =
      visiting_queries<S>(task.window, task.slot.block.len_q, task.segment.key, task.segment.key + count);
  const i32 end = min(some.end, visiting.end);
#pragma clang loop unroll(disable)
  for (i32 i0 = max(some.begin, visiting.begin); i0 < end; i0 += S.block_m) {
    const QueryRange block{i0, min(i0 + S.block_m, end)};
    const auto rows_of = [&](const T* data, i64 stride, auto& buffer) {
      return fetch<S.dtype, S.lanes, true>([&](i32 n) { return data + (i0 + n) * stride; }, stride,
                                           block.end - i0, buffer);
    };
    const Rows queries = rows_of(query, strides.seq, task.scratch.query);
    const Rows gradients = rows_of(grad_output, grad_strides.seq, task.scratch.grad_output);
    if constexpr (S.dropout == Dropout::on) draw<S>(task, block);
    i32 n = 0;
#pragma clang loop unroll(disable)
    for (; n + kTile - S.lanes < count; n += kTile) {
      add_queries<S, S.tile_n>(task, block, queries, gradients, {n, min(kTile, count - n)}, sums);
    }
    // What is left, at most tile_n - 1 vectors, goes one by one.
#pragma clang loop unroll(disable)
    for (; n < count; n += S.lanes) {
      add_queries<S, 1>(task, block, queries, gradients, {n, min(S.lanes, count - n)}, sums);
    }
  }
}

/// The first `count` rows of key and value from row `begin` on become columns of the scratch.
template <KernelSpec S>
ATTUNE_HD void load_keys(const ForwardParams& p, const Slot& slot, i32 begin, i32 count,
                         KeyScratch<S>& scratch) {
  using T = Element<S.dtype>;
  const auto load_rows = [&](const void* data, const Strides& strides, float factor, auto& columns) {
    load_transposed<S.dtype, S.lanes>(
        static_cast<const T*>(data) + head_offset(slot, strides) + begin * strides.seq, strides.seq, count,
        factor, columns);
  };
  load_rows(p.key, p.key_strides, p.scale * kLog2e, scratch.key);
  load_rows(p.value, p.value_strides, 1.0f, scratch.value);
}

/// Adds to `sums` what the rows [begin, end) of key and value, a tile, give for one head of the query.
/// within(block) are the queries of a block that count.
template <KernelSpec S, typename Sums, typename Within>
ATTUNE_HD void add_head(const BackwardParams& params, i32 batch, QueryHead head, i32 begin, i32 end,
                        KeyScratch<S>& scratch, Sums& sums, Within&& within) {
  const ForwardParams& p = params.forward;
  const Slot tensor = {.block = {.batch = batch}, .group = head.group, .head = head.head};
  load_keys<S>(p, tensor, begin, end - begin, scratch);
  for_each_segment<S>(p, batch, begin, end, [&](const KeySegment& segment) {
    const KeyTask<S> task{params,
                          segment,
                          slot_of_segment(segment, head),
                          window_of_block<S>(p, segment.block),
                          segment.begin - begin,
                          scratch};
    add_segment<S>(task, within(segment.block), sums);
  });
}

}  // namespace attune::kernel
