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
#include "attune/cpu/simd.h"
#include "attune/cpu/softmax.h"
#include "attune/cpu/task.h"
#include "attune/params.h"
#include "attune/semantics.h"

namespace attune::kernel {

/// Rows of float32: a block of keys or values.
struct Rows {
  const float* data;
  i64 stride;
  i32 count;
};

/// Q^T into scratch, times scale * log2(e): scores are then in base 2. Lanes without a query become 0.
template <KernelSpec S>
ATTUNE_HD void load_query(const Element<S.dtype>* query, i64 stride, i32 count, float factor,
                          ForwardScratch<S>& scratch) {
  constexpr i32 L = S.lanes;
  constexpr i32 kWhole = S.head_dim / L * L;
#pragma clang loop unroll(disable)
  for (i32 m = 0; m < count; m += L) {
    const i32 rows = min(L, count - m);
    const Element<S.dtype>* first = query + m * stride;
#pragma clang loop unroll(disable)
    for (i32 c = 0; c < kWhole; c += L) {
      Floats<L> tile[L];
#pragma clang loop unroll(full)
      for (i32 i = 0; i < L; ++i) {
        tile[i] = i < rows ? load_as_float<S.dtype, L>(first + i * stride + c) * factor : Floats<L>(0.0f);
      }
      transpose<L>(tile);
#pragma clang loop unroll(full)
      for (i32 i = 0; i < L; ++i) store(&scratch.query[c + i][m], tile[i]);
    }
#pragma clang loop unroll(disable) vectorize(disable)
    for (i32 c = kWhole; c < S.head_dim; ++c) {
#pragma clang loop unroll(disable) vectorize(disable)
      for (i32 i = 0; i < L; ++i) {
        scratch.query[c][m + i] = i < rows ? load_as_float<S.dtype>(first + i * stride + c) * factor : 0.0f;
      }
    }
  }
}

/// Rows of keys or values of the task's block as float32: in place, or copied into `buffer`.
template <KernelSpec S, i32 kDim>
ATTUNE_HD Rows fetch(const ForwardTask<S>& task, const Element<S.dtype>* data, i64 stride, KeyRange keys,
                     float (*buffer)[kDim]) {
  constexpr i32 L = S.lanes;
  const i32 count = keys.end - keys.begin;
  const auto row_of = [&](i32 j) { return data + key_row<S>(task.params, task.slot.block, j) * stride; };
  if constexpr (!ForwardScratch<S>::kCopied) {
    return {row_of(keys.begin), stride, count};
  } else {
#pragma clang loop unroll(disable)
    for (i32 n = 0; n < count; ++n) {
      const auto* row = row_of(keys.begin + n);
      if constexpr (kDim >= L) {
        for (i32 c = 0; c + L <= kDim; c += L) store(&buffer[n][c], load_as_float<S.dtype, L>(row + c));
        // The last vector overlaps the one before it.
        store(&buffer[n][kDim - L], load_as_float<S.dtype, L>(row + kDim - L));
      } else {
        for (i32 c = 0; c < kDim; ++c) buffer[n][c] = load_as_float<S.dtype>(row + c);
      }
    }
    return {&buffer[0][0], kDim, count};
  }
}

/// S^T of tile_n keys from key n on and V vectors of queries from query m on. Keys beyond the block repeat
/// its last one; their scores are never read.
template <KernelSpec S, i32 V>
__attribute__((noinline)) void score_tile(Rows keys, i32 n, i32 m, ForwardScratch<S>& scratch) {
  using F = Floats<S.lanes>;
  const float* key[S.tile_n];
  F score[S.tile_n][V];
#pragma clang loop unroll(full)
  for (i32 r = 0; r < S.tile_n; ++r) {
    key[r] = keys.data + min(n + r, keys.count - 1) * keys.stride;
#pragma clang loop unroll(full)
    for (i32 v = 0; v < V; ++v) score[r][v] = F(0.0f);
  }
#pragma clang loop unroll_count(2)
  for (i32 c = 0; c < S.head_dim; ++c) {
    F query[V];
#pragma clang loop unroll(full)
    for (i32 v = 0; v < V; ++v) query[v] = load<F>(&scratch.query[c][m + v * S.lanes]);
#pragma clang loop unroll(full)
    for (i32 r = 0; r < S.tile_n; ++r) {
      const F element = F(key[r][c]);
#pragma clang loop unroll(full)
      for (i32 v = 0; v < V; ++v) score[r][v] = fma<S.lanes>(element, query[v], score[r][v]);
    }
  }
#pragma clang loop unroll(full)
  for (i32 r = 0; r < S.tile_n; ++r) {
#pragma clang loop unroll(full)
    for (i32 v = 0; v < V; ++v) store(&scratch.scores[n + r][v * S.lanes], score[r][v]);
  }
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
  const float* row = values.data + c;
#pragma clang loop unroll_count(2)
  for (i32 n = 0; n < values.count; ++n, row += values.stride) {
    F probability[V];
#pragma clang loop unroll(full)
    for (i32 v = 0; v < V; ++v) probability[v] = load<F>(&scratch.scores[n][v * S.lanes]);
#pragma clang loop unroll(full)
    for (i32 r = 0; r < C; ++r) {
      const F element = F(row[r]);
#pragma clang loop unroll(full)
      for (i32 v = 0; v < V; ++v) output[r][v] = fma<S.lanes>(element, probability[v], output[r][v]);
    }
  }
#pragma clang loop unroll(full)
  for (i32 r = 0; r < C; ++r) {
#pragma clang loop unroll(full)
    for (i32 v = 0; v < V; ++v) store(&scratch.output[c + r][m + v * S.lanes], output[r][v]);
  }
}

/// The part of a block's rows that belongs to some of its keys.
ATTUNE_HD Rows slice(Rows rows, KeyRange block, KeyRange part) {
  return {rows.data + (part.begin - block.begin) * rows.stride, rows.stride, part.end - part.begin};
}

/// A block of keys and values for V vectors of queries, which visit only the keys that they see.
template <KernelSpec S, i32 V>
ATTUNE_HD void attend(const ForwardTask<S>& task, KeyRange block, Rows keys, Rows values, Queries queries) {
  const i32 begin = queries.begin, end = queries.begin + queries.count;
  const i32 len_k = task.slot.block.len_k;
  const KeyRange visited = visited_keys<S>(task.window, len_k, begin, end);
  const KeyRange unmasked = unmasked_keys<S>(task.window, len_k, begin, end);
  const KeyRange seen{max(block.begin, visited.begin), min(block.end, visited.end)};
  if (seen.begin >= seen.end) return;
  keys = slice(keys, block, seen);
  values = slice(values, block, seen);

#pragma clang loop unroll(disable)
  for (i32 n = 0; n < keys.count; n += S.tile_n) score_tile<S, V>(keys, n, queries.m, task.scratch);
  if constexpr (S.bias != Bias::none) add_bias<S>(task, queries, seen);
  mask_scores<S, V>(task.window, begin, seen.begin, {seen.begin, min(seen.end, unmasked.begin)},
                    task.scratch);
  mask_scores<S, V>(task.window, begin, seen.begin, {max(seen.begin, unmasked.end), seen.end}, task.scratch);
  softmax_step<S, V>(keys.count, queries.m, task.scratch);
  if constexpr (S.dropout == Dropout::on) drop<S>(task, queries, seen);

  constexpr i32 kWhole = S.head_dim_v / S.tile_n * S.tile_n;
#pragma clang loop unroll(disable)
  for (i32 c = 0; c < kWhole; c += S.tile_n) {
    accumulate_tile<S, V, S.tile_n>(values, c, queries.m, task.scratch);
  }
  if constexpr (kWhole < S.head_dim_v) {
    accumulate_tile<S, V, S.head_dim_v - kWhole>(values, kWhole, queries.m, task.scratch);
  }
}

/// The keys that some query of the task sees. With dropout they begin with a group that shares its bits.
template <KernelSpec S>
ATTUNE_HD KeyRange keys_of(const ForwardTask<S>& task) {
  KeyRange keys = visited_keys<S>(task.window, task.slot.block.len_k, task.slot.begin, task.slot.end);
  if constexpr (S.dropout == Dropout::on) keys.begin = keys.begin / kDropoutGroup * kDropoutGroup;
  return keys;
}

/// What the output's rows are multiplied with, for the vector of queries at m.
template <KernelSpec S>
ATTUNE_HD Floats<S.lanes> output_factor(const ForwardParams& params, i32 m,
                                        const ForwardScratch<S>& scratch) {
  const auto factor = inverse_sum(load<Floats<S.lanes>>(&scratch.row_sum[m]));
  return S.dropout == Dropout::on ? factor * params.dropout.rescale : factor;
}

/// O = O^T transposed, each row divided by its sum.
template <KernelSpec S>
ATTUNE_HD void store_output(const ForwardParams& params, Element<S.output_dtype>* output, i32 count,
                            const ForwardScratch<S>& scratch) {
  const i64 stride = params.output_strides.seq;
  constexpr i32 L = S.lanes;
  constexpr i32 kWhole = S.head_dim_v / L * L;
#pragma clang loop unroll(disable)
  for (i32 m = 0; m < count; m += L) {
    const i32 rows = min(L, count - m);
    const Floats<L> factor = output_factor<S>(params, m, scratch);
#pragma clang loop unroll(disable)
    for (i32 c = 0; c < kWhole; c += L) {
      Floats<L> tile[L];
#pragma clang loop unroll(full)
      for (i32 i = 0; i < L; ++i) tile[i] = load<Floats<L>>(&scratch.output[c + i][m]) * factor;
      transpose<L>(tile);
#pragma clang loop unroll(full)
      for (i32 i = 0; i < L; ++i) {
        if (i < rows) store_as<S.output_dtype, L>(output + (m + i) * stride + c, tile[i]);
      }
    }
#pragma clang loop unroll(disable) vectorize(disable)
    for (i32 c = kWhole; c < S.head_dim_v; ++c) {
#pragma clang loop unroll(disable) vectorize(disable)
      for (i32 i = 0; i < rows; ++i) {
        store_as<S.output_dtype>(output + (m + i) * stride + c, scratch.output[c][m + i] * factor[i]);
      }
    }
  }
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
  const ForwardTask<S> task{params, slot, window_of_block<S>(params, slot.block),
                            *static_cast<ForwardScratch<S>*>(memory)};
  ForwardScratch<S>& scratch = task.scratch;
  const i32 count = slot.end - slot.begin;
  const i64 first_row = slot.block.q_begin + slot.begin;
  const T* query = static_cast<const T*>(params.query) + head_offset(slot, params.query_strides);
  const T* key = static_cast<const T*>(params.key) + head_offset(slot, params.key_strides);
  const T* value = static_cast<const T*>(params.value) + head_offset(slot, params.value_strides);
  auto* output =
      static_cast<Element<S.output_dtype>*>(params.output) + head_offset(slot, params.output_strides);

  clear(scratch);
  load_query<S>(query + first_row * params.query_strides.seq, params.query_strides.seq, count,
                params.scale * kLog2e, scratch);

  const KeyRange all = keys_of<S>(task);
#pragma clang loop unroll(disable)
  for (i32 n0 = all.begin; n0 < all.end; n0 += S.block_n) {
    const KeyRange block{n0, min(n0 + S.block_n, all.end)};
    const Rows keys = fetch<S>(task, key, params.key_strides.seq, block, scratch.key);
    const Rows values = fetch<S>(task, value, params.value_strides.seq, block, scratch.value);
    i32 m = 0;
#pragma clang loop unroll(disable)
    for (; m + (S.tile_m - 1) * S.lanes < count; m += S.tile_m * S.lanes) {
      attend<S, S.tile_m>(task, block, keys, values, {slot.begin + m, min(S.tile_m * S.lanes, count - m), m});
    }
    // What is left, at most tile_m - 1 vectors, goes one by one.
#pragma clang loop unroll(disable)
    for (; m < count; m += S.lanes) {
      attend<S, 1>(task, block, keys, values, {slot.begin + m, min(S.lanes, count - m), m});
    }
  }

  store_output<S>(params, output + first_row * params.output_strides.seq, count, scratch);
  if constexpr (S.lse == Lse::write) {
    store_lse<S>(params.lse + lse_offset(params, slot, slot.begin), count, scratch);
  }
}

}  // namespace attune::kernel
