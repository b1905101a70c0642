// Bias tensors on tensor cores: how their elements come from global memory, or from tiles in shared memory,
// to where an accumulator of mma or wgmma holds the scores.
#pragma once

#include "attune/blocks.h"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/shared.h"
#include "attune/cuda/tile.cuh"
#include "attune/num.h"
#include "attune/params.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

/// The elements of one thread for one tile of scores. They are loaded before the product, to be under way
/// while it runs, and stay as they lie in memory: two of 16 bits take one register.
///
/// Accumulators hold pairs of neighbouring keys (ptx::mma_m16n8k16). A pair is one load where its keys are
/// neighbours in memory and aligned, on which the whole warp agrees, and where the tile has no edge.
/// Elsewhere elements are read one by one, and none outside the block.
template <KernelSpec S>
class BiasFragments {
  static constexpr i32 kBytes = size_of(S.bias);
  static constexpr i32 kRows = S.tile_m * 2;    // of a thread, 8 apart
  static constexpr i32 kPairs = S.block_n / 8;  // of a row, 8 keys apart
  static constexpr i32 kWords = S.bias == Bias::f32 ? 2 : 1;

 public:
  static constexpr i32 kRegisters = S.bias == Bias::none ? 0 : kRows * kPairs * kWords;

  /// For the tile of keys at `key`; `row` is the thread's first in the slot, `column` in the tile.
  ATTUNE_DEVICE void load(const ForwardParams& p, const Slot& slot, i32 row, i32 key, i32 column) {
    const i64 stride = ptx::opaque(p.bias_strides.query * kBytes);  // or its multiples are kept in registers
    const u8* rows = static_cast<const u8*>(p.bias) + head_offset(slot, p.bias_strides) * kBytes +
                     (slot.block.q_begin + slot.begin) * stride;
    if constexpr (S.keys == Keys::contiguous) {
      const u8* pairs = rows + row * stride + (slot.block.k_begin + key + column) * kBytes;
      const bool aligned = (reinterpret_cast<u64>(pairs) | static_cast<u64>(stride)) % (2 * kBytes) == 0;
      const bool whole = slot.end - slot.begin == S.block_m && key + S.block_n <= slot.block.len_k;
      if (aligned && whole && p.bias_strides.key == 1) return load_pairs(pairs, stride);
    }
    load_elements(p, slot, rows, stride, row, key + column);
  }

  /// Of the thread's row r: key `which` of pair n.
  ATTUNE_DEVICE float element(i32 r, i32 n, i32 which) const {
    if constexpr (S.bias == Bias::f32) return float_of(word_[r][n][which]);
    const u32 bits = word_[r][n][0] >> which * 8 * kBytes;
    if constexpr (S.bias == Bias::f16) return ptx::cvt_f32_f16(static_cast<u16>(bits));
    if constexpr (S.bias == Bias::bf16) return bf16_to_float(static_cast<u16>(bits));
    return static_cast<float>(bits & 0xffu);
  }

 private:
  ATTUNE_DEVICE void load_pairs(const u8* pairs, i64 stride) {
#pragma unroll
    for (i32 r = 0; r < kRows; ++r) {
#pragma unroll
      for (i32 n = 0; n < kPairs; ++n) {
        const u8* pair = pairs + r * 8 * stride + n * 8 * kBytes;
        u32(&word)[kWords] = word_[r][n];
        if constexpr (kBytes == 1) word[0] = *reinterpret_cast<const u16*>(pair);
        if constexpr (kBytes == 2) word[0] = *reinterpret_cast<const u32*>(pair);
        if constexpr (kBytes == 4) {
          const uint2 both = *reinterpret_cast<const uint2*>(pair);
          word[0] = both.x;
          word[1] = both.y;
        }
      }
    }
  }

  /// Past the last row or key the last one is read again: what becomes of those scores does not matter.
  ATTUNE_DEVICE void load_elements(const ForwardParams& p, const Slot& slot, const u8* rows, i64 stride,
                                   i32 row, i32 key) {
#pragma unroll
    for (i32 n = 0; n < kPairs; ++n) {
#pragma unroll
      for (i32 which = 0; which < 2; ++which) {
        const i32 j = min(key + n * 8 + which, slot.block.len_k - 1);
        const u8* column = rows + key_row<S>(p, slot.block, j) * p.bias_strides.key * kBytes;
#pragma unroll
        for (i32 r = 0; r < kRows; ++r) {
          const u32 bits = load_one(column + min(row + r * 8, slot.end - slot.begin - 1) * stride);
          if constexpr (kWords == 2) {
            word_[r][n][which] = bits;
          } else {
            word_[r][n][0] = which == 0 ? bits : ptx::opaque(word_[r][n][0] | bits << 8 * kBytes);
          }
        }
      }
    }
  }

  static ATTUNE_DEVICE u32 load_one(const u8* element) {
    if constexpr (kBytes == 1) return *element;
    if constexpr (kBytes == 2) return *reinterpret_cast<const u16*>(element);
    return *reinterpret_cast<const u32*>(element);
  }

  u32 word_[kRows][kPairs][kWords];
};

/// A tile in shared memory as Hopper's copy engine leaves it: panels of block_m swizzled rows.
template <KernelSpec S>
class BiasTile {
  static constexpr i32 kBytes = size_of(S.bias);
  static constexpr i32 kRowBytes = Sm90Shared(S).bias_row_bytes;
  using Panel = SwizzledTile<kRowBytes / kChunkBytes>;

 public:
  static constexpr i32 kPanelBytes = S.block_m * kRowBytes;
  static constexpr i32 kPanelKeys = kRowBytes / kBytes;
  static constexpr i32 kPanels = S.block_n / kPanelKeys;
  static_assert(kPanels * kPanelKeys == S.block_n);

