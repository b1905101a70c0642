// Gradient of the query on tensor cores for sm_80 and up, f16 and bf16, for runs whose bits repeat
// (QueryGradient::apart): one block owns block_m queries of one head and of their gradient's columns at most
// block_v, and walks over the keys that they see, block_n at a time, like forward:
//
//   S = Q K^T    dP = dO V^T    dQ += dS K
//
// A warp owns 16 * tile_m queries. Its gradient, float32, stays in registers, and the accumulator of dS,
// rounded to 16 bits, is the A fragment of the last product. Pairs of key and value tiles are on a ring of
// `stages` tiles in flight and the one that is read.
//
// Registers of one thread, 255 at most:
//   head dims   tile_m  block_n   dQ   S   dP   sum
//   64 / 64       2       32      64   32  32   128
//   128 / 128     1       64      64   32  32   128
//   256 / 256     1       32     128   16  16   160
#pragma once

#include "attune/backward.h"
#include "attune/cuda/mma_tile.cuh"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/score_bias.cuh"
#include "attune/cuda/score_gradient.cuh"
#include "attune/cuda/shared.h"
#include "attune/cuda/tile.cuh"
#include "attune/params.h"
#include "attune/philox.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
class GradQueryMma {
  static_assert(S.family == Family::mma && S.dtype != DType::f32);
  static_assert(S.block_m == 16 * S.tile_m * S.warps && S.block_n % 16 == 0);
  static_assert(S.dropout == Dropout::off || S.block_n % kDropoutGroup == 0);
  static constexpr GradMmaShared kShared{S};
  static constexpr i32 kThreads = S.warps * kWarpSize;
  static constexpr i32 kWarpRows = 16 * S.tile_m;
  static constexpr i32 kTiles = S.block_n / 8;  // n8 tiles of scores

  using QueryTile = RowTile<S.head_dim>;         // and key tiles
  using GradOutputTile = RowTile<S.head_dim_v>;  // and value tiles
  using Share = ColumnShare<S.head_dim, column_parts(S)>;
  using Scores = float[S.tile_m][kTiles][4];

  template <i32 HeadDim>
  using Source = KeyTileSource<S.keys, S.block_n, HeadDim, S.copy_bytes, kThreads>;

 public:
  static ATTUNE_DEVICE void run(const BackwardParams& params, u32 shared) {
    const Slot slot = slot_of<S>(params.forward, blockIdx.x);
    if (slot.begin < slot.end) GradQueryMma(params, shared, slot).run();
  }

 private:
  ATTUNE_DEVICE GradQueryMma(const BackwardParams& params, u32 shared, const Slot& slot)
      : p_(params.forward),
        gradients_(params),
        slot_(slot),
        window_(window_of_block<S>(params.forward, slot.block)),
        keys_(visited_keys<S>(window_, slot.block.len_k, slot.begin, slot.end)),
        query_tile_(shared),
        grad_output_tile_(shared + kShared.second_offset),
        ring_(shared + kShared.ring_offset) {}

  ATTUNE_DEVICE void run() {
    clear(sums_);
    load_queries();
    walk();
    store(slot_of<S>(p_, ptx::opaque(blockIdx.x)));
  }

  // ---- Places ----

  static ATTUNE_DEVICE i32 warp_row() { return static_cast<i32>(threadIdx.x / kWarpSize) * kWarpRows; }
  /// The row of the slot, and the key of the tile, that element e of an accumulator is of.
  static ATTUNE_DEVICE i32 row_of(i32 m, i32 e) {
    return warp_row() + accumulator_row() + m * 16 + e / 2 * 8;
  }
  static ATTUNE_DEVICE i32 column_of(i32 n, i32 e) { return accumulator_column() + n * 8 + e % 2; }
  static ATTUNE_DEVICE const u16* rows_of(const void* tensor) { return static_cast<const u16*>(tensor); }

  // ---- The walk ----

