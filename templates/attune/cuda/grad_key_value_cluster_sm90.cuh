// Gradients of key and value on Hopper at head dims above 192, by clusters of two blocks with 64 keys each,
// which meet the same queries at a time. A block alone (grad_key_value_wide_sm90.cuh) is bound by the L2
// cache, which adds a tile to dQ for each 64 keys. Here blocks exchange dS instead, and each sums half of the
// columns of dQ over the keys of both:
//
//             columns 0 to 127 of dQ                        128 to 255
//   block 0   dS K + (dS of block 1) (keys of block 1)
//   block 1                                                 (dS of block 0) (keys of block 0) + dS K
//
// Within a block one warpgroup has the values, the other the keys, and each adds 64 columns to dQ:
//
//   warpgroup 0:  S^T = K Q^T,   P^T = exp2(S^T - LSE)          dV += P^T dO     P^T and dS^T are operands
//   warpgroup 1:  dP^T = V dO^T, dS^T = P^T (dP^T - delta)      dK += dS^T Q     where they are, in registers
//
// P crosses shared memory for warpgroup 1 alone, in float16 with a scale, which rounds less than bfloat16; dS
// for dQ, in its place. There are two such places, so that nobody waits before dS is shown. The other's dS
// and half of its keys leave no room for all output gradients of two stages: they share the last panel.
//
// The other block's dS takes its time to come. So both warpgroups sum dQ of a tile of queries a step late,
// while they make P or dS of the next, and send it to memory beside the products after that:
//
//   warpgroup 0:  dV of j, dQ of j - 1 leaves;  S of j + 1;  dQ of j, P of j + 1 is made
//   warpgroup 1:  dK of j, dQ of j - 1 leaves; dP of j + 1;  dQ of j, dS of j + 1 is made
//
// Where tiles of keys take turns to add (ADR 9), each block has one of the two parts of a turn. Under a mask,
// and there, the first block takes the next tile for both.
//
// Registers of one thread:   producer  consumer   S or dP + dQ + an operand, beside dV or dK
//   head dim 256,  64 x 64   24        240        32 + 32 + 16, beside 128
#pragma once

#include "attune/cuda/grad_key_value_sm90.cuh"
#include "attune/cuda/grad_key_value_wide_sm90_tiles.cuh"
#include "attune/cuda/vector.cuh"

namespace attune::kernel {

/// The named barrier at which warpgroup 1 has multiplied with the dS before: there are no adders here.
inline constexpr u32 kSummed = kTaken;

/// Warpgroup 0 or 1.
template <KernelSpec S, i32 Group>
class Sm90ClusterConsumer : WarpgroupThread {
  using Memory = Sm90Memory<S>;
  static constexpr i32 kKeys = S.block_n;
  static constexpr i32 kQueries = S.block_m;
  static constexpr i32 kThreads = GradKeyValueSm90Shared::kWarpgroups * kWarpgroup;
  static constexpr i32 kPanel = Sm90Shared::kPanelElements;
  static constexpr i32 kPanels = Memory::kShared.panels;
  static constexpr i32 kDim = round_up(wider_dim(S), 16);
  static constexpr i32 kLast = (kPanels - 1) * kPanel;  // where the last panel begins

  using LastPanelCursor = typename Memory::LastPanelRing::Cursor;  // of a step's parity
  using Scores = float[kQueries / 2];  // element e: key half e / 2 % 2, queries e / 4 * 8 + e % 2
  using Operand = u32[kQueries / 16][4];
  using Sums = float[kPanel / 2];
  static constexpr u32 kNowhere = ~0u;  // past the end
  static constexpr bool kOrdered = S.query_gradient == QueryGradient::ordered;

 public:
  ATTUNE_DEVICE Sm90ClusterConsumer(const GradKeyValueSm90Params& params, Memory memory)
      : p_(params),
        memory_(memory),
        keys_(memory.keys()),
        queries_(memory.queries()),
        last_panels_(memory.last_panels()) {}

