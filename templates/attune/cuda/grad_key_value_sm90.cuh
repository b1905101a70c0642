// Gradients of key and value on Hopper, with the query's added up beside them: products of warpgroups
// (wgmma), tiles by the tensor copy engine, warp-specialised.
//
// A block stays on its SM and takes one tile of 128 keys after the other. One warp of it, the producer,
// copies the keys and values, and then a ring of tiles of queries and output gradients, of every head that
// shares them; two warpgroups of 128 threads own 64 keys each:
//
//                   queries      |  Q m  | Q m+1 |       ring of `stages`, with the LSE and delta of
//                   output grads | dO m  | dO m+1|       each query
//        +--------+
//   K, V | 64 x D |  warpgroup 0:  S^T = K Q^T   P^T = exp2(S^T - LSE)      dV += P^T dO
//   K, V | 64 x D |  warpgroup 1   dP^T = V dO^T dS^T = P^T (dP^T - delta)  dK += dS^T Q
//        +--------+                              dQ = dS K, shared by the warpgroups
//
// Scores are computed with keys as rows, so that P^T and dS^T are operands of dV and dK where they are, in
// registers. Only dS crosses shared memory: dQ sums over the keys of both warpgroups. Of it each computes 64
// rows or 64 columns and leaves them to a warp of the producer's, an adder, which has the copy engine add
// them to the float32 sums in memory (the structure of Shah et al., FlashAttention-3, arXiv 2407.08608).
// Where tiles take turns to add (ADR 9), one more warp watches for them.
//
// A tile of packed sequences is rows of the tensors, which may be keys of several sequences, or with pages of
// whichever the table says. It is worked on once for each, and rows that are not the sequence's become 0 in
// shared memory. A tile of a bias tensor comes with each tile of queries. Where its gradient is stored here,
// that is the tile of dS which the warpgroups exchange: the copy engine takes it to memory as it is.
//
// Registers of one thread:    producer  consumer    S + dP, or dS + P + dQ, beside dK + dV
//   head dim  64, 128 x 128   24        240         64 + 64, or 32 + 32 + 32, beside 32 + 32
//   head dim 128,  64 x 128   24        240         32 + 32, or 16 + 16 + 32, beside 64 + 64
//   sequences with a bias and
//   dropout: 64,  64 x 128    40        232         32 + 32, or 16 + 16 + 32, beside 32 + 32
#pragma once

#include "attune/cuda/dropout_sm90.cuh"
#include "attune/cuda/grad_key_value_sm90_producer.cuh"
#include "attune/cuda/grad_key_value_sm90_sums.cuh"
#include "attune/cuda/grad_key_value_sm90_tiles.cuh"
#include "attune/cuda/panels.cuh"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/ptx_sm90.cuh"
#include "attune/cuda/ptx_wgmma.cuh"
#include "attune/cuda/score_bias.cuh"
#include "attune/cuda/tile.cuh"
#include "attune/cuda/warpgroup.cuh"
#include "attune/num.h"
#include "attune/params.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

/// In place of a warpgroup's number: both, which run the same code.
inline constexpr i32 kBoth = -1;

/// Until both warpgroups have come here, with the number of this one, or kBoth where they run the same code.
/// Else they are at two places, where PTX allows one barrier, but compute-sanitizer takes it for an error. So
/// each waits at a barrier of its own, one after the other: who comes back sooner is not counted twice. Where
/// warpgroups differ there are no adders, whose barriers these are.
template <i32 Group>
ATTUNE_DEVICE void meet() {
  constexpr u32 kMet = kTaken + 2;
  constexpr u32 kThreads = GradKeyValueSm90Shared::kWarpgroups * kWarpgroup;
  if constexpr (Group == kBoth) {
    ptx::bar_sync(kExchange, kThreads);
  } else if constexpr (Group == 0) {
    ptx::bar_sync(kMet, kThreads);
    ptx::bar_arrive(kMet + 1, kThreads);
  } else {
    ptx::bar_arrive(kMet, kThreads);
    ptx::bar_sync(kMet + 1, kThreads);
  }
}

