// Forward on Hopper: products of warpgroups (wgmma), tiles by the tensor copy engine, warp-specialised.
//
// A block stays on its SM and takes one tile of queries after the other. One warp of it, the producer, copies
// queries, keys and values into rings in shared memory; 2, 3 or 4 warpgroups of 128 threads compute 64 query
// rows each and share the keys and values:
//
//                 keys  | K n-1 | K n |      ring of `stages`         from right to left: the masked
//   queries       values| V n   | V n-1 |    ring of `stages`         tiles of a causal window come first
//   +--------+
//   | 64 x D |    warpgroup 0:  S_n = Q K_n^T   softmax(S_n) -> P_n   O += P_n V_n
//   | 64 x D |    warpgroup 1
//   +--------+    ring of `query_stages` for each; its output leaves through the same bytes. Where there is
//                 one stage alone, or the output is float32, it leaves from registers, while the next come
//
// The loop issues S_n = Q K_n^T and O += P_n+1 V_n+1 together and does the softmax of S_n under the latter
// (Shah et al., FlashAttention-3, arXiv 2407.08608).
//
// The softmax bets. It is the same relative to any reference, not only to the maximum, until something
// overflows. So only the first tile and masked ones look for the maximum; the others are exponentiated
// relative to the reference as it stands, and the sums, which are taken anyway, tell whether that will do. A
// bet is lost when a thread's part of a row's sum exceeds kSumLimit: the tile, which is still there, is then
// multiplied again and taken the exact way, and so are all later ones for these queries. At head dims above
// 64 the warps of a warpgroup vote on that in each tile; at smaller ones, where the barrier of a vote would
// cost 7 per cent, each warp decides for itself and multiplies its rows alone.
//
// A tile of a bias tensor comes with its tile of keys, on the same barrier, and is let go with it.
//
// What dropout drops does not depend on scores. So where there are two warpgroups, each draws before it
// issues products, and keeps masks for its packed probabilities. Where there are more, that would keep the
// others waiting: they draw when probabilities have been packed and the registers of scores are free.
//
// Registers of one thread, by warpgroups:    producer  consumer    S + P + O of the widest tile
//   2 (block_m 128)                            24        240       head dim 256 x  64 keys: 32 + 16 + 128
//   2, uneven tiles or a bias                  40        232       head dim 256 x  64 keys: 32 + 16 + 128
//   3 (block_m 192)                            32        160       head dim  96 x 112 keys: 56 + 28 + 48
//   3, a bias, dropout of packed sequences     56        152       head dim 128 x  64 keys: 32 + 16 + 64
//   4 (block_m 256)                            32        112       head dim  64 x  64 keys: 32 + 16 + 32
#pragma once

#include "attune/blocks.h"
#include "attune/cuda/dropout.cuh"
#include "attune/cuda/forward_sm90_producer.cuh"
#include "attune/cuda/forward_sm90_tiles.cuh"
#include "attune/cuda/panels.cuh"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/ptx_sm90.cuh"
#include "attune/cuda/ptx_wgmma.cuh"
#include "attune/cuda/score_bias.cuh"
#include "attune/cuda/shared.h"
#include "attune/cuda/tile.cuh"
#include "attune/cuda/warpgroup.cuh"
#include "attune/num.h"
#include "attune/params.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
class Sm90Consumer : WarpgroupThread {
  using Memory = Sm90Memory<S>;
  using Schedule = Sm90Schedule<S>;
  static constexpr i32 kGroups = S.block_m / kGroupRows;
  static constexpr i32 kDimSteps = ceil_div(S.head_dim, 16);  // k16 steps of Q K^T
  static constexpr i32 kDimV = round_up(S.head_dim_v, 16);    // columns of O
  static constexpr i32 kKeys = S.block_n;
  static constexpr i32 kCalls = S.dropout == Dropout::on ? kKeys / kDropoutGroup : 1;  // of Philox for a row
  static constexpr bool kDrawsFirst = S.dropout == Dropout::on && kGroups == 2;
  static constexpr bool kVarlen = S.blocks == Blocks::varlen;
  static constexpr bool kPingPong = S.ping_pong != 0 && kGroups > 1;
  static constexpr bool kQueryRegisters = S.query_registers != 0;
  static constexpr bool kAdditive = S.bias != Bias::none && S.bias != Bias::boolean;
  static constexpr float kSumLimit = 1024.0f;            // of a thread's share of a row in one tile
  enum NamedBarrier : u32 { kTurn = 1, kEpilogue = 5 };  // of each warpgroup; 0 is __syncthreads

