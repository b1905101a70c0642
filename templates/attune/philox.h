// Dropout: which (query, key) pairs are dropped. A pure function of seed, offset, block (batch entry or
// sequence), head, query and key, so that no layout, tile, kernel or backend can change a bit of it, and a
// backward pass draws the same.
//
// Philox 4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC11) gives 128 bits per
// call: 16 for each of 8 keys. A call serves the keys of one group of 32 that a thread holds in an mma.m16n8
// accumulator: columns 2t and 2t + 1 of four neighbouring n8 tiles. So tensor-core kernels waste none of it.
//
//   key j of a block:   call (j / 32) * 4 + (j % 8) / 2,   word (j % 32) / 8,   half j % 2
#pragma once

#include "attune/hd.h"
#include "attune/params.h"

namespace attune::kernel {

/// Keys of one group; tiles of keys begin at its multiples where there is dropout.
inline constexpr i32 kDropoutGroup = 32;

/// The high 32 bits of a product. Vectors of u32 have a specialisation of their own (cpu/simd.h), and so has
/// a word that takes both halves from one instruction (cuda/dropout.cuh).
template <typename U>
struct MultiplyHigh {
  static ATTUNE_HD constexpr U of(U a, u32 b) { return static_cast<u32>(u64{a} * b >> 32); }
};

/// Four words of state, and of output. U is u32 or a vector of them.
template <typename U>
struct Philox {
  U word[4];
};

/// One round. Each has a key of its own: the next is larger by the Weyl constants.
template <typename U>
ATTUNE_HD constexpr Philox<U> philox_round(Philox<U> c, u32 key0, u32 key1) {
  constexpr u32 kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  const U high0 = MultiplyHigh<U>::of(c.word[0], kMultiplier0);
  const U high1 = MultiplyHigh<U>::of(c.word[2], kMultiplier1);
  return {{high1 ^ c.word[1] ^ U(key0), c.word[2] * U(kMultiplier1), high0 ^ c.word[3] ^ U(key1),
           c.word[0] * U(kMultiplier0)}};
}
inline constexpr u32 kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

template <typename U>
ATTUNE_HD constexpr Philox<U> philox4x32_10(Philox<U> c, u32 key0, u32 key1) {
  for (i32 round = 0; round < kPhiloxRounds; ++round) {
    c = philox_round(c, key0, key1);
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return c;
}
/// The same, all keys given.
template <typename U>
ATTUNE_HD constexpr Philox<U> philox4x32_10(Philox<U> c, const u32 (&key)[kPhiloxRounds][2]) {
  for (i32 round = 0; round < kPhiloxRounds; ++round) c = philox_round(c, key[round][0], key[round][1]);
  return c;
}

/// Which call, and where in its 128 bits, key j's 16 bits are.
ATTUNE_HD constexpr i32 dropout_call(i32 j) {
  return j / kDropoutGroup * 4 + j % 8 / 2;
}
ATTUNE_HD constexpr i32 dropout_word(i32 j) {
  return j % kDropoutGroup / 8;
}

/// What a call for a query, or for vectors of both, draws from (Call is i32, or U). `head` counts over all
/// groups.
template <typename U, typename Call>
ATTUNE_HD constexpr Philox<U> dropout_counter(i32 block, i32 head, U query, Call call) {
  return {{U(call), query, U(static_cast<u32>(head)), U(static_cast<u32>(block))}};
}
/// Its bits.
template <typename U, typename Call>
ATTUNE_HD constexpr Philox<U> dropout_bits(const DropoutParams& p, i32 block, i32 head, U query, Call call) {
  return philox4x32_10(dropout_counter(block, head, query, call), p.key[0], p.key[1]);
}
template <typename U, typename Call>
ATTUNE_HD constexpr Philox<U> dropout_bits(const ReadyDropout& p, i32 block, i32 head, U query, Call call) {
  return philox4x32_10(dropout_counter(block, head, query, call), p.key);
}

/// Are the 16 bits of an even (low) or odd (high) key's half of a word those of a kept pair? A bool, or the
/// mask of a comparison of vectors.
template <typename U>
ATTUNE_HD constexpr auto kept(const DropoutParams& p, U word, i32 half) {
  return (half == 0 ? word & U(0xffffu) : word >> U(16)) >= U(p.threshold);
}

/// Is the pair (query, key) kept? The definition; kernels share calls between keys.
ATTUNE_HD constexpr bool dropout_keeps(const DropoutParams& p, i32 block, i32 head, i32 query, i32 key) {
  const Philox<u32> bits = dropout_bits<u32>(p, block, head, static_cast<u32>(query), dropout_call(key));
  return kept(p, bits.word[dropout_word(key)], key % 2);
}

/// The parameters of a call: p in [0, 1] is rounded to the nearest multiple of 2^-16, and only 1 becomes 1.
/// The Philox key is drawn from the seed at the offset, so every (seed, offset) has a stream of its own.
constexpr DropoutParams make_dropout(double p, u64 seed, u64 offset) {
  DropoutParams result;
  const auto threshold = static_cast<u32>(p * 65536.0 + 0.5);
  result.threshold = p >= 1.0 ? 65536u : threshold < 65535u ? threshold : 65535u;
  result.rescale =
      result.threshold == 65536u ? 0.0f : 65536.0f / static_cast<float>(65536u - result.threshold);
  const Philox<u32> drawn =
      philox4x32_10<u32>({{static_cast<u32>(offset), static_cast<u32>(offset >> 32), 0u, 0u}},
                         static_cast<u32>(seed), static_cast<u32>(seed >> 32));
  result.key[0] = drawn.word[0];
  result.key[1] = drawn.word[1];
  return result;
}

/// x >= threshold is ~x < 2^16 - threshold.
ATTUNE_HD constexpr DropBounds drop_bounds(const DropoutParams& p) {
  const u32 flip = 0u - ((p.threshold + 0x7fff) >> 16);  // selected, it would select in DropTest, too
  return {flip, (flip == 0 ? p.threshold : 0x10000u - p.threshold) * 0x10001u,
          (flip == 0 ? 0x10000u - p.threshold : p.threshold) % 0x10000u * 0x10001u};
}

constexpr ReadyDropout ready(const DropoutParams& p) {
  ReadyDropout result;
  for (u32 round = 0; round < kPhiloxRounds; ++round) {
    result.key[round][0] = p.key[0] + round * kWeyl0;
    result.key[round][1] = p.key[1] + round * kWeyl1;
  }
  result.bounds = drop_bounds(p);
  return result;
}

}  // namespace attune::kernel