/// Rows of so many panels, one behind the other, become 0, unless stays(row). By all consumers.
template <i32 Group, i32 Rows, i32 Panels, typename Stays>
ATTUNE_DEVICE void clear_rows(u32 tiles, Stays&& stays) {
  constexpr i32 kThreads = GradKeyValueSm90Shared::kWarpgroups * kWarpgroup;
  constexpr i32 kRowChunks = Sm90Shared::kPanelRowBytes / 16;
  constexpr i32 kChunks = Panels * Rows * kRowChunks;
#pragma unroll 1
  for (i32 i = static_cast<i32>(threadIdx.x) - kWarpgroup; i < kChunks; i += kThreads) {
    const i32 row = i / kRowChunks % Rows;
    if (!stays(row)) ptx::st_shared_word4(tiles + static_cast<u32>(i * 16), {0, 0, 0, 0});
  }
  ptx::fence_proxy_async();
  meet<Group>();
}

/// Keys that no query of the block sees, and their values, may be NaN, which times a gradient of 0 would be
/// NaN in dQ: they become 0.
template <i32 Group, KernelSpec S>
ATTUNE_DEVICE void clear_unseen_keys(const ForwardParams& p, Sm90Memory<S> memory, i32 begin) {
  constexpr i32 kPanels = Sm90Memory<S>::kShared.panels;
  const Sm90Part keys = part_of(memory);
  const i32 first = S.cluster == 0 ? begin : begin - cluster_rank<S>() * S.block_n;
  if (keys.first <= first && min(first + cluster_keys(S), p.len_k) <= keys.last) return;
  const auto seen_from = [&](i32 tile) {
    return [&, tile](i32 row) { return keys.first <= tile + row && tile + row < keys.last; };
  };
  clear_rows<Group, S.block_n, 2 * kPanels>(memory.base, seen_from(begin));
  if constexpr (S.cluster != 0) {
    const i32 other = 2 * first + S.block_n - begin;
    clear_rows<Group, S.block_n, kPanels / 2>(memory.other_key_tile(), seen_from(other));
  }
}

/// Queries of the next sequence become zeros, and so do their outputs' gradients; void ones (backward.h),
/// too.
template <KernelSpec S, i32 Group>
ATTUNE_DEVICE void clear_void_queries(Sm90Memory<S> memory, const typename Sm90Memory<S>::QueryCursor& at) {
  constexpr i32 kPanels = 2 * Sm90Memory<S>::kShared.panels;
  const Sm90Step step = step_at(memory, at);
  if (step.rows < S.block_m) {
    clear_rows<Group, S.block_m, kPanels>(memory.query_tile(at), [&](i32 row) { return row < step.rows; });
  }
  if ((step.masked & kVoidQueries) != 0) {
    clear_rows<Group, S.block_m, kPanels>(memory.query_tile(at), [&](i32 row) {
      return !is_void(float_of(ptx::ld_shared_b32(memory.numbers(at) + row * 4)));
    });
  }
}

/// Of rows: query i sees key j iff i + lower <= j <= i + upper.
template <KernelSpec S>
ATTUNE_DEVICE Window window_of_rows(const ForwardParams& p, Sm90Memory<S> memory) {
  if constexpr (S.blocks != Blocks::varlen) return p.window;
  const ptx::Word4 w = ptx::ld_shared_word4(memory.window());
  return {w.x, w.y};
}

// ---- The gradient of a bias tensor: the tiles of dS as they are exchanged ----

/// Is it this thread, the first of its warpgroup, that stores it?
template <KernelSpec S>
ATTUNE_DEVICE bool stores_bias_gradient(const GradKeyValueSm90Params& p) {
  return stores_bias_gradient(S) && p.backward.grad_bias != nullptr && threadIdx.x % kWarpgroup == 0;
}

/// Of a step, from its keys `first` on.
template <KernelSpec S>
ATTUNE_DEVICE void store_bias_gradient(const GradKeyValueSm90Params& p, u32 panel, i32 first,
                                       const Sm90Step& step, i32 batch) {
  if (!stores_bias_gradient<S>(p)) return;
  ptx::cp_async_bulk_tensor_store(p.grad_bias, panel, {first, step.begin, step.head, batch});
  ptx::cp_async_bulk_commit_group();
}

/// Before others may write to the tile that was stored last.
template <KernelSpec S>
ATTUNE_DEVICE void await_bias_gradient(const GradKeyValueSm90Params& p) {
  if (stores_bias_gradient<S>(p)) ptx::cp_async_bulk_wait_group_read<0>();
}

