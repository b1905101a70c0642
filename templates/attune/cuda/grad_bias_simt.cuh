// The gradient of a bias tensor on ordinary float units: every dtype, every GPU from sm_60 (simt_tile.cuh).
//
// One block computes one slot (backward.h), block_m rows by block_n columns of the bias tensor: rows of the
// query by rows of the key. Sums of dS stay in registers while it walks over all batch entries, sequences and
// heads that the elements were added to; for a bias of one row also over all queries. Products of whole rows
// are summed up slice by slice of their columns, so any head dim fits the same shared memory:
//
//   scores += Q[:, slice] K[:, slice]^T      products += dO[:, slice] V[:, slice]^T
//   dBias += P * (Z * products - delta)
//
// Registers of one thread, 255 at most: 8 x 4 scores, products and sums, 96; operands 36.
#pragma once

#include "attune/backward.h"
#include "attune/blocks.h"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/segments.cuh"
#include "attune/cuda/shared.h"
#include "attune/cuda/simt_scores.cuh"
#include "attune/cuda/simt_tile.cuh"
#include "attune/cuda/vector.cuh"
#include "attune/params.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
class GradBiasSimt {
  using Tile = SimtTile<S>;
  using Scores = typename Tile::Scores;
  static constexpr SimtGradBiasShared kShared{S};
  static constexpr i32 kSlice = kShared.kSlice;

  static_assert(Tile::kGroups * S.block_n <= kShared.key_offset * 4);  // add_up_rows()
  static_assert(S.bias == Bias::f32 || S.bias == Bias::f16 || S.bias == Bias::bf16);

 public:
  static ATTUNE_DEVICE void run(const BackwardParams& params, float4* shared) {
    GradBiasSimt(params, shared, bias_slot_of<S>(params, blockIdx.x)).run();
  }

 private:
  ATTUNE_DEVICE GradBiasSimt(const BackwardParams& params, float4* shared, const BiasSlot& slot)
      : p_(params), slot_(slot), query_tile_(shared), key_tile_(shared + kShared.key_offset) {}

  ATTUNE_DEVICE void run() {
    Tile::clear(sums_);
#pragma unroll 1
    for (i32 number = 0; number < biased_batches(p_); ++number) {
      for_each_segment_of_block<S>(p_.forward, slot_.batch + number, slot_.begin, slot_.end,
                                   [&](const KeySegment& segment) { add_segment(segment); });
    }
    if (p_.bias_rows == 1) add_up_rows();
    store(bias_slot_of<S>(p_, ptx::opaque(blockIdx.x)));
  }

  ATTUNE_DEVICE void add_segment(const KeySegment& segment) {
    const Block& block = segment.block;
    const i32 end = min(slot_.m_end - block.q_begin, block.len_q);
#pragma unroll 1
    for (i32 query = first_query(block); query < end; query += S.block_m) {
#pragma unroll 1
      for (i32 number = 0; number < biased_heads(p_); ++number) {
        SimtScores<S> tile{.slot = slot_of_segment(segment, biased_head(p_, slot_, number)),
                           .window = window_of_block<S>(p_.forward, block),
                           .keys = {segment.key, segment.key + segment.end - segment.begin},
                           .query = query,
                           .key = segment.key - (segment.begin - slot_.begin)};
        tile.slot.begin = max(query, 0);
        tile.slot.end = min(query + S.block_m, end);
        const QueryRange visiting =
            visiting_queries<S>(tile.window, block.len_q, tile.keys.begin, tile.keys.end);
        if (visiting.begin < tile.slot.end && tile.slot.begin < visiting.end) add_tile(tile);
      }
    }
  }

  /// The query of a block that stands in the first row of its first tile: where rows are kept apart, in the
  /// slot's first row, even if that comes before the block.
  ATTUNE_DEVICE i32 first_query(const Block& block) const {
    return p_.bias_rows == 1 ? 0 : slot_.m_begin - block.q_begin;
  }

