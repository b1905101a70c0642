// The gradients of key and value on ordinary float units: every dtype, every GPU from sm_60 (simt_tile.cuh).
//
// One block computes one slot (backward.h), block_n rows of key and value, and walks over the queries that
// see them, block_m at a time: of every segment that the rows are part of, of every head that shares them.
// Rows of a tile of scores are keys, its columns queries:
//
//   products = V dO^T    scores = K Q^T    dS = P * (Z * products - delta)    dK += dS Q    dV += (P * Z) dO
//
// dS and then P * Z cross from the layout of scores to that of weights through shared memory, inside one
// warp. With two stages the tiles of Q and dO lie side by side; with one they take turns, and dO is loaded
// twice.
//
// Registers of one thread, 255 at most:
//   head dim  tile_m x tile_n   scores, products  sums  operands  sum
//   32            4 x 8              64            64      36     164
//   64            4 x 8              64            64      36     164
//   128           2 x 8              32           128      36     196
//   256           2 x 4              16           128      20     164
//   512           1 x 2               4           128      12     144
//   512           1 x 1               2            64      10      76   (two parts)
#pragma once

#include "attune/backward.h"
#include "attune/blocks.h"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/segments.cuh"
#include "attune/cuda/shared.h"
#include "attune/cuda/simt_scores.cuh"
#include "attune/cuda/simt_tile.cuh"
#include "attune/params.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
class GradKeyValueSimt {
  using Tile = SimtTile<S>;
  using Scores = typename Tile::Scores;
  static constexpr SimtGradKeyValueShared kShared{S};
  static constexpr bool kTakeTurns = S.stages == 1;
  static constexpr i32 kBytes = size_of(S.dtype);
  /// Columns of a row of a result that a block computes.
  template <i32 HeadDim>
  static constexpr i32 kPart = min(S.block_v, HeadDim);
  template <i32 HeadDim>
  using Sums = typename Tile::template Sums<kPart<HeadDim>>;

  static_assert(S.query_gradient == QueryGradient::apart);

 public:
  static ATTUNE_DEVICE void run(const BackwardParams& params, float4* shared) {
    GradKeyValueSimt(params, shared, key_slot_of<S>(params, blockIdx.x)).run();
  }

 private:
  ATTUNE_DEVICE GradKeyValueSimt(const BackwardParams& params, float4* shared, const KeySlot& slot)
      : p_(params),
        slot_(slot),
        key_tile_(shared),
        value_tile_(shared + kShared.value_offset),
        query_tile_(shared + kShared.query_offset),
        grad_output_tile_(shared + kShared.grad_output_offset),
        weight_tile_(shared + kShared.weight_offset) {}

  ATTUNE_DEVICE void run() {
    Tile::clear(key_sums_);
    Tile::clear(value_sums_);
    for_each_segment_of_block<S>(p_.forward, slot_.batch, slot_.begin, slot_.end,
                                 [&](const KeySegment& segment) {
#pragma unroll 1
                                   for (i32 number = 0; number < sharing_heads(p_); ++number) {
                                     add_queries(segment, sharing_head(p_, slot_, number));
                                   }
                                 });
    // Which slot it was is computed anew: kept through the loop it would occupy registers.
    const KeySlot slot = key_slot_of<S>(p_, ptx::opaque(blockIdx.x));
    if (p_.grad_key != nullptr) {
      store<S.head_dim>(slot, p_.grad_key, p_.grad_key_strides, key_sums_, p_.forward.scale);
    }
    if (p_.grad_value != nullptr) {
      store<S.head_dim_v>(slot, p_.grad_value, p_.grad_value_strides, value_sums_, 1.0f);
    }
  }

  /// What the queries of one head add, of the block that the segment is of.
  ATTUNE_DEVICE void add_queries(const KeySegment& segment, const QueryHead& head) {
    const i32 begin = segment.begin - slot_.begin;  // the segment's rows of the tile
    const i32 end = segment.end - slot_.begin;
    SimtScores<S> tile{.slot = slot_of_segment(segment, head),
                       .window = window_of_block<S>(p_.forward, segment.block),
                       .keys = {segment.key, segment.key + end - begin},
                       .query = 0,
                       .key = segment.key - begin};
    const QueryRange queries =
        visiting_queries<S>(tile.window, segment.block.len_q, tile.keys.begin, tile.keys.end);
    if (queries.begin >= queries.end) return;
    tile.slot.begin = queries.begin;
    tile.slot.end = queries.end;
    load_keys<S.head_dim>(key_tile_, p_.forward.key, p_.forward.key_strides, tile.slot, begin, end);
    load_keys<S.head_dim_v>(value_tile_, p_.forward.value, p_.forward.value_strides, tile.slot, begin, end);
#pragma unroll 1
    for (tile.query = queries.begin; tile.query < queries.end; tile.query += S.block_m) add_tile(tile);
  }