// ---- Scores ----

/// Scores S^T in base 2, with their bias. `key` is the warp's first in the tile.
template <KernelSpec S>
ATTUNE_DEVICE void add_bias(float (&score)[S.block_m / 2], u32 tile, i32 key, bool one_row, float scale2) {
  const KeyRowBiasTile<S> bias(tile, key, one_row, static_cast<i32>(threadIdx.x % 32));
#pragma unroll
  for (i32 k = 0; k < S.block_m / 16; ++k) {
    float element[8];
    bias.load(element, k);
#pragma unroll
    for (i32 e = 0; e < 8; ++e) score[k * 8 + e] = with_bias<S.bias>(score[k * 8 + e] * scale2, element[e]);
  }
}

/// Scores S^T in base 2, less the LSE of their queries, with which a stage's numbers begin.
template <KernelSpec S>
ATTUNE_DEVICE void subtract_lse(float (&score)[S.block_m / 2], u32 numbers, float scale2) {
#pragma unroll
  for (i32 e = 0; e < S.block_m / 2; e += 4) {
    const float2 lse2 = ptx::ld_shared_float2(numbers + threadIdx.x % 4 * 8 + e * 8);
#pragma unroll
    for (i32 i = e; i < e + 4; ++i) {
      const float less = i % 2 == 0 ? lse2.x : lse2.y;
      score[i] = S.bias == Bias::none ? fmaf(score[i], scale2, -less) : score[i] - less;
    }
  }
}

/// Scores S^T of pairs that do not see each other become -inf. The thread's second key is 8 further down.
template <KernelSpec S>
ATTUNE_DEVICE void hide_invisible(float (&score)[S.block_m / 2], const ForwardParams& p, Sm90Memory<S> memory,
                                  i32 first_key, const Sm90Step& step) {
  const Window rows = window_of_rows<S>(p, memory);
  const Sm90Part keys = S.blocks == Blocks::varlen ? part_of<S>(memory) : Sm90Part{0, p.len_k, 1, 0};
  const i32 query = step.begin + static_cast<i32>(threadIdx.x % 4 * 2);
  const i32 last = hides_foreign_queries(S) ? step.begin + step.rows : p.len_q;
#pragma unroll
  for (i32 half = 0; half < 2; ++half) {
    const i32 key = first_key + half * 8;
    const QueryRange seeing = visiting_queries<S>(rows, last, key, key + 1);
    const i32 begin = seeing.begin - query;
    const i32 end = keys.first <= key && key < keys.last ? seeing.end - query : 0;
#pragma unroll
    for (i32 e = 0; e < S.block_m / 4; ++e) {
      const i32 i = e / 2 * 8 + e % 2;
      if (i < begin || i >= end) score[e / 2 * 4 + half * 2 + e % 2] = neg_inf();
    }
  }
}

/// Draws what is kept of a tile's pairs; `pair` is that of two warps.
template <KernelSpec S>
ATTUNE_DEVICE KeptKeyRows<S> kept_pairs(const DropoutParams& p, Sm90Memory<S> memory,
                                        const typename Sm90Memory<S>::QueryCursor& at, u32 pair) {
  if constexpr (S.dropout == Dropout::off) return {};
  const Sm90Step step = step_at(memory, at);
  const Sm90Work tile = work_of(memory);
  const i32 key = tile.begin + static_cast<i32>(pair * kDropoutGroup);
  const Sm90Sequence from = S.blocks == Blocks::varlen ? sequence_of(memory) : Sm90Sequence{tile.batch, 0, 0};
  return {p,
          from.index,
          step.head,
          step.begin - from.first_query,
          key - from.first_key,
          memory.drawn(pair),
          kDrawn + pair};
}

template <KernelSpec S>
class Sm90Consumer : WarpgroupThread {
  using Memory = Sm90Memory<S>;
  using Schedule = Sm90Schedule<S>;
  using Shared = GradKeyValueSm90Shared;
  static constexpr i32 kKeys = S.block_n;
  static constexpr i32 kQueries = S.block_m;
  static constexpr i32 kGroupRows = Shared::kGroupRows;
  static constexpr i32 kThreads = Shared::kWarpgroups * kWarpgroup;
  static constexpr i32 kDimSteps = ceil_div(wider_dim(S), 16);  // k16 steps of K Q^T
  static constexpr i32 kDim = round_up(wider_dim(S), 16);       // columns of dK and dV
  static constexpr bool kSplitColumns = Sm90Sums<S>::kSplitColumns;
  static constexpr i32 kSumDim = Sm90Sums<S>::kDim;
  static constexpr bool kDropout = S.dropout == Dropout::on;