  using Scores = float[kKeys / 2];  // element e: row half e / 2 % 2, columns e / 4 * 8 + e % 2

 public:
  /// Does the warpgroup decide on bets, or each warp?
  static constexpr bool kVotes = S.head_dim > 64;
  /// Does the output leave through the query tile?
  static constexpr bool kStaged = S.output_dtype == S.dtype && S.query_stages > 1;

  ATTUNE_DEVICE Sm90Consumer(const ForwardSm90Params& params, Memory memory, u32 group)
      : p_(params),
        memory_(memory),
        keys_(memory.keys()),
        values_(memory.values()),
        queries_(memory.queries(group)),
        group_(group) {}

  ATTUNE_DEVICE void run() {
    if (kPingPong && group_ == kGroups - 1) pass_turn();
#pragma unroll 1
    while (true) {
      queries_.wait(query_at_);
      const Sm90Work work = current_work();
      if (work.last < 0) break;
      attend(work);
      finish();
      query_at_.advance();
    }
  }

 private:
  ATTUNE_DEVICE Sm90Work current_work() const {
    const ptx::Word4 word = ptx::ld_shared_word4(memory_.work(group_, query_at_.stage));
    return {word.x, word.y, word.z, word.w};
  }

  // Of the block: a launch parameter where all blocks are alike.
  ATTUNE_DEVICE Window window() const {
    if constexpr (kVarlen) return window_;
    return p_.forward.window;
  }
  ATTUNE_DEVICE i32 len_k() const {
    if constexpr (kVarlen) return len_k_;
    return p_.forward.len_k;
  }

  // ---- Turns: one warpgroup issues its products while the others do their softmax ----

  ATTUNE_DEVICE void await_turn() const {
    if constexpr (kPingPong) ptx::bar_sync(kTurn + group_, 2 * kWarpgroup);
  }
  ATTUNE_DEVICE void pass_turn() const {
    if constexpr (kPingPong)
      ptx::bar_arrive(kTurn + (group_ + 1 == kGroups ? 0 : group_ + 1), 2 * kWarpgroup);
  }

  // ---- One tile of queries ----

  ATTUNE_DEVICE void attend(const Sm90Work& work) {
    const Block block = block_of<S>(p_.forward, work.block);
    const i32 first_row = work.begin + static_cast<i32>(group_) * kGroupRows;
    const i32 end_row = min(first_row + kGroupRows, block.len_q);
    row_ = first_row + static_cast<i32>(thread() / 32 * 16 + lane() / 4);
    if constexpr (kVarlen) {
      len_k_ = block.len_k;
      window_ = window_of_block<S>(p_.forward, block);
    }
    // The block's tiles [first, last), this warpgroup's own [own_first, own_last), and those that need no
    // mask.
    const i32 first = Schedule::first_of(p_, block, work);
    const KeyRange own = visited_keys<S>(window(), len_k(), first_row, end_row);
    const KeyRange clear = unmasked_keys<S>(window(), len_k(), first_row, end_row);
    const bool sees = first_row < end_row && own.begin < own.end;
    const i32 own_first = S.window_left == Edge::open || !sees ? first : max(first, own.begin / kKeys);
    const i32 own_last = sees ? min(work.last, ceil_div(own.end, kKeys)) : first;
    const i32 clear_last = max(clear.end, 0) / kKeys;
    const i32 clear_first = S.window_left == Edge::open ? 0 : ceil_div(max(clear.begin, 0), kKeys);

    clear_rows();
    if constexpr (kQueryRegisters) load_query();
    i32 n = work.last - 1;
#pragma unroll 1
    for (; n >= own_last; --n) skip(n > first);
    if (own_first < own_last) {
      if constexpr (kDrawsFirst) draw(n * kKeys);
      keys_.wait(key_at_);
      multiply_query_key();
      ptx::wgmma_wait_group<0>();
      ptx::pin(scores_);
      probabilities(n, n < clear_first || n >= clear_last, true);
      pack_probabilities(n);
      clear_foreign_values(n);
      i32 trust = clear_last;  // tiles from here on are taken the exact way
#pragma unroll 1
      for (--n; n >= own_first; --n) {
        const bool masked = n < clear_first || n >= clear_last;
        const bool exact = masked || n >= trust;
        if (step(n, masked, exact) && !exact) trust = 0;
      }
      end_queries();
      values_.wait(value_at_);
      multiply_probability_value();
      finish_value();
    } else {
      end_queries();
    }
    if constexpr (S.window_left == Edge::bounded) {
#pragma unroll 1
      for (; n >= first; --n) skip(true);
    }
  }