  ATTUNE_DEVICE void run() {
    clear();
    if constexpr (Group == 1) ptx::bar_arrive(kSummed, kThreads);
#pragma unroll 1
    while (true) {
      keys_.wait(key_at_);
      key_at_.advance();
      const i32 steps = work().steps;
      if (steps < 0) break;
      if constexpr (Sm90Schedule<S>::kUneven)
        clear_unseen_keys<Group>(p_.backward.forward, memory_, work().begin);
      if constexpr (Group == 0) {
        if (steps > 0) walk_values(steps);
      } else {
        if (steps > 0) walk_keys(steps);
      }
      finish();
      clear();
    }
    if constexpr (Group == 0) ptx::bar_sync(kSummed, kThreads);
  }

 private:
  // Read again where they are needed: registers are for accumulators.
  ATTUNE_DEVICE Sm90Work work() const {
    return work_of(memory_);
  }
  ATTUNE_DEVICE Sm90Step this_step() const {
    return step_at(memory_, query_at_);
  }

  /// P, then dS.
  ATTUNE_DEVICE u32 place(u32 number) const {
    return memory_.scores(number % 2);
  }

  /// By each warp, which has read where its sums go.
  ATTUNE_DEVICE void release_queries(const typename Memory::QueryCursor& done) const {
    if (lane() == 0) queries_.release(done);
  }

  ATTUNE_DEVICE void clear() {
#pragma unroll
    for (i32 e = 0; e < kLast / 2; ++e) first_[e] = 0.0f;
#pragma unroll
    for (i32 e = 0; e < (kDim - kLast) / 2; ++e) last_[e] = 0.0f;
  }

  // ---- Warpgroup 0: P, dV and dQ ----

  ATTUNE_DEVICE void walk_values(i32 steps) {
    Operand probability;
    Sums sums;
    u32 target = kNowhere;
    {
      Scores score;
      multiply_queries(score);
      ptx::wgmma_wait_group<0>();
      ptx::pin(score);
      make_probabilities(probability, score, summed_);
    }
#pragma unroll 1
    for (i32 left = steps;; --left) {
      multiply_values(probability);
      if (!kOrdered || left < work().steps) add(sums, target);
      target = sums_target();
      ptx::wgmma_wait_group<0>();
      release_values();
      if (left == 1) break;
      Scores score;
      multiply_queries(score);
      ptx::wgmma_wait_group<0>();
      ptx::pin(score);
      await_gradients();
      multiply_sums(sums);
      make_probabilities(probability, score, summed_ + 1);
      ptx::wgmma_wait_group<0>();
      ptx::pin(sums);
      announce_sums();
    }
    await_gradients();
    multiply_sums(sums);
    ptx::wgmma_wait_group<0>();
    ptx::pin(sums);
    announce_sums();
    add(sums, target);
  }

  /// S^T = K Q^T; asynchronous.
  ATTUNE_DEVICE void multiply_queries(Scores& d) const {
    queries_.wait(query_at_);
    multiply_rows<S.dtype, kKeys, kDim / 16>(d, memory_.key_tile(), memory_.query_tile(query_at_));
  }

  /// P^T of S^T; for warpgroup 1, too.
  ATTUNE_DEVICE void make_probabilities(Operand& probability, Scores& score, u32 number) const {
    subtract_lse<S>(score, memory_.numbers(query_at_), p_.backward.forward.scale * kLog2e);
    const Sm90Step step = this_step();
    const i32 first_key = work().begin + static_cast<i32>(thread() / 32 * 16 + lane() / 4);
    if (step.masked) hide_invisible<S>(score, p_.backward.forward, memory_, first_key, step);
    Operand shared;
#pragma unroll
    for (i32 e = 0; e < kQueries / 2; e += 2) {
      const float2 pair{ptx::ex2_approx_ftz(score[e]), ptx::ex2_approx_ftz(score[e + 1])};
      probability[e / 8][e / 2 % 4] = pack<S.dtype>(pair.x, pair.y);
      shared[e / 8][e / 2 % 4] = pack<DType::f16>(pair.x, pair.y);
    }
    ptx::bar_sync(kSummed, kThreads);
#pragma unroll
    for (i32 k = 0; k < kQueries / 16; ++k) store_scores<S>(place(number), k, shared[k]);
    ptx::bar_arrive(kShown, kThreads);
  }