  using Scores = float[kQueries / 2];  // element e: key half e / 2 % 2, queries e / 4 * 8 + e % 2
  using Operand = u32[kQueries / 16][4];
  using Gradient = float[kDim / 2];
  using Sums = float[kSumDim / 2];

 public:
  ATTUNE_DEVICE Sm90Consumer(const GradKeyValueSm90Params& params, Memory memory, u32 group)
      : p_(params),
        memory_(memory),
        keys_(memory.keys()),
        queries_(memory.queries()),
        biases_(memory.biases()),
        group_(group) {}

  ATTUNE_DEVICE void run() {
    clear();
#pragma unroll 1
    while (true) {
      keys_.wait(key_at_);
      const i32 steps = work().steps;
      if (steps < 0) break;
      if constexpr (Schedule::kUneven) clear_unseen_keys<kBoth>(p_.backward.forward, memory_, work().begin);
#pragma unroll 1
      for (i32 left = steps; left > 0; --left) step();
      if (!Schedule::kVarlen || part().ends) {
        finish();
        clear();
      } else {
        keys_.release(key_at_);
      }
      key_at_.advance();
    }
    await_bias_gradient<S>(p_);
    await_adder();
    if (elected()) ptx::st_shared_word4(memory_.target(group_, buffer_), {0, 0, 0, -1});
    announce_sums();
  }

 private:
  // Read again where they are needed: registers are for accumulators.
  ATTUNE_DEVICE Sm90Work work() const {
    return work_of(memory_);
  }
  ATTUNE_DEVICE Sm90Step this_step() const {
    return step_at(memory_, query_at_);
  }
  ATTUNE_DEVICE Sm90Part part() const {
    return part_of(memory_);
  }

  /// This thread's first; the second is 8 further down.
  ATTUNE_DEVICE i32 first_key(const Sm90Work& work) const {
    return work.begin + static_cast<i32>(group_ * kGroupRows + thread() / 32 * 16 + lane() / 4);
  }

  ATTUNE_DEVICE void clear() {
#pragma unroll
    for (i32 e = 0; e < kDim / 2; ++e) grad_key_[e] = grad_value_[e] = 0.0f;
  }

  // ---- One tile of queries ----

  ATTUNE_DEVICE void step() {
    Scores score;
    Scores gradient;
    queries_.wait(query_at_);
    if constexpr (Schedule::kVarlen) clear_void_queries<S, kBoth>(memory_, query_at_);
    multiply_scores(score, memory_.key_tile(), memory_.query_tile(query_at_));
    multiply_scores(gradient, memory_.value_tile(), memory_.grad_output_tile(query_at_));
    const auto kept = kept_pairs(p_.backward.forward.dropout, memory_, query_at_, group_ * 2 + thread() / 64);
    ptx::wgmma_wait_group<1>();
    ptx::pin(score);
    make_probabilities(score);
    ptx::wgmma_wait_group<0>();
    ptx::pin(gradient);
    make_gradients(gradient, score, kept);
    if constexpr (kDropout) drop(score, kept);
    Operand grad_score;
    Operand probability;
    pack_operand(grad_score, gradient);
    pack_operand(probability, score);
    publish(grad_score);
    multiply_columns<S.dtype>(grad_value_, probability, memory_.grad_output_tile(query_at_));
    await_bias_gradient<S>(p_);
    ptx::fence_proxy_async();
    ptx::bar_sync(kExchange, kThreads);
    store_gradients();
    Sums sums;
    multiply_sums(sums);
    ptx::wgmma_wait_group<1>();
    ptx::pin(grad_value_);
    multiply_columns<S.dtype>(grad_key_, grad_score, memory_.query_tile(query_at_));
    ptx::wgmma_wait_group<1>();
    ptx::pin(sums);
    send(sums);
    ptx::wgmma_wait_group<0>();
    ptx::pin(grad_key_);
    if (elected()) queries_.release(query_at_);
    query_at_.advance();
    buffer_ ^= 1;
  }