  /// No product takes this tile of queries any more: the next may come where the output does not need its
  /// place.
  ATTUNE_DEVICE void end_queries() {
    if constexpr (!kStaged) {
      ended_ = current_work();
      queries_.release(query_at_);  // by every thread: each has read the work item, too
    }
  }

  /// A tile that this warpgroup has no use for. Every warpgroup takes as many turns as there are tiles, less
  /// one.
  ATTUNE_DEVICE void skip(bool takes_turn) {
    keys_.wait(key_at_);
    release_key();
    values_.wait(value_at_);
    release_value();
    if (takes_turn) {
      await_turn();
      pass_turn();
    }
  }

  /// S_n = Q K_n^T and O += P_n+1 V_n+1, the softmax of S_n under the latter. Was O rescaled?
  ATTUNE_DEVICE bool step(i32 n, bool masked, bool exact) {
    if constexpr (kDrawsFirst) draw(n * kKeys);
    keys_.wait(key_at_);
    await_turn();
    multiply_query_key();
    values_.wait(value_at_);
    multiply_probability_value();
    pass_turn();
    ptx::wgmma_wait_group<1>();
    ptx::pin(scores_);
    const bool moved = probabilities(n, masked, exact);
    finish_value();
    pack_probabilities(n);
    if (moved) rescale_output();
    return moved;
  }

  /// The last keys of a block's last tile may belong to another sequence. Their weights are 0, but 0 times
  /// NaN is not: their values become 0.
  ATTUNE_DEVICE void clear_foreign_values(i32 n) const {
    const i32 foreign = (n + 1) * kKeys - len_k();
    if (!kVarlen || foreign <= 0) return;
    values_.wait(value_at_);
    constexpr i32 kRowChunks = Sm90Shared::kPanelRowBytes / 16;
    const i32 chunks = foreign * kRowChunks;
#pragma unroll 1
    for (i32 panel = 0; panel < Memory::kShared.panels_v; ++panel) {
      const u32 end = values_.tile(value_at_) + (panel + 1) * kKeys * Sm90Shared::kPanelRowBytes;
#pragma unroll 1
      for (i32 chunk = static_cast<i32>(thread()); chunk < chunks; chunk += kWarpgroup) {
        ptx::st_shared_word4(end - (chunk + 1) * 16, {0, 0, 0, 0});
      }
    }
    ptx::fence_proxy_async();
    ptx::bar_sync(kEpilogue + group_, kWarpgroup);
  }

  /// By each warp where it decides alone: it may have multiplied again, or read the bias, later than the
  /// others.
  ATTUNE_DEVICE void release_key() {
    if constexpr (!kVotes) __syncwarp();
    if (kVotes ? elected() : lane() == 0) keys_.release(key_at_);
    key_at_.advance();
  }
  ATTUNE_DEVICE void release_value() {
    if (elected()) values_.release(value_at_);
    value_at_.advance();
  }
  /// Waits for O += P V and lets the values go.
  ATTUNE_DEVICE void finish_value() {
    ptx::wgmma_wait_group<0>();
    ptx::pin(output_);
    release_value();
  }

