// Gradients of key and value on Hopper at head dims above 128, with the query's added up beside them. The
// producer and its rings are those of grad_key_value_sm90.cuh, but 64 keys are all whose gradients the
// registers of a block hold: the two warpgroups share out their columns.
//
//                    queries, output grads in rings, as there
//        +--------+
//   K, V | 64 x D |  warpgroup 0:  S^T = K Q^T, P^T = exp2(S^T - LSE)    dV, dK, dQ: columns up to 64 or 128
//        |        |  warpgroup 1:  dP^T = V dO^T, dS^T = P^T (dP^T - delta)          the others
//        +--------+
//
// Each product of scores is computed once. P and dS cross shared memory, [queries][keys], and are operands of
// dV += P^T dO, dK += dS^T Q and dQ = dS K from there. In the place of dS more digits of P cross first, so
// that dS is rounded once; and before either a tile of a bias tensor has come there. The next scores are
// multiplied while sums of dQ, in halves of 64 columns, leave: from registers, as there is no room to stage
// them, and in the registers' order (fragments, backward.h), so that a warp adds 512 neighbouring bytes at a
// time. Where tiles take turns to add (ADR 9), each half has turns of its own, and two more warps watch for
// them and pass them on.
//
// Of tensors of different head dims a warpgroup may have no column: it then multiplies zeros. At head dim 128
// this kernel computes what the other has no shared memory for, a float32 bias tensor with dropout.
//
// Registers of one thread:   producer  consumer   S or dP + half of dQ, beside dK + dV
//   head dim 256,  64 x 64   24        240        32 + 32, beside 64 + 64
//   pages in turns; bias     40        232        likewise
//   and dropout, sequences
#pragma once

#include "attune/cuda/grad_key_value_sm90.cuh"
#include "attune/cuda/grad_key_value_wide_sm90_tiles.cuh"
#include "attune/cuda/vector.cuh"

namespace attune::kernel {

/// Warpgroup 0 or 1.
template <KernelSpec S, i32 Group>
class Sm90WideConsumer : WarpgroupThread {
  using Memory = Sm90Memory<S>;
  using Schedule = Sm90Schedule<S>;
  using Shared = GradKeyValueSm90Shared;
  static constexpr i32 kKeys = S.block_n;
  static constexpr i32 kQueries = S.block_m;
  static constexpr i32 kThreads = Shared::kWarpgroups * kWarpgroup;
  static constexpr i32 kDimSteps = ceil_div(wider_dim(S), 16);  // k16 steps of K Q^T
  static constexpr i32 kHalf = Sm90Shared::kPanelElements;
  // Two panels and the rest, or one panel and at most two.
  static constexpr i32 kGroup0 = wider_dim(S) > 3 * kHalf ? 2 * kHalf : kHalf;
  static constexpr i32 kFirst = Group == 0 ? 0 : kGroup0;
  static constexpr i32 kColumns = Group == 0 ? kGroup0 : round_up(wider_dim(S) - kGroup0, 16);
  /// Those that a gradient of this head dim has.
  static constexpr i32 valid(i32 head_dim) { return max(min(head_dim - kFirst, kColumns), 0); }

  using Scores = float[kQueries / 2];  // element e: key half e / 2 % 2, queries e / 4 * 8 + e % 2
  using Gradient = float[kColumns / 2];
  template <i32 Half>
  using Sums = float[min(kColumns - Half * kHalf, kHalf) / 2];
  static constexpr bool kOrdered = S.query_gradient == QueryGradient::ordered;
  static constexpr bool kHasSecondHalf = kColumns > kHalf;
  /// Are the next scores taken while sums are multiplied? Where each step takes its own, that code is there
  /// once: a tenth of what the longest kernels take to compile, for 1 to 6 per cent of their speed.
  static constexpr bool kTakesEarly = !saves_code(S);
  static constexpr bool kDropout = S.dropout == Dropout::on;
  /// Are the digits of P that cross beside it float16's, of which bfloat16 has fewer, or what rounding took?
  static constexpr bool kWhole = S.dtype == DType::bf16;
  static constexpr u32 kSigns = 0x80008000;  // of two 16-bit numbers