  ATTUNE_DEVICE void add_tile(const SimtScores<S>& tile) {
    const u64 kept = tile.kept_pairs(p_.forward);
    Scores scores, products;
    const ForwardParams& p = p_.forward;
    multiply<S.head_dim>(scores, tile, p.query, p.query_strides, p.key, p.key_strides);
    multiply<S.head_dim_v>(products, tile, p_.grad_output, p_.grad_output_strides, p.value, p.value_strides);
    tile.differentiate(scores, products, kept, p_);
#pragma unroll
    for (i32 r = 0; r < Tile::kTileRows; ++r) {
#pragma unroll
      for (i32 c = 0; c < Tile::kTileColumns; ++c) sums_[r][c] += products[r][c];
    }
  }

  /// Rows of one tensor by queries times rows of another by keys.
  template <i32 HeadDim>
  ATTUNE_DEVICE void multiply(Scores& scores, const SimtScores<S>& tile, const void* by_query,
                              const Strides& query_strides, const void* by_key,
                              const Strides& key_strides) const {
    constexpr i32 kBytes = size_of(S.dtype);
    const u8* queries = static_cast<const u8*>(by_query) + head_offset(tile.slot, query_strides) * kBytes;
    const u8* keys = static_cast<const u8*>(by_key) + head_offset(tile.slot, key_strides) * kBytes;
    Tile::clear(scores);
#pragma unroll 1
    for (i32 column = 0; column < HeadDim; column += kSlice) {
      Tile::template load_rows<S.block_m, HeadDim, kSlice>(
          query_tile_, tile.slot.begin - tile.query, tile.slot.end - tile.query,
          [&](i32 row) {
            return queries + (tile.slot.block.q_begin + tile.query + row) * query_strides.seq * kBytes;
          },
          column);
      Tile::template load_rows<S.block_n, HeadDim, kSlice>(
          key_tile_, tile.keys.begin - tile.key, tile.keys.end - tile.key,
          [&](i32 row) { return keys + (slot_.begin + row) * key_strides.seq * kBytes; }, column);
      __syncthreads();
      Tile::template multiply<kSlice>(scores, query_tile_, key_tile_);
      __syncthreads();
    }
  }

  /// A bias of one row: the first row of the tile becomes the sum of all, added up in a fixed order.
  ATTUNE_DEVICE void add_up_rows() {
    float* rows = reinterpret_cast<float*>(query_tile_);
#pragma unroll
    for (i32 c = 0; c < Tile::kTileColumns; ++c) {
#pragma unroll
      for (i32 r = 1; r < Tile::kTileRows; ++r) sums_[0][c] += sums_[r][c];
      rows[Tile::group() * S.block_n + Tile::column_of(c)] = sums_[0][c];
    }
    __syncthreads();
#pragma unroll
    for (i32 c = 0; c < Tile::kTileColumns; ++c) {
      sums_[0][c] = 0.0f;
#pragma unroll 1
      for (i32 group = 0; group < Tile::kGroups; ++group) {
        sums_[0][c] += rows[group * S.block_n + Tile::column_of(c)];
      }
    }
  }

  ATTUNE_DEVICE void store(const BiasSlot& slot) const {
    const BiasStrides& strides = p_.grad_bias_strides;
    constexpr DType kType = bias_dtype(S.bias);
    u8* elements = static_cast<u8*>(p_.grad_bias) + head_offset(slot, strides) * size_of(kType);
    const i32 end = p_.bias_rows == 1 ? 1 : slot.m_end;
#pragma unroll
    for (i32 r = 0; r < Tile::kTileRows; ++r) {
      const i32 row = slot.m_begin + Tile::row_of(r);
      if (row >= end) continue;
#pragma unroll
      for (i32 c = 0; c < Tile::kTileColumns; ++c) {
        const i32 column = slot.begin + Tile::column_of(c);
        if (column >= slot.end) continue;
        store1<kType>(elements + (row * strides.query + column * strides.key) * size_of(kType), sums_[r][c]);
      }
    }
  }

  const BackwardParams& p_;
  const BiasSlot slot_;
  float4* const query_tile_;
  float4* const key_tile_;
  Scores sums_;
};

template <KernelSpec S>
ATTUNE_DEVICE void grad_bias_simt(const BackwardParams& params) {
  extern __shared__ float4 shared_vectors[];
  GradBiasSimt<S>::run(params, shared_vectors);
}

}  // namespace attune::kernel