  /// dV += P^T dO; asynchronous.
  ATTUNE_DEVICE void multiply_values(const Operand& probability) {
    const LastPanelCursor at(summed_ % 2);
    last_panels_.wait(at);
    multiply_gradient(probability, memory_.grad_output_tile(query_at_), last_panels_.tile(at));
  }
  /// When that has been done.
  ATTUNE_DEVICE void release_values() {
    ptx::pin(first_);
    ptx::pin(last_);
    if (elected()) last_panels_.release(LastPanelCursor(0));
    release_queries(query_at_);
    query_at_.advance();
  }

  /// Until warpgroup 1 shows dS.
  static ATTUNE_DEVICE void await_gradients() {
    ptx::bar_sync(kShown + 1, kThreads);
  }

  // ---- Warpgroup 1: dS, dK and dQ ----

  ATTUNE_DEVICE void walk_keys(i32 steps) {
    Operand gradient;
    Sums sums;
    u32 target = kNowhere;
    {
      Scores score;
      multiply_output_gradients(score);
      multiply_last_panel(score, summed_);
      ptx::wgmma_wait_group<0>();
      take(score);
      make_gradients(gradient, score, summed_);
      allow_probabilities();
      show(summed_);
    }
#pragma unroll 1
    for (i32 left = steps;; --left) {
      multiply_key_gradient(gradient);
      if (!kOrdered || left < work().steps) add(sums, target);
      target = sums_target();
      if (left == 1) break;
      const auto done = query_at_;
      query_at_.advance();
      Scores score;
      multiply_output_gradients(score);
      ptx::wgmma_wait_group<1>();
      release_keys(done);
      multiply_last_panel(score, summed_ + 1);
      ptx::wgmma_wait_group<0>();
      take(score);
      multiply_sums(sums);
      make_gradients(gradient, score, summed_ + 1);
      show(summed_ + 1);
      ptx::wgmma_wait_group<0>();
      ptx::pin(sums);
      announce_sums();
      allow_probabilities();
    }
    multiply_sums(sums);
    ptx::wgmma_wait_group<1>();
    release_keys(query_at_);
    query_at_.advance();
    ptx::wgmma_wait_group<0>();
    ptx::pin(sums);
    announce_sums();
    add(sums, target);
  }

  /// dK += dS^T Q; asynchronous.
  ATTUNE_DEVICE void multiply_key_gradient(const Operand& gradient) {
    const u32 tile = memory_.query_tile(query_at_);
    multiply_gradient(gradient, tile, tile + (kPanels - 1) * kPanelBytes<kQueries>);
  }
  /// When that has been done.
  ATTUNE_DEVICE void release_keys(const typename Memory::QueryCursor& done) {
    ptx::pin(first_);
    ptx::pin(last_);
    release_queries(done);
  }

  /// dP^T = V dO^T without the last panel, which comes later; asynchronous.
  ATTUNE_DEVICE void multiply_output_gradients(Scores& d) const {
    queries_.wait(query_at_);
    multiply_rows<S.dtype, kKeys, kLast / 16>(d, memory_.value_tile(), memory_.grad_output_tile(query_at_));
  }
  /// That on top.
  ATTUNE_DEVICE void multiply_last_panel(Scores& d, u32 number) const {
    const LastPanelCursor at(number % 2);
    last_panels_.wait(at);
    const u64 row = ptx::wgmma_descriptor(memory_.value_tile() + (kPanels - 1) * kPanelBytes<kKeys>);
    const u64 column = ptx::wgmma_descriptor(last_panels_.tile(at));
    ptx::wgmma_fence();
#pragma unroll
    for (i32 k = 0; k < (kDim - kLast) / 16; ++k) {
      const auto step = static_cast<u64>(k * 2);
      ptx::Wgmma<kQueries>::template multiply<S.dtype>(d, row + step, column + step, true);
    }
    ptx::wgmma_commit_group();
  }
  /// When both have been multiplied.
  ATTUNE_DEVICE void take(Scores& score) {
    ptx::pin(score);
    if (elected()) last_panels_.release(LastPanelCursor(0));
  }