 public:
  ATTUNE_DEVICE Sm90WideConsumer(const GradKeyValueSm90Params& params, Memory memory)
      : p_(params), memory_(memory), keys_(memory.keys()), queries_(memory.queries()) {}

  ATTUNE_DEVICE void run() {
    clear();
#pragma unroll 1
    while (true) {
      keys_.wait(key_at_);
      const i32 steps = work().steps;
      if (steps < 0) break;
      if constexpr (Schedule::kUneven) clear_unseen_keys<Group>(p_.backward.forward, memory_, work().begin);
      if (steps > 0) walk(steps);
      if (!Schedule::kVarlen || part_of<S>(memory_).ends) {
        finish();
        clear();
      } else {
        keys_.release(key_at_);
      }
      key_at_.advance();
    }
  }

 private:
  // Read again where they are needed: registers are for accumulators.
  ATTUNE_DEVICE Sm90Work work() const {
    return work_of(memory_);
  }
  ATTUNE_DEVICE Sm90Step this_step() const {
    return step_at(memory_, query_at_);
  }

  /// P and dS have two tiles each: who writes one has seen everyone past the one before.
  ATTUNE_DEVICE u32 probabilities(u32 buffer) const {
    return memory_.scores(2 * buffer);
  }
  ATTUNE_DEVICE u32 gradients(u32 buffer) const {
    return memory_.scores(2 * buffer + 1);
  }

  /// Of what was multiplied with P, which is scaled itself; what dropout keeps is scaled up.
  ATTUNE_DEVICE float value_scale() const {
    return (kDropout ? p_.backward.forward.dropout.rescale : 1.0f) / kProbabilityScale<S>;
  }

  ATTUNE_DEVICE void clear() {
#pragma unroll
    for (i32 e = 0; e < kColumns / 2; ++e) grad_key_[e] = grad_value_[e] = 0.0f;
  }

  // ---- The tiles of queries ----

  ATTUNE_DEVICE void walk(i32 steps) {
    Scores carried;  // dP^T - delta of a tile: warpgroup 1 turns it into dS^T when it sees P^T
    Scores score;
    await_queries();
    multiply_scores(score);
    KeptKeyRows<S> kept = kept_pairs(query_at_);
    ptx::wgmma_wait_group<0>();
    ptx::pin(score);
    if constexpr (kTakesEarly) take(score, kept, carried, buffer_);
#pragma unroll 1
    for (i32 left = steps;; --left) {
      if constexpr (!kTakesEarly) take(score, kept, carried, buffer_);
      float* const target = sums_target();  // read before a barrier: one thread lets the stage go for all
      kept = multiply_gradients(carried, left > 1);
      if (left == 1) return end_step<false>(target, kept, score, carried);
      end_step<true>(target, kept, score, carried);
    }
  }

  /// dV += P^T dO and dK += dS^T Q of one tile of queries; asynchronous. Gives what is kept of the next.
  ATTUNE_DEVICE KeptKeyRows<S> multiply_gradients(const Scores& carried, bool has_next) {
    KeptKeyRows<S> kept;
    if constexpr (Group == 0) {
      multiply_columns(grad_value_, probabilities(buffer_), memory_.grad_output_tile(query_at_));
      if (kDropout && has_next) kept = next_kept_pairs();
      await(1);
    } else {
      await(0);
      multiply_columns(grad_value_, probabilities(buffer_), memory_.grad_output_tile(query_at_));
      make_gradients(carried);
    }
    multiply_columns(grad_key_, gradients(buffer_), memory_.query_tile(query_at_));
    return kept;
  }