  /// This warpgroup's rows of K Q^T or V dO^T; asynchronous.
  ATTUNE_DEVICE void multiply_scores(Scores& d, u32 rows, u32 columns) const {
    multiply_rows<S.dtype, kKeys, kDimSteps>(d, rows + group_ * kPanelBytes<kGroupRows>, columns);
  }

  /// This warpgroup's part of dQ = dS K; asynchronous.
  ATTUNE_DEVICE void multiply_sums(Sums& d) const {
    const u32 first_row = kSplitColumns ? 0 : group_ * kPanelBytes<kGroupRows>;
    const u32 first_column = kSplitColumns ? group_ * kPanelBytes<kKeys> : 0;
    const u64 score = ptx::wgmma_descriptor(memory_.scores(buffer_) + first_row);
    const u64 key = ptx::wgmma_descriptor(memory_.key_tile() + first_column, kPanelBytes<kKeys>);
    ptx::pin(d);
    ptx::wgmma_fence();
#pragma unroll
    for (i32 k = 0; k < kKeys / 16; ++k) {
      const u64 score_k = score + static_cast<u64>(k / 4 * (kPanelBytes<kQueries> >> 4) + k % 4 * 2);
      ptx::Wgmma<kSumDim>::template multiply<S.dtype, ptx::Major::mn>(
          d, score_k, key + static_cast<u64>(k * (kPanelBytes<16> >> 4)), k > 0);
    }
    ptx::wgmma_commit_group();
  }

  // ---- Scores ----

  /// P^T of S^T.
  ATTUNE_DEVICE void make_probabilities(Scores& score) {
    const float scale2 = p_.backward.forward.scale * kLog2e;
    if constexpr (S.bias != Bias::none) {
      const i32 key = static_cast<i32>(group_ * kGroupRows + thread() / 32 * 16);
      biases_.wait(bias_at_);
      add_bias<S>(score, biases_.tile(bias_at_), key, p_.bias_rows == 1, scale2);
      biases_.release(bias_at_);
      bias_at_.advance();
    }
    subtract_lse<S>(score, memory_.numbers(query_at_), scale2);
    const Sm90Step step = this_step();
    if (step.masked) hide_invisible<S>(score, p_.backward.forward, memory_, first_key(work()), step);
#pragma unroll
    for (i32 e = 0; e < kQueries / 2; ++e) score[e] = ptx::ex2_approx_ftz(score[e]);
  }

  /// dS^T of dP^T.
  ATTUNE_DEVICE void make_gradients(Scores& gradient, const Scores& probability,
                                    const KeptKeyRows<S>& kept) const {
    const u32 numbers = memory_.numbers(query_at_) + kQueries * 4 + lane() % 4 * 8;
#pragma unroll
    for (i32 e = 0; e < kQueries / 2; e += 4) {
      const float2 delta = ptx::ld_shared_float2(numbers + e * 8);
#pragma unroll
      for (i32 i = e; i < e + 4; ++i) {
        gradient[i] = probability[i] * less_delta(gradient[i], i % 2 == 0 ? delta.x : delta.y, kept.kept(i));
      }
    }
  }

  ATTUNE_DEVICE float less_delta(float gradient, float delta, bool kept) const {
    if constexpr (!kDropout) return gradient - delta;
    return kept ? fmaf(gradient, p_.backward.forward.dropout.rescale, -delta) : -delta;
  }

  // ---- Dropout ----

  /// Survivors are scaled up in finish().
  static ATTUNE_DEVICE void drop(Scores& probability, const KeptKeyRows<S>& kept) {
#pragma unroll
    for (i32 e = 0; e < kQueries / 2; ++e) {
      if (!kept.kept(e)) probability[e] = 0.0f;
    }
  }

  static ATTUNE_DEVICE void pack_operand(Operand& operand, const Scores& values) {
#pragma unroll
    for (i32 e = 0; e < kQueries / 4; ++e)
      operand[e / 4][e % 4] = pack<S.dtype>(values[2 * e], values[2 * e + 1]);
  }

