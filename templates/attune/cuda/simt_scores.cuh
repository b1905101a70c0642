// Scores on ordinary float units: what a mask, a bias tensor and dropout make of a thread's register tile of
// them (simt_tile.cuh), and their gradient.
#pragma once

#include "attune/backward.h"
#include "attune/blocks.h"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/simt_tile.cuh"
#include "attune/cuda/vector.cuh"
#include "attune/num.h"
#include "attune/params.h"
#include "attune/philox.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

/// One of a call's words, without an address, so that the words stay in registers.
ATTUNE_DEVICE u32 word_of(const Philox<u32>& bits, i32 index) {
  const u32 low = index % 2 == 0 ? bits.word[0] : bits.word[1];
  const u32 high = index % 2 == 0 ? bits.word[2] : bits.word[3];
  return index < 2 ? low : high;
}

/// A tile of scores of one head of a block: queries from `query` on by keys from `key` on, of which the
/// queries [slot.begin, slot.end) and the keys `keys` are meant. Others are hidden.
template <KernelSpec S>
struct SimtScores {
  using Tile = SimtTile<S>;
  using Scores = typename Tile::Scores;

  Slot slot;
  Window window;
  KeyRange keys;
  i32 query;
  i32 key;

  /// The q-th query and the k-th key that this thread holds.
  ATTUNE_DEVICE i32 query_of(i32 q) const {
    return query + (Tile::kRowsAreKeys ? Tile::column_of(q) : Tile::row_of(q));
  }
  ATTUNE_DEVICE i32 key_of(i32 k) const {
    return key + (Tile::kRowsAreKeys ? Tile::row_of(k) : Tile::column_of(k));
  }
  /// Their score.
  static ATTUNE_DEVICE float& at(Scores& scores, i32 q, i32 k) {
    return Tile::kRowsAreKeys ? scores[k][q] : scores[q][k];
  }

  /// Products of query and key become scores in base 2. The scale, of any sign, comes after the sum, where it
  /// rounds once.
  ATTUNE_DEVICE void finish(Scores& scores, const ForwardParams& p) const {
    const float scale2 = p.scale * kLog2e;
#pragma unroll
    for (i32 r = 0; r < Tile::kTileRows; ++r) {
#pragma unroll
      for (i32 c = 0; c < Tile::kTileColumns; ++c) scores[r][c] *= scale2;
    }
    if constexpr (S.bias != Bias::none) add_bias(scores, p);
    if (!all_visible()) hide_invisible(scores);
  }

  /// Each thread reads the elements of its own scores, and none outside the block: those scores are hidden
  /// afterwards.
  ATTUNE_DEVICE void add_bias(Scores& scores, const ForwardParams& p) const {
    constexpr i32 kBytes = size_of(S.bias);
    const i64 stride = ptx::opaque(p.bias_strides.query * kBytes);  // or its multiples are kept in registers
    const u8* rows = static_cast<const u8*>(p.bias) + head_offset(slot, p.bias_strides) * kBytes +
                     (slot.block.q_begin + query_of(0)) * stride;
    constexpr i32 kStep = Tile::kRowsAreKeys ? Tile::kLanes : Tile::kGroups;
#pragma unroll
    for (i32 k = 0; k < S.tile_n; ++k) {
      const i32 j = key_of(k);
      if (j < keys.begin || j >= keys.end) continue;
      const u8* element = rows + key_row<S>(p, slot.block, j) * p.bias_strides.key * kBytes;
#pragma unroll
      for (i32 q = 0; q < S.tile_m; ++q) {
        if (query_of(q) < slot.begin || query_of(q) >= slot.end) continue;
        float& score = at(scores, q, k);
        score = with_bias<S.bias>(score, load_bias<S.bias>(element + q * kStep * stride));
      }
    }
  }

