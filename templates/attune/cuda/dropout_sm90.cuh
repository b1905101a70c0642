// Dropout on Hopper for scores whose rows are keys: who of a warpgroup draws what, and how it gets around.
//
// A call of Philox decides over 8 keys of a query (philox.h). They are rows of four threads: of two lanes, 4
// apart, of two neighbouring warps. So each of the four draws for a quarter of the queries that they share,
// and passes on what it drew, a bit for each pair, through shared memory.
//
// Keys of packed sequences begin anywhere: the 32 rows of two warps are keys of two groups. All that the
// calls of both decide goes to shared memory, where each thread picks its own.
#pragma once

#include "attune/cuda/dropout.cuh"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/ptx_sm90.cuh"
#include "attune/cuda/shared.h"
#include "attune/hd.h"
#include "attune/params.h"
#include "attune/philox.h"
#include "attune/spec.h"

namespace attune::kernel {

/// What is kept of a tile of scores, of those that this thread's accumulator holds: keys r and r + 8 of its
/// warp's 16, and of each 8 queries the neighbours 2c and 2c + 1 (lane 4r + c).
template <KernelSpec S>
class KeptKeyRows {
  static constexpr i32 kDraws = S.block_m / 16;  // of a thread
  static_assert(S.block_m % 16 == 0 && kDraws <= 8);
  static constexpr bool kAnyKey = S.blocks == Blocks::varlen;
  static_assert(!kAnyKey || S.dropout == Dropout::off || kDraws == 4);

 public:
  /// Shared memory of two neighbouring warps, which meet at `barrier`.
  static constexpr i32 kPairBytes = GradKeyValueSm90Shared::kDrawnBytes;

  /// All of them, where there is no dropout.
  ATTUNE_DEVICE KeptKeyRows() {}
  /// `query` is the tile's first, `key` that of the two warps; it may be negative.
  ATTUNE_DEVICE KeptKeyRows(const DropoutParams& p, i32 block, i32 head, i32 query, i32 key, u32 pair,
                            u32 barrier) {
    if constexpr (S.dropout == Dropout::off) return;
    if constexpr (kAnyKey) {
      draw_groups(p, block, head, query, key, pair, barrier);
    } else {
      draw(p, block, head, query, key, pair, barrier);
    }
  }

  /// Element e of the accumulator: key half e / 2 % 2, queries e / 4 * 8 + e % 2.
  ATTUNE_DEVICE bool kept(i32 e) const {
    if constexpr (S.dropout == Dropout::off) return true;
    if constexpr (kAnyKey) return (kept_[0] >> (e % 2 * 16 + picked_at(e / 4) + e / 2 % 2 * 2) & 1u) != 0;
    return (kept_[e % 2] >> (e / 4 % 2 * 16 + e / 8 * 2 + e / 2 % 2) & 1u) != 0;
  }

 private:
  ATTUNE_DEVICE void draw(const DropoutParams& p, i32 block, i32 head, i32 query, i32 key, u32 pair,
                          u32 barrier) {
    const u32 lane = threadIdx.x % 32;
    const u32 odd_key = lane / 4 % 2;
    const u32 odd_warp = threadIdx.x / 32 % 2;
    const u32 first = static_cast<u32>(query) + lane % 4 * 2 + odd_key + odd_warp * 8;
    const i32 call = dropout_call(key) + static_cast<i32>(lane / 8);
    const u32 last_dropped = (p.threshold << 16) - 1;  // as in kept_keys()
    u32 drawn[2] = {};  // for both warps: a bit for each query and key, of odd keys in the high halves
#pragma unroll 4
    for (i32 n = kDraws - 1; n >= 0; --n) {
      const Philox<DropoutWord> bits =
          dropout_bits(p, block, head, DropoutWord(first + static_cast<u32>(n * 16)), call);
#pragma unroll
      for (i32 warp = 0; warp < 2; ++warp) {
        drawn[warp] <<= 2;
#pragma unroll
        for (i32 key_half = 0; key_half < 2; ++key_half) {
          const u32 word = bits.word[warp * 2 + key_half].bits;
          drawn[warp] |= word << 16 > last_dropped ? 1u << key_half : 0u;
          drawn[warp] |= word > last_dropped ? 0x10000u << key_half : 0u;
        }
      }
    }
    const u32 row = pair + lane / 8 * 64 + lane % 4 * 16;  // where the four threads meet
    ptx::st_shared_b32(row + odd_key * 8 + odd_warp * 4, drawn[0]);
    ptx::st_shared_b32(row + odd_key * 8 + odd_warp * 4 + kPairBytes / 2, drawn[1]);
    ptx::bar_sync(barrier, 64);
    const ptx::Word4 all = ptx::ld_shared_word4(row + odd_warp * (kPairBytes / 2));
    const u32 halves = odd_key == 0 ? 0x5410u : 0x7632u;
    kept_[0] = ptx::prmt(static_cast<u32>(all.x), static_cast<u32>(all.y), halves);
    kept_[1] = ptx::prmt(static_cast<u32>(all.z), static_cast<u32>(all.w), halves);
  }

  /// Two groups of 32 keys and all queries, a byte for each group, query and call of the group: its bits are
  /// those of the call's keys in their order.
  ATTUNE_DEVICE void draw_groups(const DropoutParams& p, i32 block, i32 head, i32 query, i32 key, u32 pair,
                                 u32 barrier) {
    const u32 thread = ptx::opaque(threadIdx.x % 64);         // or much is worked out ahead, and kept
    const u32 first = static_cast<u32>(key) % kDropoutGroup;  // the group's key in the first row
    const u32 number = thread / 16;                           // of a group's calls
    const i32 call = dropout_call(key - static_cast<i32>(first)) + static_cast<i32>(number);
    const u32 place = pair + number * (S.block_m * 2) + thread % 16 * 2;
    const i32 groups = first == 0 ? 1 : 2;
#pragma unroll 1
    for (i32 group = 0; group < groups; ++group) {
#pragma unroll 1
      for (i32 n = 0; n < kDraws; ++n) {
        const u32 drawn_for = static_cast<u32>(query + n * 16) + thread % 16;
        const u32 kept = kept_keys(p, block, head, drawn_for, call + group * 4);
        ptx::st_shared_u8(place + static_cast<u32>(n * 32 + group), kept);
      }
    }
    ptx::bar_sync(barrier, 64);
    pick(pair + thread % 4 * 4, first + thread / 32 * 16 + thread % 32 / 4);
  }

  /// This thread's keys: `key` of the two groups, and 8 further down; `drawn` is the place of its queries.
  ATTUNE_DEVICE void pick(u32 drawn, u32 key) {
    const u32 row = drawn + key % 8 / 2 * (S.block_m * 2);
    const u32 shift = key / 8 * 2 + key % 2;
    kept_[0] = 0;
#pragma unroll
    for (i32 n = 0; n < S.block_m / 8; ++n) {
      kept_[0] |= (ptx::ld_shared_b32(row + n * 16) >> shift & 0x00050005u) << picked_at(n);
    }
    kept_[0] = ptx::opaque(kept_[0]);  // or the compiler keeps all that it is made of
  }
  /// Of two queries in the n-th 8: the bits 0, 2, 16 and 18 from here on.
  static ATTUNE_DEVICE i32 picked_at(i32 n) {
    return n % 2 + n / 2 * 4;
  }

  u32 kept_[2];  // of each of two neighbouring queries; both in one where keys begin anywhere
};

}  // namespace attune::kernel
