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
#include "attune/cuda/key_row_scores.cuh"
#include "attune/cuda/mma_tile.cuh"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/segments.cuh"
#include "attune/cuda/tile.cuh"
#include "attune/params.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
class GradKeyValueMma : KeyRowScores<S> {
  static_assert(S.family == Family::mma && S.dtype != DType::f32);
  using Base = KeyRowScores<S>;
  using Base::begin_, Base::key_tile_, Base::head_, Base::p_, Base::queries_, Base::segment_, Base::tile_,
      Base::value_tile_, Base::window_;
  using Base::kShared, Base::kSharers, Base::kThreads, Base::kPassQueries, Base::kWarpQueries;
  using Base::rows_of, Base::sharer, Base::warp, Base::warp_row;
  using typename Base::GradOutputTile, typename Base::QueryTile, typename Base::Scores;
  static constexpr bool kAdds = S.query_gradient == QueryGradient::atomic;
  static constexpr bool kExchanges = kSharers > 1;
  static constexpr i32 kParts = column_parts(S);
  using ScoreTile = RowTile<S.block_m>;
  using KeyShare = ColumnShare<S.head_dim, kSharers * kParts>;
  using ValueShare = ColumnShare<S.head_dim_v, kSharers * kParts>;

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

 public:
  static ATTUNE_DEVICE void run(const BackwardParams& params, u32 shared) {
    GradKeyValueMma(params, shared).run();
  }

 private:
  ATTUNE_DEVICE GradKeyValueMma(const BackwardParams& params, u32 shared)
      : Base(params, shared, key_slot_of<S>(params, blockIdx.x).begin),
        part_(slot_now().part),
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

  ATTUNE_DEVICE i32 column_group() const { return part_ * kSharers + sharer(); }

  // ---- The walk ----

  ATTUNE_DEVICE void walk(const KeySegment& whole) {
    window_ = window_of_block<S>(p_.forward, whole.block);
    segment_ = seen_part<S>(whole, window_);
    if (segment_.begin >= segment_.end) return;
    queries_ = queries_of_segment();
    if (queries_.begin >= queries_.end) return;
    const KeySlot slot = slot_now();
    head_ = {slot.group, slot.head};
#pragma unroll 1
    do {
      walk_head();
    } while (next_head());
  }

  /// Those that see some key of the segment.
  ATTUNE_DEVICE QueryRange queries_of_segment() const {
    const i32 end = segment_.key + ptx::opaque(segment_.end) - segment_.begin;
    return visiting_queries<S>(Base::window(), segment_.block.len_q, segment_.key, end);
  }

  /// Moves on to the next of the query's heads that share the slot's; false after the last. The same heads as
  /// sharing_head() gives, whose quotients would occupy registers.
  ATTUNE_DEVICE bool next_head() {
    if (p_.key_heads < p_.forward.heads) {
      if (++head_.head < p_.forward.heads) return true;
      head_.head = 0;
    }
    return p_.key_groups < p_.forward.groups && ++head_.group < p_.forward.groups;
  }

  /// Anew for each head: those that share a key need not share the value, nor the other way round.
  ATTUNE_DEVICE void load_keys(const Slot& head) {
    const Strides& key = p_.forward.key_strides;
    const Strides& value = p_.forward.value_strides;
    Base::template load_rows<S.head_dim>(key_tile_, rows_of(p_.forward.key) + head_offset(head, key),
                                         key.seq);
    Base::template load_rows<S.head_dim_v>(value_tile_, rows_of(p_.forward.value) + head_offset(head, value),
                                           value.seq);
  }

  /// Over the queries of one head.
  ATTUNE_DEVICE void walk_head() {
    queries_ = queries_of_segment();  // kept from head to head, its beginning would occupy a register
    const Slot head = Base::head_now();
    const Strides& query = p_.forward.query_strides;
    const Strides& gradient = p_.grad_output_strides;
    const u16* queries =
        rows_of(p_.forward.query) + head_offset(head, query) + head.block.q_begin * query.seq;
    const u16* gradients =
        rows_of(p_.grad_output) + head_offset(head, gradient) + head.block.q_begin * gradient.seq;
    const auto refill = [&](u32 tile, i32 m) {
      const i32 rows = queries_.end - m;
      if (rows > 0) {
        copy_rows<S.block_m, S.head_dim, S.copy_bytes, kThreads>(tile, queries + m * query.seq, query.seq, 0,
                                                                 rows);
        copy_rows<S.block_m, S.head_dim_v, S.copy_bytes, kThreads>(
            tile + kShared.second_ring_offset, gradients + m * gradient.seq, gradient.seq, 0, rows);
        Base::copy_numbers(tile, m, 0, rows);
      }
      ptx::cp_async_commit_group();
    };
    tile_ = ring_;
    __syncthreads();  // the tiles of the head before are no longer read
    load_keys(head);
    refill(tile_, queries_.begin);
#pragma unroll 1
    for (i32 m = queries_.begin; m < queries_.end; m += S.block_m) {
      ptx::cp_async_wait_group<0>();
      await_tile();
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

  /// Until all threads' copies have come.
  ATTUNE_DEVICE void await_tile() const {
    if constexpr (S.blocks == Blocks::dense) return __syncthreads();
    if (__syncthreads_or(Base::copied_void_queries(tile_)) == 0) return;
    Base::clear_void_queries(tile_);
    __syncthreads();
  }

  // ---- One tile of queries ----

  ATTUNE_DEVICE void add_tile(i32 m) {
#pragma unroll 1
    for (i32 pass = 0; pass < kWarpQueries; pass += kPassQueries) {
      const i32 row = sharer() * kWarpQueries + pass;  // the pass's first of the tile
      Scores probabilities, gradients;
      Base::differentiate(probabilities, gradients, m, row);
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
    if (kAdds && p_.query_sums != nullptr) add_query_gradient(m);
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
    float* rows = p_.query_sums + lse_offset(p_.forward, Base::head_now(), m) * S.head_dim;
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
    u16* rows = static_cast<u16*>(tensor) + head_offset(slot, strides) + slot.begin * strides.seq;
    store_rows<S.dtype, Tile, Share, HeadDim, S.copy_bytes>(
        sums, tile, warp_row(), slot.part * kSharers + sharer(), rows, strides.seq, slot.end - slot.begin);
  }

  const i32 part_;  // of the columns
  const u32 gradient_tile_, probability_tile_, ring_;
  float grad_key_[S.tile_m][KeyShare::kPairs * 2][4];
  float grad_value_[S.tile_m][ValueShare::kPairs * 2][4];
};

template <KernelSpec S>
ATTUNE_DEVICE void grad_key_value_mma(const BackwardParams& params) {
  extern __shared__ __align__(128) u8 shared[];
  GradKeyValueMma<S>::run(params, ptx::shared_address(shared));
}

}  // namespace attune::kernel
