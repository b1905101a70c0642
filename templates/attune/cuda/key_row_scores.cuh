// Scores whose rows are keys (S^T = K Q^T): what grad_key_value and grad_bias compute for each pair of a tile
// of keys and a tile of queries before they sum it up.
#pragma once

#include "attune/backward.h"
#include "attune/cuda/mma_tile.cuh"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/score_gradient.cuh"
#include "attune/cuda/shared.h"
#include "attune/cuda/tile.cuh"
#include "attune/cuda/vector.cuh"
#include "attune/num.h"
#include "attune/params.h"
#include "attune/philox.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

/// The tiles of one block, and which keys of which head their rows are. 16 * tile_m keys belong to one warp
/// or to several, which then share out the queries.
template <KernelSpec S>
class KeyRowScores {
 protected:
  static constexpr GradMmaShared kShared{S};
  static constexpr i32 kThreads = S.warps * kWarpSize;
  static constexpr i32 kWarpRows = 16 * S.tile_m;
  static constexpr i32 kRowGroups = S.block_n / kWarpRows;   // of warps with the same rows
  static constexpr i32 kSharers = S.warps / kRowGroups;      // warps of such a group
  static constexpr i32 kWarpQueries = S.block_m / kSharers;  // whose scores a warp computes,
  static constexpr i32 kPassQueries = 8 * S.tile_n;          // so many at a time
  static_assert(S.block_n % kWarpRows == 0 && S.warps % kRowGroups == 0);
  static_assert(bit_ceil(S.block_m) == S.block_m && bit_ceil(kSharers) == kSharers);
  static_assert(kWarpQueries % kPassQueries == 0 && S.tile_n % 2 == 0);
  static_assert(S.dropout == Dropout::off || kWarpRows == kDropoutGroup);

  using QueryTile = RowTile<S.head_dim>;         // and key tiles
  using GradOutputTile = RowTile<S.head_dim_v>;  // and value tiles
  using Scores = float[S.tile_m][S.tile_n][4];

  /// Computed anew where it is asked for: what follows from it would occupy registers.
  static ATTUNE_DEVICE i32 warp() { return static_cast<i32>(ptx::opaque(threadIdx.x) / kWarpSize); }
  /// The warp's number among those of its rows.
  static ATTUNE_DEVICE i32 sharer() { return warp() % kSharers; }
  static ATTUNE_DEVICE i32 warp_row() { return warp() / kSharers * kWarpRows; }
  /// The tile's row that element e of fragment m is of, and the query of the pass for n8 tile n.
  static ATTUNE_DEVICE i32 row_of(i32 m, i32 e) {
    return warp_row() + accumulator_row() + m * 16 + e / 2 * 8;
  }
  static ATTUNE_DEVICE i32 column_of(i32 n, i32 e) { return accumulator_column() + n * 8 + e % 2; }

  /// The segment's block and the head, for the offsets of blocks.h, which are computed anew where they are
  /// used: kept through the walk, 64 bits wide, they would occupy registers.
  ATTUNE_DEVICE Slot head_now() const {
    Slot head = slot_of_segment(segment_, {ptx::opaque(head_.group), ptx::opaque(head_.head)});
    if constexpr (S.blocks == Blocks::dense) head.block.batch = ptx::opaque(head.block.batch);
    return head;
  }

  static ATTUNE_DEVICE const u16* rows_of(const void* tensor) { return static_cast<const u16*>(tensor); }

  /// Fills a tile with the segment's rows of a tensor, and zeros; `head` is where its head begins.
  template <i32 HeadDim>
  ATTUNE_DEVICE void load_rows(u32 tile, const u16* head, i64 stride) const {
    copy_rows<S.block_n, HeadDim, S.copy_bytes, kThreads>(tile, head + begin_ * stride, stride,
                                                          segment_.begin - begin_, segment_.end - begin_);
  }

  /// lse2 and delta of the queries from m on, side by side, for a slot of the ring. Those outside of
  /// [first, last) of the tile become 0, like their rows of query and gradient, so nothing is added for them.
  ATTUNE_DEVICE void copy_numbers(u32 slot, i32 m, i32 first, i32 last) const {
    const i64 number = lse_offset(p_.forward, head_now(), m);
#pragma unroll
    for (i32 index = 0; index < ceil_div(2 * S.block_m, kThreads); ++index) {
      const i32 at = static_cast<i32>(ptx::opaque(threadIdx.x)) + index * kThreads;
      if (2 * S.block_m % kThreads != 0 && at >= 2 * S.block_m) break;
      const i32 row = at % S.block_m;
      const float* source = (at < S.block_m ? p_.lse2 : p_.delta) + number + row;
      ptx::cp_async<4>(slot + kShared.numbers_offset + row * 8 + at / S.block_m * 4, source,
                       first <= row && row < last ? 4 : 0);
    }
  }