  ATTUNE_DEVICE void clear_rows() {
#pragma unroll
    for (i32 e = 0; e < kDimV / 2; ++e) output_[e] = 0.0f;
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
      reference_[half] = neg_inf();
      sum_[half] = 0.0f;
      factor_[half] = 1.0f;
    }
  }

  /// This warpgroup's queries as operands in registers.
  ATTUNE_DEVICE void load_query() {
    const u32 row = thread() / 32 * 16 + lane() % 16;
#pragma unroll
    for (i32 k = 0; k < kDimSteps; ++k) {
      u32(&fragment)[4] = query_[k];
      ptx::ldmatrix_x4(fragment, queries_.tile(query_at_) +
                                     panel_offset<kGroupRows>(row, k * 2 + static_cast<i32>(lane() / 16)));
    }
  }

  /// S = Q K^T; asynchronous.
  ATTUNE_DEVICE void multiply_query_key() {
    const u64 key = ptx::wgmma_descriptor(keys_.tile(key_at_));
    const u64 query = ptx::wgmma_descriptor(queries_.tile(query_at_));
    ptx::pin(scores_);
    ptx::wgmma_fence();
#pragma unroll
    for (i32 k = 0; k < kDimSteps; ++k) {
      const u64 key_k = key + static_cast<u64>(k / 4 * (kKeys * 128 >> 4) + k % 4 * 2);
      if constexpr (kQueryRegisters) {
        ptx::Wgmma<kKeys>::template multiply<S.dtype, ptx::Major::k>(scores_, query_[k], key_k, k > 0);
      } else {
        const u64 query_k = query + static_cast<u64>(k / 4 * (kGroupRows * 128 >> 4) + k % 4 * 2);
        ptx::Wgmma<kKeys>::template multiply<S.dtype>(scores_, query_k, key_k, k > 0);
      }
    }
    ptx::wgmma_commit_group();
  }

  /// S = Q K^T where the bet was lost, and done.
  ATTUNE_DEVICE void multiply_again() {
    if constexpr (kVotes) {
      multiply_query_key();
      ptx::wgmma_wait_group<0>();
      ptx::pin(scores_);
    } else {
      multiply_alone();
    }
  }

  /// Of this warp's 16 rows: a product of the warpgroup would take all its warps.
  ATTUNE_DEVICE void multiply_alone() {
    u32 query[4], key[4];  // of two tiles of 8 keys
    const u32 row = thread() / 32 * 16 + lane() % 16;
    const u32 key_row = lane() / 16 * 8 + lane() % 8;
#pragma unroll
    for (i32 e = 0; e < kKeys / 2; ++e) scores_[e] = 0.0f;
    // One step alone would be unrolled all the same, and take registers that four warpgroups do not have.
    const i32 steps = kDimSteps == 1 ? ptx::opaque(1) : kDimSteps;
#pragma unroll 1
    for (i32 k = 0; k < steps; ++k) {
      const auto chunk = static_cast<i32>(k * 2 + lane() / 16);
      const auto key_chunk = static_cast<i32>(k * 2 + lane() / 8 % 2);
      ptx::ldmatrix_x4(query, queries_.tile(query_at_) + panel_offset<kGroupRows>(row, chunk));
      const u32 keys = keys_.tile(key_at_) + panel_offset<kKeys>(key_row, key_chunk);
#pragma unroll
      for (i32 n = 0; n < kKeys / 16; ++n) {
        ptx::ldmatrix_x4(key, keys + n * kPanelBytes<16>);
        ptx::mma_m16n8k16<S.dtype>(reinterpret_cast<float(&)[4]>(scores_[n * 8]), query, key[0], key[1]);
        ptx::mma_m16n8k16<S.dtype>(reinterpret_cast<float(&)[4]>(scores_[n * 8 + 4]), query, key[2], key[3]);
      }
    }
  }

  /// O += P V; asynchronous.
  ATTUNE_DEVICE void multiply_probability_value() {
    const u64 value = ptx::wgmma_descriptor(values_.tile(value_at_), kKeys * 128);
    ptx::pin(output_);
    ptx::wgmma_fence();
#pragma unroll
    for (i32 k = 0; k < kKeys / 16; ++k) {
      ptx::Wgmma<kDimV>::template multiply<S.dtype, ptx::Major::mn>(
          output_, probability_[k], value + static_cast<u64>(k * (16 * 128 >> 4)), true);
    }
    ptx::wgmma_commit_group();
  }

  // ---- Softmax ----

  /// Scores of tile n become probabilities. The key tile is let go at the end, where the bet and the exact
  /// way have met again: earlier, in each of them, it would cost registers. Does O owe a rescale?
  ATTUNE_DEVICE bool probabilities(i32 n, bool masked, bool exact) {
    complete_scores();
    if (!exact && bet_is_lost()) {
      exact = true;
      multiply_again();
      complete_scores();
    }
    if (exact) {
      // As the vote does: every warp has read the bias, which goes with the keys.
      if constexpr (kVotes && S.bias != Bias::none) ptx::bar_sync(kEpilogue + group_, kWarpgroup);
      if (masked) hide_invisible(n * kKeys);
      exponentiate();
    }
    release_key();
    return exact;
  }

  /// Products become what the softmax takes: its factor is positive_scale2().
  ATTUNE_DEVICE void complete_scores() {
    if (!kAdditive && !(p_.forward.scale > 0.0f)) fold_sign();
    if constexpr (S.bias != Bias::none) add_bias();
  }

  /// Numbers are added to scaled scores, both in base e.
  ATTUNE_DEVICE void add_bias() {
    const i32 thread = static_cast<i32>(ptx::opaque(threadIdx.x)) - kWarpgroup;  // of all consumers
    const BiasTile<S> bias(keys_.tile(key_at_) + Memory::kShared.key_bytes, thread / 32 * 16,
                           p_.bias_rows == 1, thread % 32);
#pragma unroll
    for (i32 k = 0; k < kKeys / 16; ++k) {
      float element[8];
      bias.load(element, k);
#pragma unroll
      for (i32 e = 0; e < 8; ++e) {
        float& score = scores_[k * 8 + e];
        score = kAdditive ? fmaf(score, p_.forward.scale, element[e]) : with_bias<S.bias>(score, element[e]);
      }
    }
  }

  /// The softmax takes maxima before it scales, which needs a positive factor: a negative scale becomes its
  /// absolute value and negated scores, scale 0 becomes 1 and scores times 0.
  ATTUNE_DEVICE void fold_sign() {
    const float sign = p_.forward.scale < 0.0f ? -1.0f : 0.0f;
#pragma unroll
    for (i32 e = 0; e < kKeys / 2; ++e) scores_[e] *= sign;
  }
  ATTUNE_DEVICE float positive_scale2() const {
    if constexpr (kAdditive) return kLog2e;
    return p_.forward.scale == 0.0f ? 1.0f : fabsf(p_.forward.scale) * kLog2e;
  }

  ATTUNE_DEVICE void hide_invisible(i32 key) {
    const i32 column = key + static_cast<i32>(lane() % 4 * 2);
#pragma unroll
    for (i32 e = 0; e < kKeys / 2; ++e) {
      if (!visible<S>(window(), len_k(), row_ + e / 2 % 2 * 8, column + e / 4 * 8 + e % 2)) {
        scores_[e] = neg_inf();
      }
    }
  }

  /// The exact way: relative to the running maximum. O and the sums then owe `factor_`.
  ATTUNE_DEVICE void exponentiate() {
    const float scale2 = positive_scale2();
    float largest[2][2] = {{scores_[0], scores_[1]}, {scores_[2], scores_[3]}};
#pragma unroll
    for (i32 e = 4; e < kKeys / 2; ++e)
      largest[e / 2 % 2][e % 2] = fmaxf(largest[e / 2 % 2][e % 2], scores_[e]);
    float shift[2];
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
      const float top = quad_max(fmaxf(largest[half][0], largest[half][1])) * scale2;
      const float before = reference_[half];
      reference_[half] = fmaxf(top, before);
      shift[half] = safe_max(reference_[half]);
      factor_[half] = ptx::ex2_approx_ftz(before - shift[half]);
      sum_[half] *= factor_[half];
    }
