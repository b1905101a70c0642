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
// padding; and any stride will do. 16-bit keys and values are widened a block at a time.
#pragma once

#include "attune/blocks.h"
#include "attune/cpu/simd.h"
#include "attune/params.h"
#include "attune/semantics.h"

namespace attune::kernel {

/// What a task keeps in memory; lives in the level-1 cache.
template <KernelSpec S>
struct alignas(64) ForwardScratch {
  static_assert(S.head_dim >= 1 && S.head_dim <= kMaxHeadDim && S.head_dim_v >= 1 &&
                    S.head_dim_v <= kMaxHeadDim,
                "head dims are 1 to 512");
  static_assert(S.block_m % (S.lanes * S.tile_m) == 0, "a block holds whole register tiles of queries");
  static_assert(S.block_n % S.tile_n == 0, "a block holds whole register tiles of keys");
  static constexpr i32 kTileQueries = S.lanes * S.tile_m;
  static constexpr i32 kWidenedRows = S.dtype == DType::f32 ? 1 : S.block_n;  // float32 is read in place

  float query[S.head_dim][S.block_m];
  float scores[S.block_n][kTileQueries];  // of one register tile of queries; then probabilities
  float output[S.head_dim_v][S.block_m];
  float row_max[S.block_m];
  float row_sum[S.block_m];
  float rescale[kTileQueries];
  float key[kWidenedRows][S.head_dim];
  float value[kWidenedRows][S.head_dim_v];
};

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

/// Rows of a tensor as float32: in place, or widened into `buffer`.
template <DType D, i32 L, i32 kDim>
ATTUNE_HD Rows widen(const Element<D>* data, i64 stride, i32 count, float (*buffer)[kDim]) {
  if constexpr (D == DType::f32) {
    return {data, stride, count};
  } else {
#pragma clang loop unroll(disable)
    for (i32 n = 0; n < count; ++n) {
      const Element<D>* row = data + n * stride;
      if constexpr (kDim >= L) {
        for (i32 c = 0; c + L <= kDim; c += L) store(&buffer[n][c], load_as_float<D, L>(row + c));
        // The last vector overlaps the one before it.
        store(&buffer[n][kDim - L], load_as_float<D, L>(row + kDim - L));
      } else {
        for (i32 c = 0; c < kDim; ++c) buffer[n][c] = load_as_float<D>(row + c);
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

/// Scores of the keys [begin, end) become -inf for queries that do not see the key. The scores are those of
/// key j0 and query i0 onwards.
template <KernelSpec S, i32 V>
ATTUNE_HD void mask_scores(Window window, i32 i0, i32 j0, KeyRange keys, ForwardScratch<S>& scratch) {
  constexpr i32 L = S.lanes;
  Ints<L> lane;
  for (i32 i = 0; i < L; ++i) lane[i] = i;
#pragma clang loop unroll(disable)
  for (i32 j = keys.begin; j < keys.end; ++j) {
#pragma clang loop unroll(full)
    for (i32 v = 0; v < V; ++v) {
      float* score = &scratch.scores[j - j0][v * L];
      const Ints<L> seen = visible_lanes<S>(window, lane + (i0 + v * L), j);
      store(score, seen ? load<Floats<L>>(score) : Floats<L>(neg_inf()));
    }
  }
}

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

/// A block of keys and values for the queries [begin, begin + count), V vectors of them, which are columns m
/// onwards of the scratch. Each register tile of queries visits only the keys that it sees itself.
template <KernelSpec S, i32 V>
ATTUNE_HD void attend(Window window, i32 len_k, KeyRange block, Rows keys, Rows values, i32 begin, i32 count,
                      i32 m, ForwardScratch<S>& scratch) {
  const KeyRange visited = visited_keys<S>(window, len_k, begin, begin + count);
  const KeyRange unmasked = unmasked_keys<S>(window, len_k, begin, begin + count);
  const KeyRange seen{max(block.begin, visited.begin), min(block.end, visited.end)};
  if (seen.begin >= seen.end) return;
  keys = slice(keys, block, seen);
  values = slice(values, block, seen);

#pragma clang loop unroll(disable)
  for (i32 n = 0; n < keys.count; n += S.tile_n) score_tile<S, V>(keys, n, m, scratch);
  mask_scores<S, V>(window, begin, seen.begin, {seen.begin, min(seen.end, unmasked.begin)}, scratch);
  mask_scores<S, V>(window, begin, seen.begin, {max(seen.begin, unmasked.end), seen.end}, scratch);
  softmax_step<S, V>(keys.count, m, scratch);

  constexpr i32 kWhole = S.head_dim_v / S.tile_n * S.tile_n;
#pragma clang loop unroll(disable)
  for (i32 c = 0; c < kWhole; c += S.tile_n) accumulate_tile<S, V, S.tile_n>(values, c, m, scratch);
  if constexpr (kWhole < S.head_dim_v) {
    accumulate_tile<S, V, S.head_dim_v - kWhole>(values, kWhole, m, scratch);
  }
}

/// O = O^T transposed, each row divided by its sum.
template <KernelSpec S>
ATTUNE_HD void store_output(Element<S.output_dtype>* output, i64 stride, i32 count,
                            const ForwardScratch<S>& scratch) {
  constexpr i32 L = S.lanes;
  constexpr i32 kWhole = S.head_dim_v / L * L;
#pragma clang loop unroll(disable)
  for (i32 m = 0; m < count; m += L) {
    const i32 rows = min(L, count - m);
    const Floats<L> factor = inverse_sum(load<Floats<L>>(&scratch.row_sum[m]));
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
  auto& scratch = *static_cast<ForwardScratch<S>*>(memory);
  const Window window = window_of_block<S>(params, slot.block);
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

  const KeyRange visited = visited_keys<S>(window, slot.block.len_k, slot.begin, slot.end);
#pragma clang loop unroll(disable)
  for (i32 n0 = visited.begin; n0 < visited.end; n0 += S.block_n) {
    const KeyRange block{n0, min(n0 + S.block_n, visited.end)};
    const i32 rows = block.end - block.begin;
    const i64 key_row = slot.block.k_begin + n0;
    const Rows keys = widen<S.dtype, S.lanes>(key + key_row * params.key_strides.seq, params.key_strides.seq,
                                              rows, scratch.key);
    const Rows values = widen<S.dtype, S.lanes>(value + key_row * params.value_strides.seq,
                                                params.value_strides.seq, rows, scratch.value);
    i32 m = 0;
#pragma clang loop unroll(disable)
    for (; m + (S.tile_m - 1) * S.lanes < count; m += S.tile_m * S.lanes) {
      attend<S, S.tile_m>(window, slot.block.len_k, block, keys, values, slot.begin + m,
                          min(S.tile_m * S.lanes, count - m), m, scratch);
    }
    // What is left, at most tile_m - 1 vectors, goes one by one.
#pragma clang loop unroll(disable)
    for (; m < count; m += S.lanes) {
      attend<S, 1>(window, slot.block.len_k, block, keys, values, slot.begin + m, min(S.lanes, count - m), m,
                   scratch);
    }
  }

  store_output<S>(output + first_row * params.output_strides.seq, params.output_strides.seq, count, scratch);
  if constexpr (S.lse == Lse::write) {
    store_lse<S>(params.lse + lse_offset(params, slot, slot.begin), count, scratch);
  }
}

}  // namespace attune::kernel
