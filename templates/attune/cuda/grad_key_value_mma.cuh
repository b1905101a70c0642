// Gradients of key and value on tensor cores for sm_80 and up, f16 and bf16 (FlashAttention-2's backward
// loop, Dao, arXiv 2307.08691, with the scores transposed).
//
// One block owns block_n rows of key and value, and of the columns of their gradients at most block_v. It
// walks over the queries that see them, block_m at a time, of every sequence and head that the rows are keys
// of. Rows of all products are keys:
//
//   S^T = K Q^T    dP^T = V dO^T    dV += P^T dO    dK += dS^T Q
//
// so that the gradients, float32, stay in the registers of the warps that own their rows during the whole
// walk, and the accumulators of P^T and dS^T, rounded to 16 bits, are the A fragments of the last two.
//
// 16 * tile_m rows belong to one warp, or to several where the gradients are too wide for its registers.
// Those share out the queries for the first two products and the columns for the last two, and pass P^T and
// dS^T through shared memory. dS^T also goes there for dQ = dS K, a product over all keys of the block, which
// is added to float32 sums in memory (QueryGradient::atomic).
//
// Registers of one thread, 255 at most (dK, dV: gradients; S, dP: 16 * tile_m x 8 * tile_n scores each; dQ is
// there when scores are not):
//   head dims   block_n  warps  tile_m  tile_n   dK   dV   S   dP   sum
//   64 / 64       128      4      2       4      64   64   32   32  192
//   128 / 128     128      8      2       4      64   64   32   32  192
//   256 / 256      64      8      2       2      64   64   16   16  160
#pragma once

#include "attune/backward.h"
#include "attune/cuda/mma_tile.cuh"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/score_gradient.cuh"
#include "attune/cuda/segments.cuh"
#include "attune/cuda/shared.h"
#include "attune/cuda/tile.cuh"
#include "attune/cuda/vector.cuh"
#include "attune/num.h"
#include "attune/params.h"
#include "attune/philox.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
class GradKeyValueMma {
  static_assert(S.family == Family::mma && S.dtype != DType::f32);
  static constexpr GradMmaShared kShared{S};
  static constexpr i32 kThreads = S.warps * kWarpSize;
  static constexpr i32 kWarpRows = 16 * S.tile_m;
  static constexpr i32 kRowGroups = S.block_n / kWarpRows;   // of warps with the same rows
  static constexpr i32 kSharers = S.warps / kRowGroups;      // warps of such a group
  static constexpr i32 kWarpQueries = S.block_m / kSharers;  // whose scores a warp computes,
  static constexpr i32 kPassQueries = 8 * S.tile_n;          // so many at a time
  static constexpr bool kAdds = S.query_gradient == QueryGradient::atomic;
  static constexpr bool kExchanges = kSharers > 1;
  static constexpr i32 kParts = column_parts(S);
  static_assert(S.block_n % kWarpRows == 0 && S.warps % kRowGroups == 0);
  static_assert(bit_ceil(S.block_m) == S.block_m && bit_ceil(kSharers) == kSharers);
  static_assert(kWarpQueries % kPassQueries == 0 && S.tile_n % 2 == 0);
  static_assert(S.dropout == Dropout::off || kWarpRows == kDropoutGroup);

  using QueryTile = RowTile<S.head_dim>;         // and key tiles
  using GradOutputTile = RowTile<S.head_dim_v>;  // and value tiles
  using ScoreTile = RowTile<S.block_m>;
  using KeyShare = ColumnShare<S.head_dim, kSharers * kParts>;
  using ValueShare = ColumnShare<S.head_dim_v, kSharers * kParts>;
  using Scores = float[S.tile_m][S.tile_n][4];