  ATTUNE_DEVICE void add_tile(const SimtScores<S>& tile) {
    const bool has_void = S.blocks != Blocks::dense && __syncthreads_or(reads_void_query(tile)) != 0;
    const u64 kept = tile.kept_pairs(p_.forward);
    Scores scores, products;
    load_grad_outputs(tile);
    if constexpr (!kTakeTurns) load_queries(tile);
    Tile::clear(products);
    __syncthreads();
    if (has_void) clear_void<S.head_dim_v>(grad_output_tile_, tile);
    if (!kTakeTurns && has_void) clear_void<S.head_dim>(query_tile_, tile);
    Tile::template multiply<S.head_dim_v>(products, value_tile_, grad_output_tile_);
    if constexpr (kTakeTurns) {
      __syncthreads();
      load_queries(tile);
      __syncthreads();
      if (has_void) clear_void<S.head_dim>(query_tile_, tile);
    }
    Tile::clear(scores);
    Tile::template multiply<S.head_dim>(scores, key_tile_, query_tile_);
    tile.differentiate(scores, products, kept, p_);
    if (p_.grad_key != nullptr) {
      Tile::store_weights(weight_tile_, products);
      __syncwarp();
      accumulate<S.head_dim>(key_sums_, query_tile_);
      __syncwarp();
    }
    if (p_.grad_value != nullptr) {
      if constexpr (kTakeTurns) {
        __syncthreads();
        load_grad_outputs(tile);
        __syncthreads();
        if (has_void) clear_void<S.head_dim_v>(grad_output_tile_, tile);
      }
      Tile::store_weights(weight_tile_, scores);
      __syncwarp();
      accumulate<S.head_dim_v>(value_sums_, grad_output_tile_);
    }
    __syncthreads();
  }

  template <i32 HeadDim>
  ATTUNE_DEVICE void accumulate(Sums<HeadDim>& sums, const float4* tile) const {
    Tile::template accumulate<HeadDim, odd_pitch(HeadDim), kPart<HeadDim>>(sums, weight_tile_, tile,
                                                                           slot_.part * S.block_v);
  }

  // ---- Void queries (backward.h) ----

  ATTUNE_DEVICE bool is_void_row(const SimtScores<S>& tile, i32 row) const {
    const i32 query = tile.query + row;
    return query < tile.slot.end && is_void(p_.lse2[lse_offset(p_.forward, tile.slot, query)]);
  }
  /// Does this thread, which looks at every kThreads-th, find any?
  ATTUNE_DEVICE bool reads_void_query(const SimtScores<S>& tile) const {
    bool found = false;
    for (i32 row = static_cast<i32>(threadIdx.x); row < S.block_m; row += Tile::kThreads) {
      found |= is_void_row(tile, row);
    }
    return found;
  }
  /// Their rows of a tile become zeros.
  template <i32 HeadDim>
  ATTUNE_DEVICE void clear_void(float4* shared, const SimtScores<S>& tile) const {
    constexpr i32 kVectors = ceil_div(HeadDim, 4);
#pragma unroll 1
    for (i32 i = static_cast<i32>(threadIdx.x); i < S.block_m * kVectors; i += Tile::kThreads) {
      const i32 row = i / kVectors;
      if (is_void_row(tile, row)) shared[row * odd_pitch(HeadDim) + i % kVectors] = float4{0, 0, 0, 0};
    }
    __syncthreads();
  }

  ATTUNE_DEVICE void load_queries(const SimtScores<S>& tile) const {
    load_tile<S.head_dim>(query_tile_, p_.forward.query, p_.forward.query_strides, tile);
  }
  ATTUNE_DEVICE void load_grad_outputs(const SimtScores<S>& tile) const {
    load_tile<S.head_dim_v>(grad_output_tile_, p_.grad_output, p_.grad_output_strides, tile);
  }
  template <i32 HeadDim>
  ATTUNE_DEVICE void load_tile(float4* shared, const void* tensor, const Strides& strides,
                               const SimtScores<S>& tile) const {
    const u8* rows = static_cast<const u8*>(tensor) + head_offset(tile.slot, strides) * kBytes;
    Tile::template load_rows<S.block_m, HeadDim>(shared, 0, tile.slot.end - tile.query, [&](i32 row) {
      return rows + (tile.slot.block.q_begin + tile.query + row) * strides.seq * kBytes;
    });
  }

  /// The rows [begin, end) of the tile, as this head of the query sees them: key and value may be shared by
  /// different heads.
  template <i32 HeadDim>
  ATTUNE_DEVICE void load_keys(float4* shared, const void* tensor, const Strides& strides, const Slot& slot,
                               i32 begin, i32 end) const {
    const u8* rows = static_cast<const u8*>(tensor) + head_offset(slot, strides) * kBytes;
    Tile::template load_rows<S.block_n, HeadDim>(
        shared, begin, end, [&](i32 row) { return rows + (slot_.begin + row) * strides.seq * kBytes; });
  }

  template <i32 HeadDim>
  static ATTUNE_DEVICE void store(const KeySlot& slot, void* result, const Strides& strides,
                                  const Sums<HeadDim>& sums, float factor) {
    u8* rows = static_cast<u8*>(result) + head_offset(slot, strides) * kBytes;
#pragma unroll
    for (i32 r = 0; r < Tile::kTileRows; ++r) {
      const i32 row = slot.begin + Tile::row_of(r);
      if (row >= slot.end) continue;
      Tile::template store_row<S.dtype, HeadDim, kPart<HeadDim>>(rows + row * strides.seq * kBytes, sums, r,
                                                                 factor, slot.part * S.block_v);
    }
  }

  const BackwardParams& p_;
  const KeySlot slot_;
  float4* const key_tile_;
  float4* const value_tile_;
  float4* const query_tile_;
  float4* const grad_output_tile_;
  float4* const weight_tile_;  // the scores' gradient, then the probabilities
  Sums<S.head_dim> key_sums_;
  Sums<S.head_dim_v> value_sums_;
};

template <KernelSpec S>
ATTUNE_DEVICE void grad_key_value_simt(const BackwardParams& params) {
  extern __shared__ float4 shared_vectors[];
  GradKeyValueSimt<S>::run(params, shared_vectors);
}

}  // namespace attune::kernel