  /// dS, with queries as rows, to this warpgroup's panel of the exchange. There are two, so that one barrier
  /// for each tile is enough: who writes a tile has seen everyone past the one before.
  ATTUNE_DEVICE void publish(const Operand& grad_score) const {
    const u32 panel = memory_.scores(buffer_) + group_ * kPanelBytes<kQueries>;
    const u32 row = lane() / 16 * 8 + lane() % 8;
    const u32 origin =
        panel + panel_offset<kQueries>(row, static_cast<i32>(thread() / 32 * 2 + lane() / 8 % 2));
#pragma unroll
    for (i32 k = 0; k < kQueries / 16; ++k) {
      const u32(&d)[4] = grad_score[k];
      ptx::stmatrix_x4_trans(origin + k * kPanelBytes<16>, d[0], d[1], d[2], d[3]);
    }
  }

  /// Leaves this warpgroup's part of dQ to its adder, with the place where it goes.
  ATTUNE_DEVICE void send(const Sums& sums) const {
    await_adder();
    if (elected()) address_sums();
    const u32 staged = memory_.sums(group_, buffer_) + thread() / 32 * kStagedBytes + lane() * 16;
#pragma unroll
    for (i32 f = 0; f < kSumDim / kFragmentColumns; ++f) {
      ptx::st_shared_float4(staged + f * kFragmentBytes, sums + 4 * f);
    }
    ptx::fence_proxy_async();
    announce_sums();
  }

  ATTUNE_DEVICE void announce_sums() const {
    __syncwarp();
    if (lane() == 0) ptx::mbarrier_arrive(memory_.staged(group_, buffer_));
  }

  /// Until what was staged before has been read.
  ATTUNE_DEVICE void await_adder() const {
    ptx::bar_sync(kTaken + group_ * 2 + (Memory::kShared.sum_buffers == 1 ? 0 : buffer_), kAdderThreads);
  }

  /// Where this part goes: column, row, head and batch entry; how many rows there are; and when: the number
  /// of its turn, and as whom.
  ATTUNE_DEVICE void address_sums() const {
    const Sm90Step step = this_step();
    const Sm90Work tile = work();
    const i32 column = kSplitColumns ? static_cast<i32>(group_) * kSumDim : 0;
    const i32 row = kSplitColumns ? 0 : static_cast<i32>(group_) * kGroupRows;
    const i32 shift = Schedule::kVarlen ? part().sums_row : 0;
    const Sm90Turn turn = Schedule::kOrdered ? turn_at<S>(memory_, query_at_) : Sm90Turn{};
    const u32 target = memory_.target(group_, buffer_);
    ptx::st_shared_word4(target, {column, step.begin + shift + row, step.head, tile.batch});
    ptx::st_shared_word4(target + 16, {step.rows - row, turn.number, turn.mine, 0});
  }

  // ---- The gradient of a bias tensor: the tiles of dS as they are exchanged ----

  /// This warpgroup's panel of the tile.
  ATTUNE_DEVICE void store_gradients() const {
    const i32 first = work().begin + static_cast<i32>(group_) * kGroupRows;
    store_bias_gradient<S>(p_, memory_.scores(buffer_) + group_ * kPanelBytes<kQueries>, first, this_step(),
                           work().batch);
  }

  // ---- The end of a tile of keys ----

  /// The gradients leave through this warpgroup's keys and values.
  ATTUNE_DEVICE void finish() {
    ptx::bar_sync(kExchange, kThreads);  // both warpgroups have multiplied with the keys
    const Sm90Work tile = work();
#pragma unroll
    for (i32 e = 0; e < kDim / 2; ++e) {
      grad_key_[e] *= p_.backward.forward.scale;
      if constexpr (kDropout) grad_value_[e] *= p_.backward.forward.dropout.rescale;
    }
    write_rows(memory_.key_tile(), grad_key_);
    write_rows(memory_.value_tile(), grad_value_);
    ptx::bar_sync(kGroup + group_, kWarpgroup);
    const BackwardParams& p = p_.backward;
    store_rows<S.head_dim>(tile, memory_.key_tile(), p.grad_key, p.grad_key_strides);
    store_rows<S.head_dim_v>(tile, memory_.value_tile(), p.grad_value, p.grad_value_strides);
    ptx::fence_proxy_async();
    keys_.release(key_at_);  // by every thread: each has read from the tile
  }

