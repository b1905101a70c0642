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

/// The elements of one thread for one tile of scores, held as they lie in memory: half the registers that
/// they would take as floats, so that a tile's loads can be under way while its product runs.
///
/// Accumulators hold pairs of neighbouring keys (ptx::mma_m16n8k16). A pair is one load where its keys are
/// neighbours in memory and aligned, which the whole block agrees on, and the tile has no edge. Elsewhere
/// elements are read one by one, and none outside the block.
template <KernelSpec S>
class BiasFragments {
  static constexpr i32 kBytes = size_of(S.bias);
  static constexpr i32 kPairs = S.block_n / 8;
  static constexpr i32 kWords = S.bias == Bias::f32 ? 2 : 1;

 public:
  static constexpr i32 kRegisters = S.bias == Bias::none ? 0 : S.tile_m * 2 * kPairs * kWords;

  /// `row` and `column` are the thread's first in the block's queries and in the tile of keys at `key`.
  ATTUNE_DEVICE void load(const ForwardParams& p, const Slot& slot, i32 row, i32 key, i32 column) {
    const i64 stride = ptx::opaque(p.bias_strides.query * kBytes);
    const i32 first_row = slot.block.q_begin + slot.begin + row;
    const u8* rows =
        static_cast<const u8*>(p.bias) + head_offset(slot, p.bias_strides) * kBytes + first_row * stride;
    if constexpr (S.keys == Keys::contiguous) {
      const u8* pairs = rows + (slot.block.k_begin + key + column) * i64{kBytes};
      const bool inside = slot.end - slot.begin == S.block_m && key + S.block_n <= slot.block.len_k;
      const bool aligned = (reinterpret_cast<u64>(pairs) | static_cast<u64>(stride)) % (2 * kBytes) == 0;
      if (inside && aligned && p.bias_strides.key == 1) {
        load_pairs(pairs, stride);
        return;
      }
    }
    load_elements(p, slot, rows, stride, slot.end - slot.begin - row, key + column);
  }

  /// Of query `half * 8` of fragment m, and of one key of pair n.
  ATTUNE_DEVICE float element(i32 m, i32 half, i32 n, i32 which) const {
    const u32(&word)[kWords] = word_[m][half][n];
    if constexpr (S.bias == Bias::f32) return float_of(word[which]);
    if constexpr (S.bias == Bias::boolean) return static_cast<float>(word[0] >> which * 8 & 0xffu);
    if constexpr (S.bias == Bias::f16) return ptx::cvt_f32_f16(static_cast<u16>(word[0] >> which * 16));
    return float_of(which == 0 ? word[0] << 16 : word[0] & 0xffff0000u);  // bf16
  }

 private:
  ATTUNE_DEVICE void load_pairs(const u8* pairs, i64 stride) {
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
      for (i32 half = 0; half < 2; ++half) {
        const u8* row = pairs + (m * 16 + half * 8) * stride;
#pragma unroll
        for (i32 n = 0; n < kPairs; ++n) {
          const u8* pair = row + n * 8 * kBytes;
          if constexpr (kBytes == 1) word_[m][half][n][0] = *reinterpret_cast<const u16*>(pair);
          if constexpr (kBytes == 2) word_[m][half][n][0] = *reinterpret_cast<const u32*>(pair);
          if constexpr (kBytes == 4) {
            const uint2 both = *reinterpret_cast<const uint2*>(pair);
            word_[m][half][n][0] = both.x;
            word_[m][half][n][1] = both.y;
          }
        }
      }
    }
  }

  /// `valid_rows` from the thread's first row on exist; `key` is its first.
  ATTUNE_DEVICE void load_elements(const ForwardParams& p, const Slot& slot, const u8* rows, i64 stride,
                                   i32 valid_rows, i32 key) {
#pragma unroll
    for (i32 n = 0; n < kPairs; ++n) {
#pragma unroll
      for (i32 which = 0; which < 2; ++which) {
        const i32 j = key + n * 8 + which;
        const bool exists = j < slot.block.len_k;
        const u8* column = rows + (exists ? key_row<S>(p, slot.block, j) : 0) * p.bias_strides.key * kBytes;
#pragma unroll
        for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
          for (i32 half = 0; half < 2; ++half) {
            const i32 row = m * 16 + half * 8;
            put(m, half, n, which, exists && row < valid_rows ? bits_at(column + row * stride) : 0);
          }
        }
      }
    }
  }

  ATTUNE_DEVICE void put(i32 m, i32 half, i32 n, i32 which, u32 bits) {
    u32(&word)[kWords] = word_[m][half][n];
    if constexpr (kWords == 2) {
      word[which] = bits;
    } else {
      word[0] = which == 0 ? bits : word[0] | bits << 8 * kBytes;
    }
  }

  static ATTUNE_DEVICE u32 bits_at(const u8* element) {
    if constexpr (kBytes == 4) return *reinterpret_cast<const u32*>(element);
    if constexpr (kBytes == 2) return *reinterpret_cast<const u16*>(element);
    return *element;
  }

  u32 word_[S.tile_m][2][kPairs][kWords];
};

}  // namespace attune::kernel