  /// dS^T of dP^T, when P has come.
  ATTUNE_DEVICE void make_gradients(Operand& gradient, const Scores& score, u32 number) const {
    ptx::bar_sync(kShown, kThreads);
#pragma unroll
    for (i32 k = 0; k < kQueries / 16; ++k) {
      ptx::ldmatrix_x4_trans(gradient[k], score_row<S>(place(number), k));
    }
    constexpr float kFactor = 1 / kProbabilityScale<S>;
    const u32 numbers = memory_.numbers(query_at_) + kQueries * 4 + lane() % 4 * 8;
#pragma unroll
    for (i32 e = 0; e < kQueries / 2; e += 2) {
      const float2 delta = ptx::ld_shared_float2(numbers + e / 4 * 32);
      u32& pair = gradient[e / 8][e / 2 % 4];
      const float2 probability = widen_pair<DType::f16>(pair);
      pair = pack<S.dtype>(probability.x * fmaf(score[e], kFactor, -delta.x),
                           probability.y * fmaf(score[e + 1], kFactor, -delta.y));
    }
#pragma unroll
    for (i32 k = 0; k < kQueries / 16; ++k) store_scores<S>(place(number), k, gradient[k]);
  }

  /// dS, to both blocks.
  ATTUNE_DEVICE void show(u32 number) const {
    ptx::fence_proxy_async();
    ptx::bar_sync(kGroup + Group, kWarpgroup);
    ptx::bar_arrive(kShown + 1, kThreads);
    if (elected()) ptx::mbarrier_arrive(exchange(kGradientsShown, number));
  }

  /// The next P, where the dS before was: this warpgroup has multiplied with it, and it has been sent.
  ATTUNE_DEVICE void allow_probabilities() const {
    const u32 before = summed_ - 1;
    ptx::mbarrier_wait_cluster(exchange(kGradientsSent, before), before / 2 % 2);
    ptx::bar_arrive(kSummed, kThreads);
  }

  /// dV += P^T dO or dK += dS^T Q, the last panel in turn with the others; asynchronous.
  ATTUNE_DEVICE void multiply_gradient(const Operand& scores, u32 tile, u32 last_panel) {
    const u64 columns = ptx::wgmma_descriptor(tile, kPanelBytes<kQueries>);
    const u64 last_columns = ptx::wgmma_descriptor(last_panel, kPanelBytes<kQueries>);
    ptx::pin(first_);
    ptx::pin(last_);
    ptx::wgmma_fence();
#pragma unroll
    for (i32 k = 0; k < kQueries / 16; ++k) {
      const u64 rows = static_cast<u64>(k * (kPanelBytes<16> >> 4));
      ptx::Wgmma<kLast>::template multiply<S.dtype, ptx::Major::mn>(first_, scores[k], columns + rows, true);
      ptx::Wgmma<kDim - kLast>::template multiply<S.dtype, ptx::Major::mn>(last_, scores[k],
                                                                           last_columns + rows, true);
    }
    ptx::wgmma_commit_group();
  }

  // ---- Sums of dQ ----

  /// Which panel of the columns is summed here.
  static ATTUNE_DEVICE i32 panel() {
    return cluster_rank<S>() * (kPanels / 2) + Group;
  }

  /// Over the keys of both blocks; asynchronous.
  ATTUNE_DEVICE void multiply_sums(Sums& d) const {
    ptx::pin(d);
    ptx::wgmma_fence();
    multiply_keys<false>(d, place(summed_), memory_.key_tile() + panel() * kPanelBytes<kKeys>);
    ptx::mbarrier_wait(memory_.exchange(kGradientsCame), summed_ % 2);
    if (Group == 1 && elected()) announce_to_other(exchange(kGradientsSent, summed_));
    ptx::wgmma_fence();
    multiply_keys<true>(d, memory_.scores(2), memory_.other_key_tile() + Group * kPanelBytes<kKeys>);
    ptx::wgmma_commit_group();
  }
  template <bool Adds>
  static ATTUNE_DEVICE void multiply_keys(Sums& d, u32 scores, u32 keys) {
    const u64 score = ptx::wgmma_descriptor(scores);
    const u64 key = ptx::wgmma_descriptor(keys);
#pragma unroll
    for (i32 k = 0; k < kKeys / 16; ++k) {
      ptx::Wgmma<kPanel>::template multiply<S.dtype, ptx::Major::mn>(
          d, score + static_cast<u64>(k * 2), key + static_cast<u64>(k * (kPanelBytes<16> >> 4)),
          Adds || k > 0);
    }
  }