  // dQ: of block_m queries by the part's columns, a warp computes a rectangle that is about square, in steps
  // that leave it few enough registers.
  static constexpr i32 query_row_groups() {
    i32 groups = 1;
    while (groups * 2 <= S.warps && S.block_m % (groups * 32) == 0 &&
           S.block_m / groups > S.head_dim / kParts * groups / S.warps) {
      groups *= 2;
    }
    return groups;
  }
  static constexpr i32 kQueryRowGroups = query_row_groups();
  static constexpr i32 kQueryFragments = S.block_m / kQueryRowGroups / 16;
  static constexpr i32 kQuerySharers = S.warps / kQueryRowGroups;
  static constexpr i32 query_steps() {
    i32 steps = 1;
    while (ColumnShare<S.head_dim, kQuerySharers * kParts>::kPairs * kQueryFragments > 4 * steps) steps *= 2;
    return steps;
  }
  static constexpr i32 kQuerySteps = query_steps();
  using QueryShare = ColumnShare<S.head_dim, kQuerySharers * kParts * kQuerySteps>;

  template <i32 HeadDim>
  using Source = TileSource<S.block_m, HeadDim, S.copy_bytes, kThreads>;

 public:
  static ATTUNE_DEVICE void run(const BackwardParams& params, u32 shared) {
    GradKeyValueMma(params, shared).run();
  }

 private:
  ATTUNE_DEVICE GradKeyValueMma(const BackwardParams& params, u32 shared)
      : p_(params),
        begin_(slot_now().begin),
        part_(slot_now().part),
        key_tile_(shared),
        value_tile_(shared + kShared.second_offset),
        gradient_tile_(shared + kShared.gradient_offset),
        probability_tile_(shared + kShared.probability_offset),
        ring_(shared + kShared.ring_offset) {}

  ATTUNE_DEVICE void run() {
    clear(grad_key_);
    clear(grad_value_);
    for_each_segment_of_block<S>(p_.forward, slot_now().batch, begin_,
                                 min(begin_ + S.block_n, p_.forward.len_k),
                                 [&](const KeySegment& segment) { walk(segment); });
    store(slot_now());
  }

  // ---- Places ----

  /// The slot, computed anew where it is asked for: kept through the walk it would occupy registers.
  ATTUNE_DEVICE KeySlot slot_now() const { return key_slot_of<S>(p_, ptx::opaque(blockIdx.x)); }

  static ATTUNE_DEVICE i32 warp() { return static_cast<i32>(threadIdx.x / kWarpSize); }
  /// The warp's number among those of its rows.
  static ATTUNE_DEVICE i32 sharer() { return warp() % kSharers; }
  static ATTUNE_DEVICE i32 warp_row() { return warp() / kSharers * kWarpRows; }
  ATTUNE_DEVICE i32 column_group() const { return part_ * kSharers + sharer(); }
  /// The tile's row that element e of fragment m is of, and the query of the pass for n8 tile n.
  static ATTUNE_DEVICE i32 row_of(i32 m, i32 e) {
    return warp_row() + accumulator_row() + m * 16 + e / 2 * 8;
  }
  static ATTUNE_DEVICE i32 column_of(i32 n, i32 e) { return accumulator_column() + n * 8 + e % 2; }
  static ATTUNE_DEVICE const u16* rows_of(const void* tensor) { return static_cast<const u16*>(tensor); }

  // ---- The walk ----

  /// The keys of the segment that some query of its block sees: what is in others, NaN included, is not read.
  ATTUNE_DEVICE KeySegment seen_part(KeySegment segment) const {
    const Block& block = segment.block;
    const KeyRange seen = visited_keys<S>(window_, block.len_k, 0, block.len_q);
    const i32 shift = segment.begin - segment.key;
    segment.begin = max(segment.begin, seen.begin + shift);
    segment.end = min(segment.end, seen.end + shift);
    segment.key = segment.begin - shift;
    return segment;
  }