#pragma unroll
    for (i32 e = 0; e < kKeys / 2; ++e) {
      scores_[e] = ptx::ex2_approx_ftz(fmaf(scores_[e], scale2, -shift[e / 2 % 2]));
    }
#pragma unroll
    for (i32 e = 0; e < kKeys / 2; e += 2) sum_[e / 2 % 2] += scores_[e] + scores_[e + 1];
  }

  /// The bet: relative to the reference as it stands. True: it is lost, and the scores are gone. Warps that
  /// multiply again together decide together.
  ATTUNE_DEVICE bool bet_is_lost() {
    const float scale2 = positive_scale2();
    float part[2][2] = {};
#pragma unroll
    for (i32 e = 0; e < kKeys / 2; ++e) {
      scores_[e] = ptx::ex2_approx_ftz(fmaf(scores_[e], scale2, -reference_[e / 2 % 2]));
      part[e / 2 % 2][e % 2] += scores_[e];
    }
    const float sum[2] = {part[0][0] + part[0][1], part[1][0] + part[1][1]};
    const bool mine = !(sum[0] <= kSumLimit && sum[1] <= kSumLimit);  // NaN loses too
    const bool lost =
        kVotes ? ptx::bar_red_or(kEpilogue + group_, kWarpgroup, mine) : __any_sync(0xffffffffu, mine) != 0;
    if (!lost) {
      sum_[0] += sum[0];
      sum_[1] += sum[1];
    }
    return lost;
  }

  ATTUNE_DEVICE void pack_probabilities(i32 n) {
#pragma unroll
    for (i32 e = 0; e < kKeys / 4; ++e)
      probability_[e / 4][e % 4] = pack<S.dtype>(scores_[2 * e], scores_[2 * e + 1]);
    if constexpr (S.dropout == Dropout::on) {
      if constexpr (!kDrawsFirst) draw(n * kKeys);
      drop();
    }
  }

  // ---- Dropout ----

  /// What of the tile at `key` is dropped. It can't be drawn while products run: ptxas would move it behind
  /// their end, as it keeps only waits at barriers in their place.
  ATTUNE_DEVICE void draw(i32 key) {
    const auto& p = dropout();
    const Sm90Work work = current_work();
    const DropTest test(p);
    const i32 first_call = dropout_call(key) + static_cast<i32>(ptx::opaque(threadIdx.x) % 4);
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
      const DropoutWord query(static_cast<u32>(row_ + half * 8));
#pragma unroll
      for (i32 c = 0; c < kCalls; ++c) {
        const Philox<DropoutWord> bits = dropout_bits(p, work.block, work.head, query, first_call + c * 4);
#pragma unroll
        for (i32 n = 0; n < 4; ++n) {
          const u32 word = bits.word[n].bits;
          drawn_[half][c][n] = kDrawsFirst ? test.dropped(word) : word;
        }
      }
    }
    if constexpr (!kDrawsFirst) {  // the complement, which only p above 0.5 needs, behind a branch
      if (test.complements()) for_drawn([](u32& word) { word = ~word; });
      for_drawn([&](u32& word) { word = test.below(word); });
    }
  }
  /// Of the call, or as the launch made them ready, which saves instructions: with two warpgroups that is
  /// faster only where O leaves few registers.
  ATTUNE_DEVICE const auto& dropout() const {
    if constexpr (kDrawsFirst && kDimV <= 192) {
      return p_.forward.dropout;
    } else {
      return p_.dropout;
    }
  }
  /// Of each word, or mask, of the tile.
  template <typename Function>
  ATTUNE_DEVICE void for_drawn(Function function) {
#pragma unroll
    for (i32 e = 0; e < 8 * kCalls; ++e) function(drawn_[e / 4 / kCalls][e / 4 % kCalls][e % 4]);
  }
  /// Of the packed probabilities, which the sums do not notice; the survivors are scaled up in finish().
  ATTUNE_DEVICE void drop() {
    const DropTest test(dropout());
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
#pragma unroll
      for (i32 c = 0; c < kCalls; ++c) {
#pragma unroll
        for (i32 n = 0; n < 4; ++n)
          test.drop(probability_[c * 2 + n / 2][half + n % 2 * 2], drawn_[half][c][n]);
      }
    }
  }

  ATTUNE_DEVICE void rescale_output() {
#pragma unroll
    for (i32 e = 0; e < kDimV / 2; ++e) output_[e] *= factor_[e / 2 % 2];
  }

  // ---- The end of a tile ----

  /// Normalises, writes the LSE and the output.
  ATTUNE_DEVICE void finish() {
    // Read anew: kept through the loop it would occupy registers.
    const Sm90Work work = kStaged ? current_work() : ended_;
    const Block block = block_of<S>(p_.forward, work.block);
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
      const float sum = quad_sum(sum_[half]);
      factor_[half] = inverse_sum(sum) * (S.dropout == Dropout::on ? p_.forward.dropout.rescale : 1.0f);
      if constexpr (S.lse == Lse::write) write_lse(work, block, row_ + half * 8, reference_[half], sum);
    }
    rescale_output();
    if constexpr (kStaged) {
      store_staged(work, block);
      queries_.release(query_at_);  // by every thread: each has read the work item, too
    } else {
      store_directly(work, block);
    }
  }

  /// The output leaves through this warpgroup's query tile.
  ATTUNE_DEVICE void store_staged(const Sm90Work& work, const Block& block) const {
    ptx::bar_sync(kEpilogue + group_, kWarpgroup);  // every warp's products have read the queries
    const u32 tile = queries_.tile(query_at_);
    const u32 row = thread() / 32 * 16 + lane() % 16;
#pragma unroll
    for (i32 k = 0; k < kDimV / 16; ++k) {
      const float* o = output_ + k * 8;
      ptx::stmatrix_x4(tile + panel_offset<kGroupRows>(row, k * 2 + static_cast<i32>(lane() / 16)),
                       pack<S.dtype>(o[0], o[1]), pack<S.dtype>(o[2], o[3]), pack<S.dtype>(o[4], o[5]),
                       pack<S.dtype>(o[6], o[7]));
    }
    ptx::fence_proxy_async();
    ptx::bar_sync(kEpilogue + group_, kWarpgroup);
    const i32 first_row = work.begin + static_cast<i32>(group_) * kGroupRows;
    if (kVarlen && first_row + kGroupRows > block.len_q) {
      store_rows(work, block, first_row);
    } else if (elected()) {
      store_tile({0, block.q_begin + first_row, work.head, block.batch});
    }
  }

  ATTUNE_DEVICE void store_directly(const Sm90Work& work, const Block& block) const {
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
      const i32 query = row_ + half * 8;
      const bool inside = query < block.len_q;
      const i64 offset = output_offset(work, block, inside ? query : 0);
      if constexpr (S.output_dtype == DType::f32) {
        store_row_f32(static_cast<float*>(p_.forward.output) + offset, half, inside);
      } else {
        store_row(static_cast<u16*>(p_.forward.output) + offset, half, inside);
      }
    }
  }
  ATTUNE_DEVICE void store_row_f32(float* row, i32 half, bool inside) const {
    if (!inside) return;
#pragma unroll
    for (i32 n = 0; n < S.head_dim_v / 8; ++n) {
      const float* pair = output_ + n * 4 + half * 2;
      *reinterpret_cast<float2*>(row + n * 8 + lane() % 4 * 2) = make_float2(pair[0], pair[1]);
    }
  }
  /// A quad of lanes holds 8 columns at a time: a lane gets one of four eights whole.
  ATTUNE_DEVICE void store_row(u16* row, i32 half, bool inside) const {
    constexpr i32 kEights = S.head_dim_v / 8;
#pragma unroll
    for (i32 n = 0; n < kEights; n += 4) {
      u32 pairs[4] = {};
#pragma unroll
      for (i32 i = 0; i < 4 && n + i < kEights; ++i) {
        const float* pair = output_ + (n + i) * 4 + half * 2;
        pairs[i] = pack<S.dtype>(pair[0], pair[1]);
      }
      quad_transpose(pairs);
      const i32 eight = n + static_cast<i32>(lane() % 4);
      if (inside && eight < kEights) {
        *reinterpret_cast<int4*>(row + eight * 8) = *reinterpret_cast<const int4*>(pairs);
      }
    }
  }

  /// Elements from the output's start to its row for a query of the block.
  ATTUNE_DEVICE i64 output_offset(const Sm90Work& work, const Block& block, i32 query) const {
    const Strides& strides = p_.forward.output_strides;
    return block.batch * strides.batch + work.head / p_.forward.heads * strides.group +
           work.head % p_.forward.heads * strides.head + (block.q_begin + query) * strides.seq;
  }

  /// The copy engine leaves out what is outside the tensor.
  ATTUNE_DEVICE void store_tile(ptx::BoxOrigin origin) const {
    const u32 tile = queries_.tile(query_at_);
#pragma unroll
    for (i32 panel = 0; panel < Memory::kShared.panels_v; ++panel) {
      origin.column = panel * Sm90Shared::kPanelElements;
      ptx::cp_async_bulk_tensor_store(p_.output, tile + panel * kGroupRows * Sm90Shared::kPanelRowBytes,
                                      origin);
    }
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read<0>();
  }

  /// But not the rows of the next sequence.
  ATTUNE_DEVICE void store_rows(const Sm90Work& work, const Block& block, i32 first_row) const {
    constexpr i32 kChunks = S.head_dim_v / 8;
    const i64 row_stride = p_.forward.output_strides.seq;
    u16* rows = static_cast<u16*>(p_.forward.output) + output_offset(work, block, first_row);
    const i32 count = min(block.len_q - first_row, kGroupRows) * kChunks;
#pragma unroll 1
    for (i32 i = static_cast<i32>(thread()); i < count; i += kWarpgroup) {
      const i32 row = i / kChunks;
      const i32 chunk = i % kChunks;
      const ptx::Word4 w = ptx::ld_shared_word4(queries_.tile(query_at_) +
                                                panel_offset<kGroupRows>(static_cast<u32>(row), chunk));
      *reinterpret_cast<int4*>(rows + row * row_stride + chunk * 8) = make_int4(w.x, w.y, w.z, w.w);
    }
  }

  ATTUNE_DEVICE void write_lse(const Sm90Work& work, const Block& block, i32 query, float reference,
                               float sum) const {
    if (lane() % 4 != 0 || query >= block.len_q) return;
    // A row that saw nothing: -inf + log2(0).
    p_.forward.lse[(i64{block.batch} * p_.heads + work.head) * p_.forward.len_q + block.q_begin + query] =
        (reference + ptx::lg2_approx_ftz(sum)) * kLn2;
  }

  const ForwardSm90Params& p_;
  const Memory memory_;
  const typename Memory::KeyRing keys_;
  const typename Memory::ValueRing values_;
  const typename Memory::QueryRing queries_;
  const u32 group_;
  typename Memory::KeyRing::Cursor key_at_{0}, value_at_{0};
  typename Memory::QueryRing::Cursor query_at_{0};
  Sm90Work ended_;
  i32 row_ = 0;  // this thread's first query; the second is 8 further down
  Window window_;
  i32 len_k_ = 0;

  Scores scores_;
  float output_[kDimV / 2];
  u32 probability_[kKeys / 16][4];
  u32 drawn_[2][kCalls][4];  // words, and then masks of pairs, by row halves
  u32 query_[kQueryRegisters ? kDimSteps : 1][4];
  float reference_[2];  // in base 2, scaled; -inf until a key was seen
  float sum_[2];        // of this thread's columns
  float factor_[2];
};