  /// Needs no score of the tile a mask? Computed anew for each tile: bounds kept through the loop would
  /// occupy registers.
  ATTUNE_DEVICE bool all_visible() const {
    const i32 begin = max(ptx::opaque(slot.begin), query);
    const KeyRange unmasked = unmasked_keys<S>(window, keys.end, begin, min(slot.end, query + S.block_m));
    return key >= max(keys.begin, unmasked.begin) && key + S.block_n <= unmasked.end;
  }

  /// Score -inf where the mask says no.
  ATTUNE_DEVICE void hide_invisible(Scores& scores) const {
#pragma unroll
    for (i32 q = 0; q < S.tile_m; ++q) {
#pragma unroll
      for (i32 k = 0; k < S.tile_n; ++k) {
        const i32 j = key_of(k);
        const bool seen = j >= keys.begin && visible<S>(window, keys.end, query_of(q), j);
        if (!seen) at(scores, q, k) = neg_inf();
      }
    }
  }

  /// Products of query and key, and of the output's gradient and value, become the probabilities that the
  /// output is made of (P * Z in backward.h) and the scores' gradient. `kept` is what kept_pairs() returned.
  ATTUNE_DEVICE void differentiate(Scores& scores, Scores& products, u64 kept,
                                   const BackwardParams& p) const {
    finish(scores, p.forward);
    const i64 numbers = lse_offset(p.forward, slot, 0);
#pragma unroll
    for (i32 q = 0; q < S.tile_m; ++q) {
      const i32 i = query_of(q);
      const bool exists = i >= slot.begin && i < slot.end;
      const float lse2 = exists ? p.lse2[numbers + i] : -neg_inf();
      const float delta = exists ? p.delta[numbers + i] : 0.0f;
      const bool blind = lse2 == -neg_inf();
#pragma unroll
      for (i32 k = 0; k < S.tile_n; ++k) {
        float& score = at(scores, q, k);
        float& product = at(products, q, k);
        // Whatever the score, or the LSE, of a hidden pair is, NaN included.
        const bool hidden = blind || score == neg_inf();
        const float probability = hidden ? 0.0f : ptx::ex2_approx_ftz(score - lse2);
        const bool keeps = S.dropout == Dropout::off || (kept >> (q * S.tile_n + k) & 1u) != 0;
        const float rescale = S.dropout == Dropout::off ? 1.0f : keeps ? p.forward.dropout.rescale : 0.0f;
        score = keeps ? probability * rescale : 0.0f;
        product = probability == 0.0f ? 0.0f : probability * (rescale * product - delta);
      }
    }
  }

  /// Bit q * tile_n + k: does dropout keep that pair of this thread? Query by query, as bits, and asked for
  /// before there are scores: the generator's state occupies many registers. Neighbouring k share a call
  /// where their keys do, wherever the groups of keys begin.
  ATTUNE_DEVICE u64 kept_pairs(const ForwardParams& p) const {
    static_assert(S.tile_m * S.tile_n <= 64);
    u64 pairs = 0;
    if constexpr (S.dropout == Dropout::off) return pairs;
#pragma unroll 1
    for (i32 q = S.tile_m - 1; q >= 0; --q) pairs = pairs << S.tile_n | kept_keys(p, query_of(q));
    return pairs;
  }

  ATTUNE_DEVICE u32 kept_keys(const ForwardParams& p, i32 i) const {
    Philox<u32> bits{};
    i32 drawn = -1;
    u32 result = 0;
#pragma unroll
    for (i32 k = 0; k < S.tile_n; ++k) {
      const i32 j = max(key_of(k), 0);
      if (dropout_call(j) != drawn) {
        drawn = dropout_call(j);
        bits =
            dropout_bits<u32>(p.dropout, slot.block.index, head_number(p, slot), static_cast<u32>(i), drawn);
      }
      if (kept(p.dropout, word_of(bits, dropout_word(j)), j % 2)) result |= 1u << k;
    }
    return result;
  }
};

}  // namespace attune::kernel