  ATTUNE_DEVICE void walk(const KeySegment& whole) {
    window_ = window_of_block<S>(p_.forward, whole.block);
    segment_ = seen_part(whole);
    const i32 keys = segment_.end - segment_.begin;
    if (keys <= 0) return;
    queries_ = visiting_queries<S>(window_, segment_.block.len_q, segment_.key, segment_.key + keys);
    if (queries_.begin >= queries_.end) return;
    __syncthreads();  // the tiles of the segment before are no longer read
    load_rows<S.head_dim>(key_tile_, p_.forward.key, p_.forward.key_strides);
    load_rows<S.head_dim_v>(value_tile_, p_.forward.value, p_.forward.value_strides);
#pragma unroll 1
    for (i32 number = 0; number < sharing_heads(p_); ++number) {
      Slot head = slot_of_segment(segment_, sharing_head(p_, slot_now(), number));
      head.block.batch = ptx::opaque(head.block.batch);  // likewise
      walk(head);
    }
  }

  /// Fills a tile with the segment's rows, and zeros.
  template <i32 HeadDim>
  ATTUNE_DEVICE void load_rows(u32 tile, const void* tensor, const Strides& strides) const {
    const KeySlot slot = slot_now();
    const u16* rows = rows_of(tensor) + slot.batch * strides.batch + slot.group * strides.group +
                      slot.head * strides.head + slot.begin * strides.seq;
    copy_rows<S.block_n, HeadDim, S.copy_bytes, kThreads>(tile, rows, strides.seq, segment_.begin - begin_,
                                                          segment_.end - begin_);
  }

  /// Over the queries of one head.
  ATTUNE_DEVICE void walk(const Slot& head) {
    const i32 first = head.block.q_begin + queries_.begin;
    Source<S.head_dim> query(rows_of(p_.forward.query) + head_offset(head, p_.forward.query_strides),
                             p_.forward.query_strides.seq, first);
    Source<S.head_dim_v> grad_output(rows_of(p_.grad_output) + head_offset(head, p_.grad_output_strides),
                                     p_.grad_output_strides.seq, first);
    numbers_ = lse_offset(p_.forward, head, 0);
    head_ = head_number(p_.forward, head);
    bias_offset_ =
        head_offset(head, p_.forward.bias_strides) + head.block.q_begin * p_.forward.bias_strides.query;
    const auto refill = [&](u32 tile, i32 m) {
      const i32 rows = queries_.end - m;
      if (rows > 0) {
        query.copy(tile, p_.forward.query_strides.seq, rows, S.head_dim);
        grad_output.copy(tile + kShared.second_ring_offset, p_.grad_output_strides.seq, rows, S.head_dim_v);
        copy_numbers(tile + kShared.numbers_offset, numbers_ + m, rows);
      }
      ptx::cp_async_commit_group();
    };
    tile_ = ring_;
    __syncthreads();  // the tiles of the head before are no longer read
    refill(tile_, queries_.begin);
#pragma unroll 1
    for (i32 m = queries_.begin; m < queries_.end; m += S.block_m) {
      ptx::cp_async_wait_group<0>();
      __syncthreads();
      const u32 next = 2 * ring_ + (kShared.slots - 1) * kShared.slot_bytes - tile_;
      if constexpr (kShared.slots == 2) refill(next, m + S.block_m);
      add_tile(m);
      if constexpr (kShared.slots == 1) {
        __syncthreads();
        refill(next, m + S.block_m);
      }
      tile_ = next;
    }
  }

  /// lse2 and delta of the tile's queries, side by side. Those past the last become 0, like their rows of
  /// query and gradient, so nothing is added for them.
  ATTUNE_DEVICE void copy_numbers(u32 destination, i64 first, i32 valid) const {
#pragma unroll
    for (i32 index = 0; index < ceil_div(2 * S.block_m, kThreads); ++index) {
      const i32 at = static_cast<i32>(threadIdx.x) + index * kThreads;
      if (2 * S.block_m % kThreads != 0 && at >= 2 * S.block_m) break;
      const i32 row = at % S.block_m;
      const float* source = (at < S.block_m ? p_.lse2 : p_.delta) + first + row;
      ptx::cp_async<4>(destination + row * 8 + at / S.block_m * 4, source, row < valid ? 4 : 0);
    }
  }

  // ---- One tile of queries ----