  /// dQ = dS K of the tile, and the scores of the next.
  template <bool HasNext>
  ATTUNE_DEVICE void end_step(float* target, const KeptKeyRows<S>& kept, Scores& score, Scores& carried) {
    const auto done = query_at_;
    query_at_.advance();
    {
      Sums<0> sums;
      multiply_sums<0>(sums);
      Scores next;
      if constexpr (HasNext) {
        await_queries();
        multiply_scores(next);
      }
      ptx::wgmma_wait_group<HasNext ? 1 : 0>();
      ptx::pin(sums);
      ptx::pin(grad_value_);
      ptx::pin(grad_key_);
      if (elected()) queries_.release(done);
      add<0>(sums, target);
      if constexpr (kHasSecondHalf) {
        Sums<1> rest;
        multiply_sums<1>(rest);
        if constexpr (HasNext && kTakesEarly) take_next<1>(next, kept, carried);
        ptx::wgmma_wait_group<0>();
        ptx::pin(rest);
        add<1>(rest, target);
      } else if constexpr (HasNext && kTakesEarly) {
        take_next<0>(next, kept, carried);
      }
      if constexpr (HasNext && !kTakesEarly) {
        ptx::wgmma_wait_group<0>();
        ptx::pin(next);
#pragma unroll
        for (i32 e = 0; e < kQueries / 2; ++e) score[e] = next[e];
      }
    }
    // Without sums of its own the second part has its turn all the same: passed on sooner than it was had, it
    // would hide from this block's watcher, and from the next tile's, what they wait for.
    if constexpr (kOrdered && !kHasSecondHalf) {
      await_turn(memory_, parts_ + 1);
      announce_sums();
    }
    if constexpr (S.bias != Bias::none) make_room_for_bias(done);
    buffer_ ^= 1;
  }

  ATTUNE_DEVICE void await_queries() const {
    queries_.wait(query_at_);
    if constexpr (Schedule::kVarlen) clear_void_queries<S, Group>(memory_, query_at_);
  }

  /// The next scores, while so many products of sums go on.
  template <i32 Products>
  ATTUNE_DEVICE void take_next(Scores& next, const KeptKeyRows<S>& kept, Scores& carried) {
    ptx::wgmma_wait_group<Products>();
    ptx::pin(next);
    take(next, kept, carried, buffer_ ^ 1);
  }

  /// S^T becomes P^T at once; dP^T is kept.
  ATTUNE_DEVICE void take(Scores& score, const KeptKeyRows<S>& kept, Scores& carried, u32 buffer) {
    if constexpr (Group == 0) {
      make_probabilities(score, kept, buffer);
    } else {
      subtract_delta(score, carried);
    }
  }

  /// K Q^T or V dO^T; asynchronous.
  ATTUNE_DEVICE void multiply_scores(Scores& d) const {
    multiply_rows<S.dtype, kKeys, kDimSteps>(
        d, Group == 0 ? memory_.key_tile() : memory_.value_tile(),
        Group == 0 ? memory_.query_tile(query_at_) : memory_.grad_output_tile(query_at_));
  }

  /// This warpgroup's columns of dV += P^T dO or dK += dS^T Q; asynchronous.
  ATTUNE_DEVICE void multiply_columns(Gradient& d, u32 scores, u32 tile) const {
    const u64 score = ptx::wgmma_descriptor(scores);
    const u64 columns =
        ptx::wgmma_descriptor(tile + kFirst / kHalf * kPanelBytes<kQueries>, kPanelBytes<kQueries>);
    ptx::pin(d);
    ptx::wgmma_fence();
#pragma unroll
    for (i32 k = 0; k < kQueries / 16; ++k) {
      const u64 rows = static_cast<u64>(k * (kPanelBytes<16> >> 4));
      ptx::Wgmma<kColumns>::template multiply<S.dtype, ptx::Major::mn, ptx::Major::mn>(d, score + rows,
                                                                                       columns + rows, true);
    }
    ptx::wgmma_commit_group();
  }

  /// One half of this warpgroup's columns of dQ = dS K; asynchronous.
  template <i32 Half>
  ATTUNE_DEVICE void multiply_sums(Sums<Half>& d) const {
    const u64 score = ptx::wgmma_descriptor(gradients(buffer_));
    const u64 key = ptx::wgmma_descriptor(memory_.key_tile() + (kFirst / kHalf + Half) * kPanelBytes<kKeys>);
    ptx::pin(d);
    ptx::wgmma_fence();
#pragma unroll
    for (i32 k = 0; k < kKeys / 16; ++k) {
      ptx::Wgmma<sizeof(Sums<Half>) / 2>::template multiply<S.dtype, ptx::Major::mn>(
          d, score + static_cast<u64>(k * 2), key + static_cast<u64>(k * (kPanelBytes<16> >> 4)), k > 0);
    }
    ptx::wgmma_commit_group();
  }