  /// Tells the other block that this warpgroup has multiplied with the dS of both.
  ATTUNE_DEVICE void announce_sums() {
    if (elected()) announce_to_other(memory_.exchange(kOtherSummed));
    ++summed_;
  }
  static ATTUNE_DEVICE void announce_to_other(u32 barrier) {
    ptx::mbarrier_arrive_cluster(ptx::mapa(barrier, other_rank<S>()));
  }
  /// The barrier of a step, where two take turns.
  ATTUNE_DEVICE u32 exchange(Sm90Exchange first, u32 number) const {
    return memory_.exchange(first + number % 2);
  }

  /// Where this warp's sums go: the number of their first fragment, which takes fewer registers than its
  /// place.
  ATTUNE_DEVICE u32 sums_target() const {
    const Sm90Step step = this_step();
    const i32 row = static_cast<i32>(thread() / 32 * kFragmentRows);
    const i64 head = i64{work().batch} * p_.heads * p_.sharing + step.head;
    const i64 rows = (head * sum_rows(p_.backward) + step.begin + row) / kFragmentRows;
    const i64 fragment = rows * (S.head_dim / kFragmentColumns) + panel() * (kPanel / kFragmentColumns);
    return row < step.rows ? static_cast<u32>(fragment) : kNowhere;
  }
  /// The sums multiplied last, when their turn has come.
  ATTUNE_DEVICE void add(const Sums& sums, u32 target) const {
    if constexpr (kOrdered) await_turn(memory_, summed_);
    constexpr i32 kOfLast = (S.head_dim - kLast) / kFragmentColumns;
    if (target != kNowhere) {
      float* place = p_.backward.query_sums + i64{target} * kFragmentElements + lane() * 4;
#pragma unroll
      for (i32 f = 0; f < kPanel / kFragmentColumns; ++f) {
        if (f < kOfLast || panel() < kPanels - 1) {
          ptx::red_add_v4_f32(place + f * kFragmentElements, sums + 4 * f);
        }
      }
    }
    __syncwarp();              // keeps the compiler from adding later, in the way of the next products
    if constexpr (kOrdered) {  // to the warp that passes the turn on
      if (lane() == 0) ptx::mbarrier_arrive(memory_.added(summed_ - 1));
    }
  }

  // ---- The end of a tile of keys ----

  /// Gradients leave through shared memory: dK in the place of the keys, dV in that of the values.
  ATTUNE_DEVICE void finish() {
    meet<Group>();  // both have multiplied with the keys
    const Sm90Work tile = work();
    const BackwardParams& p = p_.backward;
    const float scale = Group == 0 ? 1 / kProbabilityScale<S> : p.forward.scale;
#pragma unroll
    for (i32 e = 0; e < kLast / 2; ++e) first_[e] *= scale;
#pragma unroll
    for (i32 e = 0; e < (kDim - kLast) / 2; ++e) last_[e] *= scale;
    const u32 columns = Group == 0 ? memory_.value_tile() : memory_.key_tile();
    write_columns<S>(columns, first_, 0);
    write_columns<S>(columns, last_, kLast);
    ptx::bar_sync(kGroup + Group, kWarpgroup);
    if constexpr (Group == 0) {
      store_columns<S, 0, S.head_dim_v>(p, tile, columns, p.grad_value, p.grad_value_strides, S.head_dim_v);
    } else {
      store_columns<S, 0, S.head_dim>(p, tile, columns, p.grad_key, p.grad_key_strides, S.head_dim);
    }
    ptx::fence_proxy_async();
    keys_.release(key_at_);  // by every thread: each has read from the tile
  }

  const GradKeyValueSm90Params& p_;
  const Memory memory_;
  const typename Memory::KeyRing keys_;
  const typename Memory::QueryRing queries_;
  const typename Memory::LastPanelRing last_panels_;
  typename Memory::KeyRing::Cursor key_at_{0};
  typename Memory::QueryCursor query_at_{0};
  u32 summed_ = 0;  // so many steps' sums of dQ have been multiplied: the next's number