  ATTUNE_DEVICE void add_tile(i32 m) {
#pragma unroll 1
    for (i32 pass = 0; pass < kWarpQueries; pass += kPassQueries) {
      const i32 row = sharer() * kWarpQueries + pass;  // the pass's first of the tile
      Scores probabilities, gradients;
      differentiate(probabilities, gradients, m, row);
#pragma unroll
      for (i32 step = 0; step < S.tile_n / 2; ++step) {
        u32 probability[S.tile_m][4];
        u32 gradient[S.tile_m][4];
        pack_fragments<S.dtype>(probability, probabilities, step);
        pack_fragments<S.dtype>(gradient, gradients, step);
        const i32 chunk = row / kChunkElements + step * 2;
        if constexpr (kExchanges) {
          store_fragments<ScoreTile>(probability_tile_, warp_row(), chunk, probability);
          store_fragments<ScoreTile>(gradient_tile_, warp_row(), chunk, gradient);
        } else {
          if constexpr (kAdds) store_fragments<ScoreTile>(gradient_tile_, warp_row(), chunk, gradient);
          multiply(probability, gradient, row + step * 16);
        }
      }
    }
    if constexpr (kExchanges || kAdds) __syncthreads();
    if constexpr (kExchanges) {
#pragma unroll
      for (i32 step = 0; step < S.block_m / 16; ++step) {
        u32 probability[S.tile_m][4];
        u32 gradient[S.tile_m][4];
        load_fragments(probability, probability_tile_, step);
        load_fragments(gradient, gradient_tile_, step);
        multiply(probability, gradient, step * 16);
      }
    }
    if constexpr (kAdds) add_query_gradient(m);
  }

  /// The probabilities of the warp's keys for a pass of queries, those that dropout drops 0, and the
  /// gradients of the scores.
  ATTUNE_DEVICE void differentiate(Scores& probabilities, Scores& gradients, i32 m, i32 row) const {
    Scores elements;
    if constexpr (S.bias != Bias::none) load_bias_elements(elements, m + row);
    clear(probabilities);
    multiply_rows<S.dtype, QueryTile, ceil_div(S.head_dim, 16)>(
        probabilities, rows_first<QueryTile>(key_tile_, warp_row(), 0),
        chunks_first<QueryTile>(tile_, row, 0));
    clear(gradients);
    multiply_rows<S.dtype, GradOutputTile, ceil_div(S.head_dim_v, 16)>(
        gradients, rows_first<GradOutputTile>(value_tile_, warp_row(), 0),
        chunks_first<GradOutputTile>(tile_ + kShared.second_ring_offset, row, 0));
#pragma unroll
    for (i32 n = 0; n < S.tile_n; ++n) {
      const ptx::Chunk numbers =
          ptx::ld_shared_v4(tile_ + kShared.numbers_offset + (row + column_of(n, 0)) * 8);
      const KeptKeys kept = kept_keys(m + row + column_of(n, 0));
#pragma unroll
      for (i32 i = 0; i < S.tile_m; ++i) {
#pragma unroll
        for (i32 e = 0; e < 4; ++e) {
          const QueryPair pair{float_of(numbers.word[e % 2 * 2]), float_of(numbers.word[e % 2 * 2 + 1])};
          differentiate_pair<S>(p_.forward, probabilities[i][n][e], gradients[i][n][e], pair,
                                elements[i][n][e], kept.kept(e % 2, i * 2 + e / 2));
        }
      }
    }
    if (!all_visible(m)) hide_invisible(probabilities, gradients, m + row);
  }

  /// Which of the thread's keys are kept for `query` and the next.
  ATTUNE_DEVICE KeptKeys kept_keys(i32 query) const {
    const DropoutParams& dropout = p_.forward.dropout;
    const i32 key = key_of(row_of(0, 0));
    if constexpr (S.dropout == Dropout::off) {
      return KeptKeys(dropout);
    } else if constexpr (S.blocks == Blocks::dense) {
      return KeptKeys::of_group(dropout, segment_.block.index, head_, query, key);
    } else {
      return KeptKeys::of_any<S.block_n>(dropout, segment_.block.index, head_, query, key);
    }
  }