  // ---- Scores ----

  /// P^T of S^T, for both warpgroups. More of its digits stand where dS^T will: all have multiplied with the
  /// one before.
  ATTUNE_DEVICE void make_probabilities(Scores& score, const KeptKeyRows<S>& kept, u32 buffer) {
    const float scale2 = p_.backward.forward.scale * kLog2e;
    if constexpr (S.bias != Bias::none) {
      const i32 key = static_cast<i32>(thread() / 32 * 16);
      memory_.biases().wait(query_at_);
      add_bias<S>(score, memory_.biases().tile(query_at_), key, p_.bias_rows == 1, scale2);
      ptx::bar_sync(kGroup + Group, kWarpgroup);  // all have read where P is to stand
    }
    subtract_lse<S>(score, memory_.numbers(query_at_), scale2);
    const Sm90Step step = this_step();
    const i32 first_key = work().begin + static_cast<i32>(thread() / 32 * 16 + lane() / 4);
    if (step.masked) hide_invisible<S>(score, p_.backward.forward, memory_, first_key, step);
#pragma unroll
    for (i32 k = 0; k < kQueries / 16; ++k) {
      u32 rounded[4];
      u32 digits[4];
#pragma unroll
      for (i32 i = 0; i < 4; ++i) {
        const i32 e = k * 8 + i * 2;
        const float2 exact{ptx::ex2_approx_ftz(score[e]), ptx::ex2_approx_ftz(score[e + 1])};
        rounded[i] = pack<S.dtype>(exact.x, exact.y);
        digits[i] = digits_of(exact, rounded[i]);
        if constexpr (kDropout) drop(rounded[i], digits[i], kept.kept(e), kept.kept(e + 1));
      }
      store_scores<S>(gradients(buffer), k, digits);
      store_scores<S>(probabilities(buffer), k, rounded);
    }
    announce();
  }

  static ATTUNE_DEVICE u32 digits_of(const float2& exact, u32 rounded) {
    if constexpr (kWhole) return pack<DType::f16>(exact.x, exact.y);
    const float2 most = widen_pair<S.dtype>(rounded);
    return pack<S.dtype>(exact.x - most.x, exact.y - most.y);
  }
  /// P of the two.
  static ATTUNE_DEVICE float2 exact_of(u32 rounded, u32 digits) {
    if constexpr (kWhole) return widen_pair<DType::f16>(kDropout ? digits & ~kSigns : digits);
    const float2 most = widen_pair<S.dtype>(rounded);
    const float2 rest = widen_pair<S.dtype>(digits);
    return {most.x + rest.x, most.y + rest.y};
  }

  /// Of this lane's two of the k-th 8 queries.
  ATTUNE_DEVICE float2 deltas(i32 k) const {
    return ptx::ld_shared_float2(memory_.numbers(query_at_) + kQueries * 4 + lane() % 4 * 8 + k * 32);
  }

  /// From dP^T, which is divided by what P^T is multiplied by, while the other warpgroup makes that.
  ATTUNE_DEVICE void subtract_delta(const Scores& gradient, Scores& carried) const {
    const float factor = value_scale();
#pragma unroll
    for (i32 e = 0; e < kQueries / 2; e += 4) {
      const float2 delta = deltas(e / 4);
#pragma unroll
      for (i32 i = e; i < e + 4; ++i) {
        carried[i] = fmaf(gradient[i], factor, -(i % 2 == 0 ? delta.x : delta.y));
      }
    }
  }

  /// dS^T of dP^T - delta, for both warpgroups.
  ATTUNE_DEVICE void make_gradients(const Scores& gradient) const {
#pragma unroll
    for (i32 k = 0; k < kQueries / 16; ++k) {
      u32 rounded[4] = {};
      u32 digits[4];
      if constexpr (!kWhole) ptx::ldmatrix_x4_trans(rounded, score_row<S>(probabilities(buffer_), k));
      ptx::ldmatrix_x4_trans(digits, score_row<S>(gradients(buffer_), k));
#pragma unroll
      for (i32 i = 0; i < 4; ++i) {
        const i32 e = k * 8 + i * 2;
        float2 factor{gradient[e], gradient[e + 1]};
        if constexpr (kDropout) forget_dropped(factor, kWhole ? digits[i] : rounded[i], deltas(e / 4));
        const float2 exact = exact_of(rounded[i], digits[i]);
        digits[i] = pack<S.dtype>(exact.x * factor.x, exact.y * factor.y);
      }
      store_scores<S>(gradients(buffer_), k, digits);
    }
    announce();
    store_bias_gradient<S>(p_, gradients(buffer_), work().begin, this_step(), work().batch);
  }