template <KernelSpec S>
ATTUNE_DEVICE void forward_sm90(const ForwardSm90Params& params) {
  static_assert(S.family == Family::sm90 && S.dtype != DType::f32);
  static_assert(S.output_dtype == S.dtype || S.output_dtype == DType::f32);
  static_assert(S.dropout == Dropout::off || S.block_n % kDropoutGroup == 0);
  static_assert(S.bias == Bias::none || S.blocks == Blocks::dense,
                "boxes begin at 16 bytes' multiples of a row");
  static_assert(S.head_dim % 8 == 0 && S.head_dim_v % 8 == 0 && S.head_dim <= 256 && S.head_dim_v <= 256);
  static_assert(S.block_m % kGroupRows == 0 && S.block_n % 16 == 0);
  constexpr i32 kGroups = S.block_m / kGroupRows;
  static_assert(S.warps == 4 * (kGroups + 1));
  constexpr bool kBias = S.bias != Bias::none;
  constexpr bool kUneven = Sm90Schedule<S>::kUneven || kBias;
  constexpr bool kLaden = kBias || (S.blocks == Blocks::varlen && S.dropout == Dropout::on);
  constexpr i32 kProducerRegisters = kGroups == 2   ? (kUneven ? 40 : 24)
                                     : kGroups == 3 ? (kLaden ? 56 : 32)
                                                    : 32;
  constexpr i32 kConsumerRegisters = kGroups == 2   ? (kUneven ? 232 : 240)
                                     : kGroups == 3 ? (kLaden ? 152 : 160)
                                                    : 112;

  extern __shared__ __align__(1024) u8 shared[];
  const Sm90Memory<S> memory{ptx::shared_address(shared)};
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {&params.query, &params.key, &params.value}) ptx::prefetch_tensormap(*map);
    if constexpr (Sm90Consumer<S>::kStaged) ptx::prefetch_tensormap(params.output);
    if constexpr (S.bias != Bias::none) ptx::prefetch_tensormap(params.bias);
    memory.keys().init(Sm90Consumer<S>::kVotes ? kGroups : 4 * kGroups);
    memory.values().init(kGroups);
    for (u32 group = 0; group < kGroups; ++group) memory.queries(group).init(kWarpgroup);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // uniform, and known to be
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x < Sm90Producer<S>::kLanes) Sm90Producer<S>(params, memory).run();
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    Sm90Consumer<S>(params, memory, warp / 4 - 1).run();
  }
}

}  // namespace attune::kernel