  /// The elements of the bias tensor for the queries from `query` on. Past the last query or key the last one
  /// is read again: those scores are hidden.
  ATTUNE_DEVICE void load_bias_elements(Scores& elements, i32 query) const {
    constexpr i32 kBytes = size_of(S.bias);
    const BiasStrides& strides = p_.forward.bias_strides;
    const u8* base = static_cast<const u8*>(p_.forward.bias) + bias_offset_ * kBytes;
#pragma unroll
    for (i32 n = 0; n < S.tile_n; ++n) {
#pragma unroll
      for (i32 e = 0; e < 4; ++e) {
        const u8* column = base + min(query + column_of(n, e), queries_.end - 1) * strides.query * kBytes;
#pragma unroll
        for (i32 i = 0; i < S.tile_m; ++i) {
          const i32 row = clamp(begin_ + row_of(i, e), segment_.begin, segment_.end - 1);
          elements[i][n][e] = load_bias<S.bias>(column + row * strides.key * kBytes);
        }
      }
    }
  }

  /// The key of the segment's block that a row of the tile is, if it is one of the segment.
  ATTUNE_DEVICE i32 key_of(i32 row) const {
    return begin_ + row - segment_.begin + segment_.key;
  }

  /// Are the tile's rows the segment's, and does every query of the tile at m see them all?
  ATTUNE_DEVICE bool all_visible(i32 m) const {
    if (segment_.end - segment_.begin < S.block_n) return false;
    const QueryRange unmasked =
        unmasked_queries<S>(window_, segment_.block.len_q, segment_.key, segment_.key + S.block_n);
    return unmasked.begin <= m && m + S.block_m <= unmasked.end;
  }

  ATTUNE_DEVICE void hide_invisible(Scores& probabilities, Scores& gradients, i32 m) const {
#pragma unroll
    for (i32 i = 0; i < S.tile_m; ++i) {
#pragma unroll
      for (i32 n = 0; n < S.tile_n; ++n) {
#pragma unroll
        for (i32 e = 0; e < 4; ++e) {
          const i32 row = begin_ + row_of(i, e);
          const i32 query = m + column_of(n, e);
          if (row < segment_.begin || row >= segment_.end || query >= queries_.end ||
              !visible<S>(window_, segment_.block.len_k, query, key_of(row_of(i, e)))) {
            probabilities[i][n][e] = 0.0f;
            gradients[i][n][e] = 0.0f;
          }
        }
      }
    }
  }