  ATTUNE_DEVICE void load_queries() {
    const Strides& query = p_.query_strides;
    const Strides& gradient = gradients_.grad_output_strides;
    const i32 first = slot_.block.q_begin + slot_.begin;
    const i32 rows = slot_.end - slot_.begin;
    copy_rows<S.block_m, S.head_dim, S.copy_bytes, kThreads>(
        query_tile_, rows_of(p_.query) + head_offset(slot_, query) + first * query.seq, query.seq, 0, rows);
    copy_rows<S.block_m, S.head_dim_v, S.copy_bytes, kThreads>(
        grad_output_tile_,
        rows_of(gradients_.grad_output) + head_offset(slot_, gradient) + first * gradient.seq, gradient.seq,
        0, rows);
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
      for (i32 half = 0; half < 2; ++half) {
        const i64 number = lse_offset(p_, slot_, min(slot_.begin + row_of(m, half * 2), slot_.end - 1));
        numbers_[m][half] = {gradients_.lse2[number], gradients_.delta[number]};
      }
    }
  }

  ATTUNE_DEVICE void walk() {
    const i32 begin = first_tiled_key<S>(keys_.begin);
    Source<S.head_dim> key(rows_of(p_.key) + head_offset(slot_, p_.key_strides), p_.key_strides.seq,
                           slot_.block.k_begin + begin);
    Source<S.head_dim_v> value(rows_of(p_.value) + head_offset(slot_, p_.value_strides), p_.value_strides.seq,
                               slot_.block.k_begin + begin);
    const auto refill = [&](u32 tile, i32 first) {
      const i32 rows = keys_.end - first;
      if (rows > 0) {
        const auto row_at = [&](i32 row) { return key_row<S>(p_, slot_.block, first + row); };
        const i32 unseen = keys_.begin - first;  // rows before the first key, which may hold NaN
        key.copy(tile, p_.key_strides.seq, rows, S.head_dim, row_at, unseen);
        value.copy(tile + kShared.second_ring_offset, p_.value_strides.seq, rows, S.head_dim_v, row_at,
                   unseen);
      }
      ptx::cp_async_commit_group();
    };
    tile_ = ring_;
    refill(tile_, begin);
#pragma unroll 1
    for (i32 first = begin; first < keys_.end; first += S.block_n) {
      ptx::cp_async_wait_group<0>();
      __syncthreads();
      const u32 next = 2 * ring_ + (kShared.slots - 1) * kShared.slot_bytes - tile_;
      if constexpr (kShared.slots == 2) refill(next, first + S.block_n);
      add_tile(first);
      if constexpr (kShared.slots == 1) {
        __syncthreads();
        refill(next, first + S.block_n);
      }
      tile_ = next;
    }
  }

  /// dQ += dS K for the tile of keys at `first`.
  ATTUNE_DEVICE void add_tile(i32 first) {
    Scores scores, gradients;
    differentiate(scores, gradients, first);
    const i32 part = column_parts(S) == 1 ? 0 : slot_.part;
    const u32 key = rows_first<QueryTile>(tile_, 0, Share::first_chunk(part));
#pragma unroll
    for (i32 step = 0; step < S.block_n / 16; ++step) {
      u32 gradient[S.tile_m][4];
      pack_fragments<S.dtype>(gradient, gradients, step);
      multiply_columns<S.dtype, QueryTile, Share>(sums_, gradient, key, step * 16, part);
    }
  }

  ATTUNE_DEVICE void differentiate(Scores& scores, Scores& gradients, i32 first) const {
    BiasFragments<S> bias;
    if constexpr (S.bias != Bias::none) bias.load(p_, slot_, row_of(0, 0), first, column_of(0, 0));
    clear(scores);
    multiply_rows<S.dtype, QueryTile, ceil_div(S.head_dim, 16)>(
        scores, rows_first<QueryTile>(query_tile_, warp_row(), 0), chunks_first<QueryTile>(tile_, 0, 0));
    clear(gradients);
    multiply_rows<S.dtype, GradOutputTile, ceil_div(S.head_dim_v, 16)>(
        gradients, rows_first<GradOutputTile>(grad_output_tile_, warp_row(), 0),
        chunks_first<GradOutputTile>(tile_ + kShared.second_ring_offset, 0, 0));
    const i32 begin = ptx::opaque(slot_.begin);
    const bool hides = !all_visible<S>(window_, slot_.block.len_k, begin, slot_.end, first);
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
      for (i32 group = 0; group < ceil_div(kTiles, 4); ++group) {
        const KeptPairs<S> kept(p_, slot_, begin + row_of(m, 0), first + column_of(group * 4, 0));
#pragma unroll
        for (i32 n = group * 4; n < min(group * 4 + 4, kTiles); ++n) {
#pragma unroll
          for (i32 e = 0; e < 4; ++e) {
            float element = 0.0f;
            if constexpr (S.bias != Bias::none) element = bias.element(m * 2 + e / 2, n, e % 2);
            differentiate_pair<S>(p_, scores[m][n][e], gradients[m][n][e], numbers_[m][e / 2], element,
                                  kept.kept(n % 4, e));
          }
        }
      }
    }
    if (hides) hide_invisible(gradients, first);
  }

  ATTUNE_DEVICE void hide_invisible(Scores& gradients, i32 first) const {
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
      for (i32 n = 0; n < kTiles; ++n) {
#pragma unroll
        for (i32 e = 0; e < 4; ++e) {
          const i32 query = slot_.begin + row_of(m, e);
          if (!visible<S>(window_, slot_.block.len_k, query, first + column_of(n, e)))
            gradients[m][n][e] = 0.0f;
        }
      }
    }
  }

  // ---- The end ----

  /// Through the warp's own rows of the query tile, so that stores are as wide as the alignment allows.
  ATTUNE_DEVICE void store(const Slot& slot) {
    ptx::cp_async_wait_group<0>();  // a slot that sees no key comes straight from loading its queries
    __syncthreads();
    const Strides& strides = gradients_.grad_query_strides;
    u16* rows = static_cast<u16*>(gradients_.grad_query) + head_offset(slot, strides) +
                (slot.block.q_begin + slot.begin) * strides.seq;
    scale(sums_, p_.scale);
    forget_blind_queries();
    store_rows<S.dtype, QueryTile, Share, S.head_dim, S.copy_bytes>(sums_, query_tile_, warp_row(), slot.part,
                                                                    rows, strides.seq, slot.end - slot.begin);
  }

  /// Queries that see no key have a gradient of 0, whatever that of their output is.
  ATTUNE_DEVICE void forget_blind_queries() {
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
      for (i32 e = 0; e < 4; ++e) {
        if (numbers_[m][e / 2].lse2 != -neg_inf()) continue;
#pragma unroll
        for (i32 n = 0; n < Share::kPairs * 2; ++n) sums_[m][n][e] = 0.0f;
      }
    }
  }

  const ForwardParams& p_;
  const BackwardParams& gradients_;
  const Slot slot_;
  const Window window_;
  const KeyRange keys_;
  const u32 query_tile_, grad_output_tile_, ring_;
  u32 tile_;  // of the ring: the one that is read
  QueryPair numbers_[S.tile_m][2];
  float sums_[S.tile_m][Share::kPairs * 2][4];
};

template <KernelSpec S>
ATTUNE_DEVICE void grad_query_mma(const BackwardParams& params) {
  extern __shared__ __align__(128) u8 shared[];
  GradQueryMma<S>::run(params, ptx::shared_address(shared));
}

}  // namespace attune::kernel
