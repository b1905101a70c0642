// Bias tensors on tensor cores: how their elements come from global memory to where an mma accumulator holds
// the scores.
#pragma once

#include "attune/blocks.h"
#include "attune/cuda/ptx.cuh"
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

}  // namespace attune::kernel