  static ATTUNE_DEVICE void load_fragments(u32 (&a)[S.tile_m][4], u32 tile, i32 step) {
    const u32 origin = rows_first<ScoreTile>(tile, warp_row(), 0);
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) ptx::ldmatrix_x4(a[m], ScoreTile::moved(origin, m * 16, step * 2));
  }

  /// dV += P^T dO and dK += dS^T Q for 16 queries from `row` of the tile on.
  ATTUNE_DEVICE void multiply(const u32 (&probability)[S.tile_m][4], const u32 (&gradient)[S.tile_m][4],
                              i32 row) {
    const i32 chunk = ValueShare::first_chunk(column_group());
    multiply_columns<S.dtype, GradOutputTile, ValueShare>(
        grad_value_, probability,
        rows_first<GradOutputTile>(tile_ + kShared.second_ring_offset, 0, chunk) +
            row * GradOutputTile::kRowBytes,
        0, column_group());
    multiply_columns<S.dtype, QueryTile, KeyShare>(
        grad_key_, gradient, rows_first<QueryTile>(tile_, 0, chunk) + row * QueryTile::kRowBytes, 0,
        column_group());
  }

  /// dQ of the tile at m, over the keys of the block, is added to the sums in memory.
  ATTUNE_DEVICE void add_query_gradient(i32 m) {
    const i32 row = warp() / kQuerySharers * (kQueryFragments * 16);
#pragma unroll 1
    for (i32 part = 0; part < kQuerySteps; ++part) {
      const i32 group = (part * kParts + part_) * kQuerySharers + warp() % kQuerySharers;
      const u32 gradient = chunks_first<ScoreTile>(gradient_tile_, 0, row / kChunkElements);
      const u32 key = rows_first<QueryTile>(key_tile_, 0, QueryShare::first_chunk(group));
      float sums[kQueryFragments][QueryShare::kPairs * 2][4];
      clear(sums);
#pragma unroll
      for (i32 step = 0; step < S.block_n / 16; ++step) {
        u32 a[kQueryFragments][4];
#pragma unroll
        for (i32 i = 0; i < kQueryFragments; ++i) {
          ptx::ldmatrix_x4_trans(a[i], ScoreTile::moved(gradient, step * 16, i * 2));
        }
        multiply_columns<S.dtype, QueryTile, QueryShare>(sums, a, key, step * 16, group);
      }
      add_to_memory(sums, m + row, group);
    }
  }

  ATTUNE_DEVICE void add_to_memory(const float (&sums)[kQueryFragments][QueryShare::kPairs * 2][4], i32 m,
                                   i32 group) const {
    float* rows = p_.query_sums + (numbers_ + m) * S.head_dim;
#pragma unroll
    for (i32 i = 0; i < kQueryFragments; ++i) {
#pragma unroll
      for (i32 half = 0; half < 2; ++half) {
        const i32 row = accumulator_row() + i * 16 + half * 8;
        if (m + row >= queries_.end) continue;
#pragma unroll
        for (i32 n = 0; n < QueryShare::kPairs * 2; ++n) {
          if (!QueryShare::has(group, n / 2)) continue;
          const i32 column = QueryShare::column(group, n / 2) + n % 2 * 8 + accumulator_column();
          add_pair<S.head_dim>(rows + row * S.head_dim + column, sums[i][n][half * 2],
                               sums[i][n][half * 2 + 1], S.head_dim - column);
        }
      }
    }
  }

  // ---- The end ----

  ATTUNE_DEVICE void store(const KeySlot& slot) {
    __syncthreads();  // the tiles of key and value are no longer read: results leave through them
    scale(grad_key_, p_.forward.scale);
    if constexpr (S.dropout == Dropout::on) scale(grad_value_, p_.forward.dropout.rescale);
    store<QueryTile, KeyShare, S.head_dim>(slot, grad_key_, key_tile_, p_.grad_key, p_.grad_key_strides);
    store<GradOutputTile, ValueShare, S.head_dim_v>(slot, grad_value_, value_tile_, p_.grad_value,
                                                    p_.grad_value_strides);
  }

  template <typename Tile, typename Share, i32 HeadDim>
  static ATTUNE_DEVICE void store(const KeySlot& slot, const float (&sums)[S.tile_m][Share::kPairs * 2][4],
                                  u32 tile, void* tensor, const Strides& strides) {
    if (tensor == nullptr) return;
    u16* rows = static_cast<u16*>(tensor) + slot.batch * strides.batch + slot.group * strides.group +
                slot.head * strides.head + slot.begin * strides.seq;
    store_rows<S.dtype, Tile, Share, HeadDim, S.copy_bytes>(
        sums, tile, warp_row(), slot.part * kSharers + sharer(), rows, strides.seq, slot.end - slot.begin);
  }

  const BackwardParams& p_;
  const i32 begin_;  // the first row
  const i32 part_;
  const u32 key_tile_, value_tile_, gradient_tile_, probability_tile_, ring_;
  KeySegment segment_;
  Window window_;
  QueryRange queries_;
  i64 numbers_;      // index of the head's first query among lse2, delta and the sums
  i32 head_;         // over all groups
  i64 bias_offset_;  // of the head's first query
  u32 tile_;         // of the ring: the one that is read
  float grad_key_[S.tile_m][KeyShare::kPairs * 2][4];
  float grad_value_[S.tile_m][ValueShare::kPairs * 2][4];
};

template <KernelSpec S>
ATTUNE_DEVICE void grad_key_value_mma(const BackwardParams& params) {
  extern __shared__ __align__(128) u8 shared[];
  GradKeyValueMma<S>::run(params, ptx::shared_address(shared));
}

}  // namespace attune::kernel