  /// The bias of the step after next comes to where P and dS of this one were.
  ATTUNE_DEVICE void make_room_for_bias(const typename Memory::QueryCursor& done) const {
    if constexpr (Group == 1) await_bias_gradient<S>(p_);
    if (elected()) memory_.biases().release(done);
  }

  /// What was stored is there; the other warpgroup may go on.
  static ATTUNE_DEVICE void announce() {
    ptx::fence_proxy_async();
    ptx::bar_sync(kGroup + Group, kWarpgroup);
    ptx::bar_arrive(kShown + Group, kThreads);
  }

  // ---- Dropout ----

  /// Drawn by the warpgroup of P.
  ATTUNE_DEVICE KeptKeyRows<S> kept_pairs(const typename Memory::QueryCursor& at) const {
    if constexpr (Group != 0) return {};
    return kernel::kept_pairs(p_.backward.forward.dropout, memory_, at, thread() / 64);
  }

  /// The next tile's, while the other warpgroup makes dS: this one holds neither scores nor sums then.
  ATTUNE_DEVICE KeptKeyRows<S> next_kept_pairs() const {
    auto next = query_at_;
    next.advance();
    queries_.wait(next);
    return kept_pairs(next);
  }

  /// Where P is dropped, dV sees 0, and a sign tells the other warpgroup. If the digits are what rounding
  /// took, they give way to the rounded number.
  static ATTUNE_DEVICE void drop(u32& rounded, u32& digits, bool keeps_low, bool keeps_high) {
    const u32 dropped = (keeps_low ? 0u : 0xffffu) | (keeps_high ? 0u : 0xffff0000u);
    if constexpr (kWhole) {
      digits |= kSigns & dropped;
      rounded &= ~dropped;
    } else {
      digits = (digits & ~dropped) | (rounded & dropped);
      rounded = (rounded & ~dropped) | (kSigns & dropped);
    }
  }

  /// dP - delta of two pairs, where a sign tells of dropout.
  static ATTUNE_DEVICE void forget_dropped(float2& gradient, u32 signs, const float2& delta) {
    if ((signs & kSigns & 0xffffu) != 0) gradient.x = -delta.x;
    if ((signs & kSigns & 0xffff0000u) != 0) gradient.y = -delta.y;
  }

  /// What the other warpgroup shows.
  static ATTUNE_DEVICE void await(u32 group) {
    ptx::bar_sync(kShown + group, kThreads);
  }

  // ---- Sums of dQ ----

  /// This lane's place in the first fragment; null past the end.
  ATTUNE_DEVICE float* sums_target() const {
    const Sm90Step step = this_step();
    const i32 row = static_cast<i32>(thread() / 32 * kFragmentRows);
    const i32 shift = Schedule::kVarlen ? part_of<S>(memory_).sums_row : 0;
    const i64 head = i64{work().batch} * p_.heads * p_.sharing + step.head;
    float* first =
        p_.backward.query_sums + (head * sum_rows(p_.backward) + step.begin + shift + row) * S.head_dim;
    return row < step.rows ? first + kFirst / kFragmentColumns * kFragmentElements + lane() * 4 : nullptr;
  }

  /// When their turn has come.
  template <i32 Half>
  ATTUNE_DEVICE void add(const Sums<Half>& sums, float* target) {
    if constexpr (kOrdered) await_turn(memory_, parts_ + 1);
    constexpr i32 kFirstFragment = Half * kHalf / kFragmentColumns;
    constexpr i32 kFragments = max(min(valid(S.head_dim) - Half * kHalf, kHalf), 0) / kFragmentColumns;
    if (target != nullptr) {
#pragma unroll
      for (i32 f = 0; f < kFragments; ++f) {
        ptx::red_add_v4_f32(target + (kFirstFragment + f) * kFragmentElements, sums + 4 * f);
      }
    }
    __syncwarp();  // keeps the compiler from adding later, in the way of the next products
    if constexpr (kOrdered) announce_sums();
  }

