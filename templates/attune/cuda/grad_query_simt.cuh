// The query's gradient on ordinary float units: every dtype, every GPU from sm_60 (simt_tile.cuh).
//
// One block computes one slot (blocks.h), block_m queries of one head, and walks over the visible keys,
// block_n at a time. The tiles of the query and of the output's gradient dO stay in shared memory; one slot
// holds first the values, then the keys:
//
//   products = dO V^T      scores = Q K^T      dS = P * (Z * products - delta)      dQ += dS K
//
// dS crosses from the layout of scores to that of weights through shared memory, inside one warp. What P and
// Z are: backward.h.
//
// Registers of one thread, 255 at most:
//   head dim  tile_m x tile_n   scores, products  sums  operands  sum
//   32            4 x 8              64            16      36     116
//   64            8 x 4              64            32      36     132
//   128           8 x 4              64            64      36     164
//   256           4 x 4              32            64      20     116
//   512           4 x 2              16           128      20     164
#pragma once

#include "attune/backward.h"
#include "attune/blocks.h"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/shared.h"
#include "attune/cuda/simt_scores.cuh"
#include "attune/cuda/simt_tile.cuh"
#include "attune/params.h"
#include "attune/philox.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
class GradQuerySimt {
  using Tile = SimtTile<S>;
  using Scores = typename Tile::Scores;
  static constexpr SimtGradQueryShared kShared{S};
  static constexpr i32 kSlotPitch = max(kShared.pitch, kShared.value_pitch);
  static constexpr i32 kBytes = size_of(S.dtype);

  static_assert(S.block_v == S.head_dim);

 public:
  static ATTUNE_DEVICE void run(const BackwardParams& params, float4* shared) {
    const Slot slot = slot_of<S>(params.forward, blockIdx.x);
    if (slot.begin < slot.end) GradQuerySimt(params, shared, slot).run();
  }

 private:
  ATTUNE_DEVICE GradQuerySimt(const BackwardParams& params, float4* shared, const Slot& slot)
      : p_(params),
        slot_(slot),
        window_(window_of_block<S>(params.forward, slot.block)),
        query_tile_(shared),
        grad_output_tile_(shared + kShared.grad_output_offset),
        key_tile_(shared + kShared.slot_offset),
        weight_tile_(shared + kShared.weight_offset) {}

  ATTUNE_DEVICE void run() {
    load_queries<S.head_dim>(query_tile_, p_.forward.query, p_.forward.query_strides);
    load_queries<S.head_dim_v>(grad_output_tile_, p_.grad_output, p_.grad_output_strides);
    Tile::clear(sums_);
    const KeyRange visited = visited_keys<S>(window_, slot_.block.len_k, slot_.begin, slot_.end);
#pragma unroll 1
    for (i32 key = first_tile(visited.begin); key < visited.end; key += S.block_n) add_tile(visited, key);
    // Which slot it was is computed anew: kept through the loop it would occupy registers.
    finish(slot_of<S>(p_.forward, ptx::opaque(blockIdx.x)));
  }

  /// Where the first tile of keys begins: with dropout at a boundary of its groups, so that the keys that a
  /// thread holds share its calls (philox.h).
  static ATTUNE_DEVICE i32 first_tile(i32 key) {
    return S.dropout == Dropout::on ? key - key % kDropoutGroup : key;
  }

  ATTUNE_DEVICE void add_tile(const KeyRange& visited, i32 key) {
    const SimtScores<S> tile{slot_, window_, visited, slot_.begin, key};
    const u64 kept = tile.kept_pairs(p_.forward);
    Scores scores, products;
    load_keys<S.head_dim_v>(p_.forward.value, p_.forward.value_strides, visited, key);
    Tile::clear(products);
    __syncthreads();
    Tile::template multiply<S.head_dim_v, kShared.value_pitch, kSlotPitch>(products, grad_output_tile_,
                                                                           key_tile_);
    __syncthreads();
    load_keys<S.head_dim>(p_.forward.key, p_.forward.key_strides, visited, key);
    Tile::clear(scores);
    __syncthreads();
    Tile::template multiply<S.head_dim, kShared.pitch, kSlotPitch>(scores, query_tile_, key_tile_);
    tile.differentiate(scores, products, kept, p_);
    Tile::store_weights(weight_tile_, products);
    __syncwarp();
    Tile::template accumulate<S.head_dim, kSlotPitch>(sums_, weight_tile_, key_tile_);
    __syncthreads();
  }

  template <i32 HeadDim>
  ATTUNE_DEVICE void load_queries(float4* tile, const void* tensor, const Strides& strides) const {
    const u8* rows = static_cast<const u8*>(tensor) + head_offset(slot_, strides) * kBytes;
    Tile::template load_rows<S.block_m, HeadDim>(tile, 0, slot_.end - slot_.begin, [&](i32 row) {
      return rows + (slot_.block.q_begin + slot_.begin + row) * strides.seq * kBytes;
    });
  }

  /// Rows of key or value, from `key` on. Those that no query of the slot sees may be NaN, which times a
  /// weight of 0 would be NaN.
  template <i32 HeadDim>
  ATTUNE_DEVICE void load_keys(const void* tensor, const Strides& strides, const KeyRange& visited,
                               i32 key) const {
    const u8* rows = static_cast<const u8*>(tensor) + head_offset(slot_, strides) * kBytes;
    Tile::template load_rows<S.block_n, HeadDim, HeadDim, kSlotPitch>(
        key_tile_, visited.begin - key, visited.end - key, [&](i32 row) {
          return rows + key_row<S>(p_.forward, slot_.block, key + row) * strides.seq * kBytes;
        });
  }

  ATTUNE_DEVICE void finish(const Slot& slot) const {
    const Strides& strides = p_.grad_query_strides;
    u8* rows = static_cast<u8*>(p_.grad_query) + head_offset(slot, strides) * kBytes;
#pragma unroll
    for (i32 r = 0; r < Tile::kTileRows; ++r) {
      const i32 query = slot.begin + Tile::row_of(r);
      if (query >= slot.end) continue;
      Tile::template store_row<S.dtype, S.head_dim>(
          rows + (slot.block.q_begin + query) * strides.seq * kBytes, sums_, r, p_.forward.scale);
    }
  }

  const BackwardParams& p_;
  const Slot slot_;
  const Window window_;
  float4* const query_tile_;
  float4* const grad_output_tile_;
  float4* const key_tile_;     // values, then keys
  float4* const weight_tile_;  // the scores' gradient
  typename Tile::template Sums<S.head_dim> sums_;
};

template <KernelSpec S>
ATTUNE_DEVICE void grad_query_simt(const BackwardParams& params) {
  extern __shared__ float4 shared_vectors[];
  GradQuerySimt<S>::run(params, shared_vectors);
}

}  // namespace attune::kernel