  /// When what this thread copied to a slot has come: are there void queries (backward.h) among its numbers?
  ATTUNE_DEVICE bool copied_void_queries(u32 slot) const {
    bool is_any_void = false;
#pragma unroll
    for (i32 index = 0; index < ceil_div(S.block_m, kThreads); ++index) {
      const i32 row = static_cast<i32>(ptx::opaque(threadIdx.x)) + index * kThreads;
      if (S.block_m % kThreads != 0 && row >= S.block_m) break;
      is_any_void |= is_void(lse_of(slot, row));
    }
    return is_any_void;
  }
  static ATTUNE_DEVICE float lse_of(u32 slot, i32 row) {
    return float_of(ptx::ld_shared_b32(slot + kShared.numbers_offset + row * 8));
  }

  /// Those become zeros in a slot, and so do their outputs' gradients.
  ATTUNE_DEVICE void clear_void_queries(u32 slot) const {
    clear_void_queries<S.head_dim>(slot, slot);
    clear_void_queries<S.head_dim_v>(slot, slot + kShared.second_ring_offset);
  }
  template <i32 HeadDim>
  static ATTUNE_DEVICE void clear_void_queries(u32 slot, u32 tile) {
    using Walk = RowWalk<S.block_m, HeadDim, kThreads>;
    Walk::template for_each<1>(ptx::opaque(threadIdx.x), [&](i32 row, i32 chunk) {
      if (!is_void(lse_of(slot, row))) return;
      ptx::st_shared_v4(tile + SwizzledTile<Walk::kChunks>::offset(row, chunk), ptx::Chunk{});
    });
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
    __syncwarp();  // not for data: overlapped, the products would need more registers than there are
    clear(gradients);
    multiply_rows<S.dtype, GradOutputTile, ceil_div(S.head_dim_v, 16)>(
        gradients, rows_first<GradOutputTile>(value_tile_, warp_row(), 0),
        chunks_first<GradOutputTile>(tile_ + kShared.second_ring_offset, row, 0));
    __syncwarp();
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
    if constexpr (S.dropout == Dropout::off) {
      return KeptKeys(dropout);
    } else {
      const i32 block = segment_.block.index;
      const i32 head = head_number(p_.forward, head_now());
      const i32 key = key_of(row_of(0, 0));
      if constexpr (S.blocks == Blocks::dense) return KeptKeys::of_group(dropout, block, head, query, key);
      return KeptKeys::of_any<S.block_n>(dropout, block, head, query, key);
    }
  }

  /// The elements of the bias tensor for the queries from `query` on. Beside the queries and keys that there
  /// are, the nearest is read again: those scores are hidden.
  ATTUNE_DEVICE void load_bias_elements(Scores& elements, i32 query) const {
    constexpr i32 kBytes = size_of(S.bias);
    const BiasStrides& strides = p_.forward.bias_strides;
    const i64 first = head_offset(head_now(), strides) + segment_.block.q_begin * strides.query;
    const u8* base = static_cast<const u8*>(p_.forward.bias) + first * kBytes;
#pragma unroll
    for (i32 n = 0; n < S.tile_n; ++n) {
#pragma unroll
      for (i32 e = 0; e < 4; ++e) {
        const i32 i = clamp(query + column_of(n, e), 0, queries_.end - 1);
        const u8* column = base + i * strides.query * kBytes;
#pragma unroll
        for (i32 m = 0; m < S.tile_m; ++m) {
          const i32 row = clamp(begin_ + row_of(m, e), segment_.begin, segment_.end - 1);
          elements[m][n][e] = load_bias<S.bias>(column + row * strides.key * kBytes);
        }
      }
    }
  }

  /// The key of the segment's block that a row of the tile is, if it is one of the segment.
  ATTUNE_DEVICE i32 key_of(i32 row) const {
    return begin_ + row - segment_.begin + segment_.key;
  }

  /// Of the block: a launch parameter where all blocks are alike, which takes no registers.
  ATTUNE_DEVICE Window window() const {
    if constexpr (S.blocks == Blocks::dense) return p_.forward.window;
    return window_;
  }

  /// Are the tile's rows the segment's, and does every query of the tile at m see them all?
  ATTUNE_DEVICE bool all_visible(i32 m) const {
    if (ptx::opaque(segment_.end) - segment_.begin < S.block_n) return false;
    const QueryRange unmasked =
        unmasked_queries<S>(window(), segment_.block.len_q, segment_.key, segment_.key + S.block_n);
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
          if (row < segment_.begin || row >= segment_.end || query < 0 || query >= queries_.end ||
              !visible<S>(window(), segment_.block.len_k, query, key_of(row_of(i, e)))) {
            probabilities[i][n][e] = 0.0f;
            gradients[i][n][e] = 0.0f;
          }
        }
      }
    }
  }

  /// `begin` is the first row of the block's.
  ATTUNE_DEVICE KeyRowScores(const BackwardParams& params, u32 shared, i32 begin)
      : p_(params),
        begin_(begin),
        key_tile_(shared),
        value_tile_(shared + kShared.second_offset),
        tile_(shared + kShared.ring_offset) {}

  const BackwardParams& p_;
  const i32 begin_;
  const u32 key_tile_, value_tile_;
  u32 tile_;  // of the ring: the one that is read
  KeySegment segment_;
  Window window_;
  QueryRange queries_;
  QueryHead head_;
};

}  // namespace attune::kernel