  // dV or dK
  float first_[kLast / 2];
  float last_[(kDim - kLast) / 2];
};

/// Sends dS to the other block, each when that has multiplied with the one before. By a warp.
template <KernelSpec S>
ATTUNE_DEVICE void send_gradients(Sm90Memory<S> memory) {
  constexpr u32 kBytes = Sm90Memory<S>::kShared.score_bytes;
  typename Sm90Memory<S>::KeyRing::Cursor key_at{0};
  u32 step = 0;
#pragma unroll 1
  while (true) {
    memory.keys().wait(key_at);
    i32 steps = work_of(memory).steps;
    if (steps < 0) break;
    __syncwarp();
    if (threadIdx.x % 32 == 0) memory.keys().release(key_at);
#pragma unroll 1
    for (; steps > 0; --steps) {
      ptx::mbarrier_wait(memory.exchange(kGradientsShown + step % 2), step / 2 % 2);
      ptx::mbarrier_wait_cluster(memory.exchange(kOtherSummed), (step + 1) % 2);
      if (threadIdx.x % 32 == 0) {
        ptx::mbarrier_arrive_expect_tx(memory.exchange(kGradientsCame), kBytes);
        ptx::cp_async_bulk_cluster(ptx::mapa(memory.scores(2), other_rank<S>()), memory.scores(step % 2),
                                   kBytes, ptx::mapa(memory.exchange(kGradientsCame), other_rank<S>()));
      }
      ++step;
    }
    key_at.advance();
  }
}

/// What clusters have besides, by all threads.
template <KernelSpec S>
ATTUNE_DEVICE void set_up_cluster(Sm90Memory<S> memory) {
  if (threadIdx.x == 0) {
    memory.last_panels().init(GradKeyValueSm90Shared::kWarpgroups);
    for (u32 barrier = 0; barrier < kOtherSummed; ++barrier) {
      ptx::mbarrier_init(memory.exchange(barrier), 1);
    }
    ptx::mbarrier_init(memory.exchange(kOtherSummed), GradKeyValueSm90Shared::kWarpgroups);
    ptx::fence_mbarrier_init();
  }
  __syncwarp();
  ptx::cluster_sync();
}

template <KernelSpec S>
ATTUNE_DEVICE void grad_key_value_cluster_sm90(const GradKeyValueSm90Params& params) {
  static_assert(S.family == Family::sm90 && S.dtype != DType::f32 && S.cluster != 0);
  static_assert(S.query_gradient != QueryGradient::apart && S.keys == Keys::contiguous);
  static_assert(S.blocks == Blocks::dense && S.bias == Bias::none && S.dropout == Dropout::off);
  static_assert(S.head_dim % 8 == 0 && S.head_dim_v % 8 == 0);
  static_assert(min(S.head_dim, S.head_dim_v) > 192 && wider_dim(S) <= 256);
  static_assert(S.block_m == 64 && S.block_n == 64 && S.warps == 12);

  const Sm90Memory<S> memory = set_up_memory<S>(params);
  set_up_cluster(memory);
  const u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // uniform, and known to be
  if (warp < 4) {
    ptx::setmaxnreg_dec<24>();
    if (warp == 0) {
      Sm90Producer<S>(params, memory).run();
    } else if (warp == 1) {
      send_gradients(memory);
    } else if (Sm90Schedule<S>::kOrdered && warp == 2) {
      Sm90Watcher<S>(params, memory).run();
    } else if (Sm90Schedule<S>::kOrdered) {
      Sm90TurnPasser<S>(params, memory).run();
    }
  } else {
    ptx::setmaxnreg_inc<240>();
    if (warp < 8) {
      Sm90ClusterConsumer<S, 0>(params, memory).run();
    } else {
      Sm90ClusterConsumer<S, 1>(params, memory).run();
    }
  }
  __syncwarp();
  ptx::cluster_sync();  // the other block arrives at barriers here until it has ended
}

}  // namespace attune::kernel
