// From scores to their gradients: what the kernels of the backward pass do with each pair of a query and a
// key between the products, and what a thread needs for that whose accumulators have keys as rows.
#pragma once

#include "attune/blocks.h"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/tile.cuh"
#include "attune/hd.h"
#include "attune/num.h"
#include "attune/params.h"
#include "attune/philox.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

/// q.k becomes the pair's probability, 0 where dropout drops it, and dO.v the gradient of its score.
/// `element` is the bias tensor's.
template <KernelSpec S>
ATTUNE_DEVICE void differentiate_pair(const ForwardParams& p, float& score, float& gradient,
                                      QueryPair numbers, float element, bool kept) {
  const float scale2 = p.scale * kLog2e;
  const float exponent = S.bias == Bias::none ? fmaf(score, scale2, -numbers.lse2)
                                              : with_bias<S.bias>(score * scale2, element) - numbers.lse2;
  score = ptx::ex2_approx_ftz(exponent);
  if constexpr (S.dropout == Dropout::on) gradient = kept ? gradient * p.dropout.rescale : 0.0f;
  gradient = score * (gradient - numbers.delta);
  if (S.dropout == Dropout::on && !kept) score = 0.0f;
}

/// What tiles of keys begin at a multiple of, for queries that see the keys from `begin` on: where there is
/// dropout, of its groups; where there is a bias, of 2, as pairs of its elements may be aligned.
template <KernelSpec S>
ATTUNE_DEVICE i32 first_tiled_key(i32 begin) {
  return begin - begin % (S.dropout == Dropout::on ? kDropoutGroup : S.bias != Bias::none ? 2 : 1);
}

/// Does every query of [begin, end) see the block_n keys from `first` on?
template <KernelSpec S>
ATTUNE_DEVICE bool all_visible(const Window& window, i32 len_k, i32 begin, i32 end, i32 first) {
  const KeyRange unmasked = unmasked_keys<S>(window, len_k, begin, end);
  return unmasked.begin <= first && first + S.block_n <= unmasked.end;
}

/// Dropout for accumulators whose rows are queries: a thread holds two neighbouring keys of each of four n8
/// tiles, of a query and of the eighth after it.
template <KernelSpec S>
class KeptPairs {
 public:
  /// `j` is the first key, in the first n8 tile of a group of 32.
  ATTUNE_DEVICE KeptPairs(const ForwardParams& p, const Slot& slot, i32 query, i32 j) : p_(p.dropout) {
    if constexpr (S.dropout == Dropout::on) {
#pragma unroll
      for (i32 half = 0; half < 2; ++half) {
        bits_[half] = dropout_bits(p_, slot.block.index, head_number(p, slot),
                                   static_cast<u32>(query + half * 8), dropout_call(j));
      }
    }
  }
  /// Element e of the accumulator of tile n of the four.
  ATTUNE_DEVICE bool kept(i32 n, i32 e) const {
    return S.dropout == Dropout::off || kernel::kept(p_, bits_[e / 2].word[n], e % 2);
  }

 private:
  const DropoutParams& p_;
  Philox<u32> bits_[2];
};

/// Dropout for accumulators whose rows are keys: a thread holds the keys j, j + 8, j + 16 and j + 24, of two
/// neighbouring queries. Their random bits are the same half of four words (philox.h).
class KeptKeys {
 public:
  ATTUNE_DEVICE explicit KeptKeys(const DropoutParams& p) : p_(p) {}

  /// `j` is the first key's row of its group of 32, in which all four lie. The lanes of keys j and j ^ 1 need
  /// the two halves of the same words, so each draws them for one of the queries.
  static ATTUNE_DEVICE KeptKeys of_group(const DropoutParams& p, i32 block, i32 head, i32 query, i32 j) {
    KeptKeys kept(p);
    if (p.threshold != 0) {  // a branch holds the draw, and the registers that it needs, behind the products
      const bool odd = j % 2 != 0;
      const Philox<u32> bits =
          dropout_bits(p, block, head, static_cast<u32>(odd ? query + 1 : query), dropout_call(j));
#pragma unroll
      for (i32 pair = 0; pair < 2; ++pair) {
        const u32 low = __byte_perm(bits.word[pair * 2], bits.word[pair * 2 + 1], kLowHalves);
        const u32 high = __byte_perm(bits.word[pair * 2], bits.word[pair * 2 + 1], kHighHalves);
        const u32 own = odd ? high : low;
        const u32 other = __shfl_xor_sync(0xffffffffu, odd ? low : high, 4);  // lanes of a key are 4
        kept.halves_[0][pair] = odd ? other : own;
        kept.halves_[1][pair] = odd ? own : other;
      }
    }
    return kept;
  }

  /// For any `j` above -Before, a multiple of 32: the keys may lie in two groups. One call after the other:
  /// side by side they would need many registers.
  template <i32 Before>
  static ATTUNE_DEVICE KeptKeys of_any(const DropoutParams& p, i32 block, i32 head, i32 query, i32 j) {
    const i32 positive = j + Before;
    const i32 first_call = dropout_call(positive) - dropout_call(Before);
    const i32 first_word = dropout_word(positive);
    KeptKeys kept(p);
#pragma unroll 1
    for (i32 number = 0; number < 4; ++number) {  // (query, group) of the call
      const i32 which = number / 2;
      const i32 group = number % 2;
      const Philox<u32> bits =
          dropout_bits(p, block, head, static_cast<u32>(query + which), first_call + group * 4);
#pragma unroll
      for (i32 w = 0; w < 4; ++w) {
        const u32 half = j % 2 == 0 ? bits.word[w] & 0xffffu : bits.word[w] >> 16;
#pragma unroll
        for (i32 r = 0; r < 4; ++r) {
          const u32 placed = first_word + r == group * 4 + w ? half << r % 2 * 16 : 0u;
          kept.halves_[0][r / 2] |= which == 0 ? placed : 0u;
          kept.halves_[1][r / 2] |= which == 0 ? 0u : placed;
        }
      }
    }
    return kept;
  }

  /// Is key j + 8 * r kept, of the first or second query?
  ATTUNE_DEVICE bool kept(i32 which, i32 r) const {
    return kernel::kept(p_, halves_[which][r / 2], r % 2);
  }

 private:
  static constexpr u32 kLowHalves = 0x5410;
  static constexpr u32 kHighHalves = 0x7632;

  const DropoutParams& p_;
  u32 halves_[2][2] = {};  // of each query: 16 bits of each key
};

}  // namespace attune::kernel