  /// For a lane of the warp whose 16 rows begin at `row`; with `one_row` all rows are the tile's first.
  ATTUNE_DEVICE BiasTile(u32 tile, i32 row, bool one_row, i32 lane)
      : eight_rows_(one_row ? 0 : 8 * kRowBytes) {
    if constexpr (kBytes == 2) {  // where ldmatrix wants an address from this lane
      origin_ = tile + Panel::offset(one_row ? 0 : row + lane % 16, lane / 16);
    } else {  // the lane's first pair
      const i32 bytes = lane % 4 * 2 * kBytes;
      origin_ = tile + Panel::offset(one_row ? 0 : row + lane / 4, bytes / kChunkBytes) + bytes % kChunkBytes;
    }
  }

  /// Elements 8k to 8k + 7 of the accumulator.
  ATTUNE_DEVICE void load(float (&element)[8], i32 k) const {
    if constexpr (kBytes == 2) {
      u32 word[4];
      ptx::ldmatrix_x4(word, address(k * 32));
#pragma unroll
      for (i32 e = 0; e < 8; ++e) {
        const auto bits = static_cast<u16>(word[e / 2] >> e % 2 * 16);
        element[e] = S.bias == Bias::f16 ? ptx::cvt_f32_f16(bits) : bf16_to_float(bits);
      }
    } else {
#pragma unroll
      for (i32 pair = 0; pair < 4; ++pair) {
        const u32 at = address((k * 16 + pair / 2 * 8) * kBytes) + pair % 2 * eight_rows_;
        if constexpr (kBytes == 4) {
          ptx::ld_shared_v2_f32(element[pair * 2], element[pair * 2 + 1], at);
        } else {
          const u32 both = ptx::ld_shared_u16(at);
          element[pair * 2] = static_cast<float>(both & 0xffu);
          element[pair * 2 + 1] = static_cast<float>(both >> 8);
        }
      }
    }
  }

 private:
  /// `bytes` to the right of the origin: a multiple of 8, and of two chunks where the lane's chunk is not 0.
  ATTUNE_DEVICE u32 address(i32 bytes) const {
    return (origin_ ^ static_cast<u32>(bytes % kRowBytes / kChunkBytes * kChunkBytes)) +
           static_cast<u32>(bytes / kRowBytes * kPanelBytes + bytes % kChunkBytes);
  }

  u32 origin_;
  const u32 eight_rows_;
};

/// The same for scores whose rows are keys.
template <KernelSpec S>
class KeyRowBiasTile {
  static constexpr i32 kBytes = size_of(S.bias);

 public:
  static constexpr i32 kRowBytes = GradKeyValueSm90Shared(S).bias_row_bytes;
  static constexpr i32 kPanelBytes = S.block_m * kRowBytes;
  static constexpr i32 kPanelKeys = kRowBytes / kBytes;
  static constexpr i32 kPanels = S.block_n / kPanelKeys;
  static_assert(kPanels * kPanelKeys == S.block_n);

  /// For a lane of the warp whose 16 keys begin at `key` of the tile; with `one_row` all queries have the
  /// first's elements.
  ATTUNE_DEVICE KeyRowBiasTile(u32 tile, i32 key, bool one_row, i32 lane)
      : query_bytes_(one_row ? 0 : kRowBytes), odd_query_(one_row ? 0 : kOddQuery) {
    const i32 first = kBytes == 2 ? key + lane / 8 % 2 * 8 : key + lane / 4;
    const i32 query = one_row ? 0 : kBytes == 2 ? lane / 16 * 8 + lane % 8 : lane % 4 * 2;
    const i32 bytes = first % kPanelKeys * kBytes;
    origin_ = tile + static_cast<u32>(first / kPanelKeys * kPanelBytes) +
              Panel::offset(query, bytes / kChunkBytes) + static_cast<u32>(bytes % kChunkBytes);
  }

  /// Elements 8k to 8k + 7 of the accumulator: of 16 queries.
  ATTUNE_DEVICE void load(float (&element)[8], i32 k) const {
    if constexpr (kBytes == 2) {
      u32 word[4];
      ptx::ldmatrix_x4_trans(word, origin_ + query_bytes_ * (k * 16));
#pragma unroll
      for (i32 e = 0; e < 8; ++e) {
        const auto bits = static_cast<u16>(word[e / 2] >> e % 2 * 16);
        element[e] = S.bias == Bias::f16 ? ptx::cvt_f32_f16(bits) : bf16_to_float(bits);
      }
    } else {
#pragma unroll
      for (i32 e = 0; e < 8; ++e) {
        const u32 eight_keys = e / 2 % 2 * 8 * kBytes;
        const u32 odd = e % 2 == 0 ? 0 : odd_query_;
        const u32 at = (origin_ ^ eight_keys ^ odd) + query_bytes_ * (k * 16 + e / 4 * 8);
        if constexpr (kBytes == 4) {
          element[e] = float_of(ptx::ld_shared_b32(at));
        } else {
          element[e] = static_cast<float>(ptx::ld_shared_u8(at));
        }
      }
    }
  }

 private:
  using Panel = SwizzledTile<kRowBytes / kChunkBytes>;
  /// The swizzle differs from an even row to the next where rows have 128 bytes; shorter ones share it.
  static constexpr u32 kOddQuery = kRowBytes | (Panel::kGroup == 8 ? kChunkBytes : 0);

  u32 origin_;
  const u32 query_bytes_;  // from one query to the next
  const u32 odd_query_;    // what changes from an even query to the next
};

}  // namespace attune::kernel