  ATTUNE_DEVICE void write_rows(u32 tile, const Gradient& gradient) const {
    const u32 row = group_ * kGroupRows + thread() / 32 * 16 + lane() % 16;
#pragma unroll
    for (i32 k = 0; k < kDim / 16; ++k) {
      const float* g = gradient + k * 8;
      ptx::stmatrix_x4(tile + panel_offset<kKeys>(row, k * 2 + static_cast<i32>(lane() / 16)),
                       pack<S.dtype>(g[0], g[1]), pack<S.dtype>(g[2], g[3]), pack<S.dtype>(g[4], g[5]),
                       pack<S.dtype>(g[6], g[7]));
    }
  }

  template <i32 Dim>
  ATTUNE_DEVICE void store_rows(const Sm90Work& work, u32 tile, void* gradient,
                                const Strides& strides) const {
    if (gradient == nullptr) return;
    constexpr i32 kChunks = Dim / 8;
    const i32 first_row = static_cast<i32>(group_) * kGroupRows;
    const i32 heads = p_.backward.key_heads;
    u16* rows = static_cast<u16*>(gradient) + work.batch * strides.batch + work.head / heads * strides.group +
                work.head % heads * strides.head + (work.begin + first_row) * strides.seq;
    const i32 rest = p_.backward.forward.len_k - work.begin - first_row;
    const i32 count = min(rest, kGroupRows) * kChunks;
    // Ahead of the tiles, where registers are full, no places are worked out of which a division is part.
    constexpr bool kCrowded = (kDropout || S.bias != Bias::none) && bit_ceil(kChunks) != kChunks;
    const auto first = static_cast<i32>(kCrowded ? ptx::opaque(thread()) : thread());
#pragma unroll 4
    for (i32 i = first; i < count; i += kWarpgroup) {
      const i32 row = i / kChunks;
      const i32 chunk = i % kChunks;
      const ptx::Word4 w =
          ptx::ld_shared_word4(tile + panel_offset<kKeys>(static_cast<u32>(first_row + row), chunk));
      *reinterpret_cast<int4*>(rows + row * strides.seq + chunk * 8) = make_int4(w.x, w.y, w.z, w.w);
    }
  }

  const GradKeyValueSm90Params& p_;
  const Memory memory_;
  const typename Memory::KeyRing keys_;
  const typename Memory::QueryRing queries_;
  const typename Memory::BiasRing biases_;
  const u32 group_;
  typename Memory::KeyRing::Cursor key_at_{0};
  typename Memory::QueryCursor query_at_{0};
  typename Memory::BiasRing::Cursor bias_at_{0};
  u32 buffer_ = 0;  // of the exchange

  Gradient grad_key_;
  Gradient grad_value_;
};

template <KernelSpec S>
ATTUNE_DEVICE void grad_key_value_sm90(const GradKeyValueSm90Params& params) {
  static_assert(S.family == Family::sm90 && S.dtype != DType::f32);
  static_assert(S.query_gradient != QueryGradient::apart);
  static_assert(S.head_dim % 8 == 0 && S.head_dim_v % 8 == 0);
  static_assert(S.block_n == GradKeyValueSm90Shared::kWarpgroups * GradKeyValueSm90Shared::kGroupRows);
  static_assert((S.block_m == 64 && wider_dim(S) <= 128) || (S.block_m == 128 && wider_dim(S) <= 64));
  static_assert(S.warps == 12);

  const Sm90Memory<S> memory = set_up_memory<S>(params);
  const u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // uniform, and known to be
  if (warp < 4) {
    // Here at small head dims alone (choose.cpp), whose consumers have less to hold.
    ptx::setmaxnreg_dec<is_laden(S) ? 40 : 24>();
    if (warp == 0) {
      Sm90Producer<S>(params, memory).run();
    } else if (warp < 3) {
      Sm90Adder<S>(params, memory, warp - 1).run();
    } else if (Sm90Schedule<S>::kOrdered) {
      Sm90Watcher<S>(params, memory).run();
    }
  } else {
    ptx::setmaxnreg_inc<is_laden(S) ? 232 : 240>();
    Sm90Consumer<S>(params, memory, warp / 4 - 1).run();
  }
}

}  // namespace attune::kernel