  /// To the warp that passes the turn on.
  ATTUNE_DEVICE void announce_sums() {
    if (lane() == 0) ptx::mbarrier_arrive(memory_.added(parts_));
    ++parts_;
  }

  // ---- The end of a tile of keys ----

  /// The gradients leave through the tiles of keys and values.
  ATTUNE_DEVICE void finish() {
    meet<Group>();  // both have multiplied with the keys
#pragma unroll
    for (i32 e = 0; e < kColumns / 2; ++e) {
      grad_key_[e] *= p_.backward.forward.scale;
      grad_value_[e] *= value_scale();
    }
    write_columns<S>(memory_.key_tile(), grad_key_, kFirst);
    write_columns<S>(memory_.value_tile(), grad_value_, kFirst);
    ptx::bar_sync(kGroup + Group, kWarpgroup);
    store_gradients();
    ptx::fence_proxy_async();
    keys_.release(key_at_);  // by every thread: each has read from the tile
  }

  /// From there to memory; by one loop, which is less to compile.
  ATTUNE_DEVICE void store_gradients() const {
    const BackwardParams& p = p_.backward;
    const Sm90Work tile = work();
#pragma unroll 1
    for (i32 i = 0; i < 2; ++i) {
      const bool key = i == 0;
      store_columns<S, kFirst, valid(wider_dim(S))>(
          p, tile, key ? memory_.key_tile() : memory_.value_tile(), key ? p.grad_key : p.grad_value,
          key ? p.grad_key_strides : p.grad_value_strides, key ? S.head_dim : S.head_dim_v);
    }
  }

  const GradKeyValueSm90Params& p_;
  const Memory memory_;
  const typename Memory::KeyRing keys_;
  const typename Memory::QueryRing queries_;
  typename Memory::KeyRing::Cursor key_at_{0};
  typename Memory::QueryCursor query_at_{0};
  u32 buffer_ = 0;  // of P and dS
  u32 parts_ = 0;   // added

  Gradient grad_key_;
  Gradient grad_value_;
};

template <KernelSpec S>
ATTUNE_DEVICE void grad_key_value_wide_sm90(const GradKeyValueSm90Params& params) {
  static_assert(S.family == Family::sm90 && S.dtype != DType::f32);
  static_assert(S.query_gradient != QueryGradient::apart);
  static_assert(S.head_dim % 8 == 0 && S.head_dim_v % 8 == 0);
  static_assert(shares_columns(S) && 64 < wider_dim(S) && wider_dim(S) <= 256);
  static_assert(S.block_m == 64 && S.block_n == 64 && S.warps == 12);
  static_assert(S.stages == Sm90Memory<S>::kShared.bias_stages);  // and as many tiles of P and dS
  // The producer keeps track of turns beside its search for pages, or of what a bias and dropout need.
  constexpr bool kMoreToProducer = has_turns_of_pages(S) || (is_laden(S) && wider_dim(S) > 128);

  const Sm90Memory<S> memory = set_up_memory<S>(params);
  const u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // uniform, and known to be
  if (warp < 4) {
    ptx::setmaxnreg_dec<kMoreToProducer ? 40 : 24>();
    if (warp == 0) {
      Sm90Producer<S>(params, memory).run();
    } else if (Sm90Schedule<S>::kOrdered && warp == 1) {
      Sm90Watcher<S>(params, memory).run();
    } else if (Sm90Schedule<S>::kOrdered && warp == 2) {
      Sm90TurnPasser<S>(params, memory).run();
    }
  } else {
    ptx::setmaxnreg_inc<kMoreToProducer ? 232 : 240>();
    if (warp < 8) {
      Sm90WideConsumer<S, 0>(params, memory).run();
    } else {
      Sm90WideConsumer<S, 1>(params, memory).run();
    }
  }
}

}  // namespace attune::kernel
