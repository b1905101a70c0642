// The gradient of a bias tensor on Hopper: products of warpgroups (wgmma), tiles by the tensor copy engine,
// warp-specialised. It computes what grad_key_value can't store beside its own results: above all gradients
// of broadcast tensors, where an element's is the sum over all pairs that the element was added to.
//
// A block stays on its SM and takes one slot (backward.h) after the other, block_m queries by block_n keys.
// It walks over all batch entries, sequences and heads that its elements were added to; for a bias of one row
// also over all queries. One warp, the producer, copies a ring of pairs of tiles, of queries and keys, then
// of output gradients and values; the slot's tile of the bias itself is copied once. Two warpgroups of 128
// threads own 64 queries each:
//
//    S = Q K^T    P = exp2(S + bias - LSE)    dP = dO V^T    sums += P (dP - delta)
//
// A bias of one row has few slots. Where multiprocessors would be idle, the blocks of a cluster share out the
// queries of a slot, and the first adds up what they have.
//
// Queries are rows, so that their LSE and delta are two numbers of a thread each. Sums stay in registers: the
// same bits in every run, and no memory beside the result.
//
// Registers of one thread, head dim to 128:  producer  consumer    S + dP + sums
//                                            40        232         64 + 64 + 64
//   to 256                                   40        232         32 + 32 + 32
#pragma once

#include "attune/backward.h"
#include "attune/cuda/dropout.cuh"
#include "attune/cuda/grad_bias_sm90_producer.cuh"
#include "attune/cuda/panels.cuh"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/ptx_sm90.cuh"
#include "attune/cuda/ptx_wgmma.cuh"
#include "attune/cuda/score_bias.cuh"
#include "attune/cuda/shared.h"
#include "attune/cuda/tile.cuh"
#include "attune/cuda/vector.cuh"
#include "attune/cuda/warpgroup.cuh"
#include "attune/num.h"
#include "attune/params.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
class GradBiasSm90Consumer : WarpgroupThread {
  using Memory = GradBiasMemory<S>;
  using Shared = GradBiasSm90Shared;
  static constexpr i32 kThreads = Shared::kWarpgroups * kWarpgroup;
  static constexpr DType kType = bias_dtype(S.bias);
  static constexpr bool kDropout = S.dropout == Dropout::on;

  using Tile = float[S.block_n / 2];  // element e: query half e / 2 % 2, keys e / 4 * 8 + e % 2
  using Pair = float[2];              // of a thread's two queries

 public:
  ATTUNE_DEVICE GradBiasSm90Consumer(const GradBiasSm90Params& params, Memory memory, u32 group)
      : p_(params), memory_(memory), pairs_(memory.pairs()), biases_(memory.biases()), group_(group) {}

  ATTUNE_DEVICE void run() {
    clear();
#pragma unroll 1
    while (true) {
      pairs_.wait(at_);
      const GradBiasStep step = this_step();
      if (step.slot < 0) return;
      if ((step.flags & kComputes) != 0) {
        add();
      } else {
        release();
      }
      if ((step.flags & kLast) == 0) continue;
      store(bias_slot_of<S>(p_.backward, static_cast<u32>(step.slot)));
      clear();
    }
  }

 private:
  // Read again where it is needed: registers are for accumulators. Both pairs of a step tell of it.
  ATTUNE_DEVICE GradBiasStep this_step() const {
    return memory_.read_step(at_);
  }

  ATTUNE_DEVICE typename Memory::BiasRing::Cursor bias_cursor() const {
    return typename Memory::BiasRing::Cursor((memory_.read_flags(at_) & kOddBias) != 0 ? 1 : 0);
  }

  ATTUNE_DEVICE void clear() {
#pragma unroll
    for (i32 e = 0; e < S.block_n / 2; ++e) sums_[e] = 0.0f;
  }

  /// Lets a pair go, once all of the warp have read from it.
  ATTUNE_DEVICE void release() {
    __syncwarp();
    if (lane() == 0) pairs_.release(at_);
    at_.advance();
  }

  /// The thread's first query of the tile; the second is 8 further down.
  ATTUNE_DEVICE i32 first_query() const {
    return static_cast<i32>(group_ * Shared::kGroupRows + thread() / 32 * 16 + lane() / 4);
  }
  /// Likewise of keys.
  static ATTUNE_DEVICE i32 first_key() {
    return static_cast<i32>(lane() % 4 * 2);
  }

  // ---- One tile of queries ----

  ATTUNE_DEVICE void add() {
    Tile score, gradient;
    multiply<S.head_dim>(score, at_);
    u32 kept[2];
    draw(kept);
    typename Memory::Cursor second = at_;
    second.advance();
    pairs_.wait(second);
    multiply<S.head_dim_v>(gradient, second);
    Pair lse2, delta;
    load_numbers(lse2, delta, this_step());
    ptx::wgmma_wait_group<1>();
    ptx::pin(score);
    release();
    make_probabilities(score, lse2);
    if ((memory_.read_flags(at_) & kLast) != 0) biases_.release(bias_cursor());
    ptx::wgmma_wait_group<0>();
    ptx::pin(gradient);
    const GradBiasStep step = this_step();
    release();
    subtract_delta(gradient, delta, kept);
    if ((step.flags & kMasked) != 0) hide_invisible(score, gradient, step);
#pragma unroll
    for (i32 e = 0; e < S.block_n / 2; ++e) sums_[e] = fmaf(score[e], gradient[e], sums_[e]);
  }

  /// This warpgroup's rows of Q K^T or dO V^T; asynchronous.
  template <i32 Dim>
  ATTUNE_DEVICE void multiply(Tile& d, const typename Memory::Cursor& at) const {
    multiply_rows<S.dtype, S.block_m, ceil_div(Dim, 16)>(
        d, memory_.query_tile(at) + group_ * kPanelBytes<Shared::kGroupRows>, memory_.key_tile(at));
  }

  /// Past the end of the tensor the LSE is +inf, which makes every probability 0.
  ATTUNE_DEVICE void load_numbers(Pair& lse2, Pair& delta, const GradBiasStep& step) const {
    const i32 len_q = p_.backward.forward.len_q;
    const i32 row = step.row + first_query();
    const i64 first = (i64{step.batch} * p_.heads + step.head) * len_q + row;
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
      const bool inside = row + half * 8 < len_q;
      lse2[half] = inside ? p_.backward.lse2[first + half * 8] : -neg_inf();
      delta[half] = inside ? p_.backward.delta[first + half * 8] : 0.0f;
    }
  }

  /// P of S.
  ATTUNE_DEVICE void make_probabilities(Tile& score, const Pair& lse2) {
    const float scale2 = p_.backward.forward.scale * kLog2e;
    const i32 row = static_cast<i32>(group_ * Shared::kGroupRows + thread() / 32 * 16);
    const auto at = bias_cursor();
    biases_.wait(at);
    const BiasTile<S> bias(biases_.tile(at), row, p_.bias_rows == 1, static_cast<i32>(lane()));
#pragma unroll
    for (i32 k = 0; k < S.block_n / 16; ++k) {
      float element[8];
      bias.load(element, k);
#pragma unroll
      for (i32 i = 0; i < 8; ++i) {
        float& s = score[k * 8 + i];
        s = ptx::ex2_approx_ftz(with_bias<S.bias>(fmaf(s, scale2, -lse2[i / 2 % 2]), element[i]));
      }
    }
  }

  /// What P is multiplied with, of dP.
  ATTUNE_DEVICE void subtract_delta(Tile& gradient, const Pair& delta, const u32 (&kept)[2]) const {
#pragma unroll
    for (i32 e = 0; e < S.block_n / 2; ++e) {
      const i32 half = e / 2 % 2;
      if constexpr (kDropout) {
        const bool keeps = (kept[half] >> (e / 4 * 2 + e % 2) & 1u) != 0;
        gradient[e] =
            keeps ? fmaf(gradient[e], p_.backward.forward.dropout.rescale, -delta[half]) : -delta[half];
      } else {
        gradient[e] -= delta[half];
      }
    }
  }

  /// Both factors of pairs that do not see each other become 0: either may be NaN.
  ATTUNE_DEVICE void hide_invisible(Tile& probability, Tile& gradient, const GradBiasStep& step) const {
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
      const i32 query = first_query() + half * 8;
      i32 begin = step.first_key;
      i32 end = step.first_query <= query && query < step.last_query ? step.last_key : 0;
      if constexpr (S.window_left == Edge::bounded) begin = max(begin, query + step.lower);
      if constexpr (S.window_right == Edge::bounded) end = min(end, query + step.upper + 1);
      begin -= first_key();
      end -= first_key();
#pragma unroll
      for (i32 e = 0; e < S.block_n / 4; ++e) {
        const i32 key = e / 2 * 8 + e % 2;
        if (key >= begin && key < end) continue;
        probability[e / 2 * 4 + half * 2 + e % 2] = 0.0f;
        gradient[e / 2 * 4 + half * 2 + e % 2] = 0.0f;
      }
    }
  }

  /// Which of the thread's keys are kept, a bit for each, for each of its queries. A call of Philox decides
  /// over just those keys of 32 that the accumulator of a thread holds (philox.h). Where sequences are packed
  /// its keys may be those of two calls, which others of the query's four threads have made.
  ATTUNE_DEVICE void draw(u32 (&kept)[2]) const {
    if constexpr (!kDropout) return;
    const GradBiasPlace place = memory_.read_place(at_);
    const u32 first = S.blocks == Blocks::varlen ? static_cast<u32>(place.key) % kDropoutGroup : 0;
    const i32 call = dropout_call(place.key - static_cast<i32>(first)) + static_cast<i32>(lane() % 4);
    const i32 groups = S.block_n / kDropoutGroup + (first == 0 ? 0 : 1);
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
      const u32 query = static_cast<u32>(place.query + first_query() + half * 8);
      u64 drawn = 0;  // a byte for each group
#pragma unroll 1
      for (i32 group = groups - 1; group >= 0; --group) {
        const DropoutParams& p = p_.backward.forward.dropout;
        drawn = drawn << 8 | kept_keys(p, place.block, place.head, query, call + group * 4);
      }
      kept[half] = of_own_keys(drawn, first + static_cast<u32>(first_key()));
    }
  }

  /// Of what was drawn for a query, the bits of this thread's keys: the first is `key` of the groups.
  static ATTUNE_DEVICE u32 of_own_keys(u64 drawn, u32 key) {
    if constexpr (S.blocks != Blocks::varlen) return static_cast<u32>(drawn);
    const u32 kept = of_every_eighth(drawn, key) | of_every_eighth(drawn, key + 1) << 1;
    return ptx::opaque(kept);  // or the compiler keeps what it is made of
  }
  /// Of this key and those 8, 16, ... further down: every second bit.
  static ATTUNE_DEVICE u32 of_every_eighth(u64 drawn, u32 key) {
    const u64 other = __shfl_sync(0xffffffffu, drawn, static_cast<i32>(key % 8 / 2), 4);
    return static_cast<u32>(other >> (key / 8 * 2 + key % 2)) & 0x55555555u;
  }

  // ---- The end of a slot ----

  ATTUNE_DEVICE void store(const BiasSlot& slot) {
    const BiasStrides& strides = p_.backward.grad_bias_strides;
    constexpr i32 kBytes = size_of(kType);
    u8* elements = static_cast<u8*>(p_.backward.grad_bias) +
                   (head_offset(slot, strides) + slot.begin * strides.key) * kBytes;
    const i32 columns = slot.end - slot.begin;
    if (p_.backward.bias_rows == 1) return store_row(elements, strides.key, columns);
    const bool pairs =
        strides.key == 1 &&
        (reinterpret_cast<u64>(elements) | static_cast<u64>(strides.query * kBytes)) % (2 * kBytes) == 0;
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
      const i32 row = slot.m_begin + first_query() + half * 8;
      if (row >= slot.m_end) continue;
      u8* const first = elements + row * strides.query * kBytes;
#pragma unroll
      for (i32 n = 0; n < S.block_n / 8; ++n) {
        const i32 column = n * 8 + first_key();
        const float* x = sums_ + n * 4 + half * 2;
        u8* const at = first + column * strides.key * kBytes;
        if (pairs && column + 1 < columns) {
          store2(at, x[0], x[1]);
        } else {
          if (column < columns) store1<kType>(at, x[0]);
          if (column + 1 < columns) store1<kType>(at + strides.key * kBytes, x[1]);
        }
      }
    }
  }

  static ATTUNE_DEVICE void store2(u8* at, float x, float y) {
    if constexpr (kType == DType::f32) {
      *reinterpret_cast<float2*>(at) = {x, y};
    } else {
      *reinterpret_cast<u32*>(at) = pack<kType>(x, y);
    }
  }

  /// A bias of one row: the sums over all of the block's queries, then over all of the cluster's, added up in
  /// a fixed order. Warps leave theirs behind the row of the bias tile, where the copy engine never writes.
  ATTUNE_DEVICE void store_row(u8* elements, i64 stride, i32 columns) {
    const u32 scratch = biases_.tile(typename Memory::BiasRing::Cursor(0)) + Shared::kScratchOffset;
    const u32 warp = threadIdx.x / 32 - kWarpgroup / 32;
#pragma unroll
    for (i32 e = 0; e < S.block_n / 4; ++e) {
      float sum = sums_[e / 2 * 4 + e % 2] + sums_[e / 2 * 4 + e % 2 + 2];
#pragma unroll
      for (i32 distance = 4; distance < 32; distance *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      }
      const i32 key = e / 2 * 8 + first_key() + e % 2;
      if (lane() < 4) ptx::st_shared_float(scratch + (warp * S.block_n + static_cast<u32>(key)) * 4, sum);
    }
    ptx::bar_sync(1, kThreads);
    const i32 key = static_cast<i32>(threadIdx.x) - kWarpgroup;
    const bool has_key = key < columns;
    float sum = has_key ? column_sum(scratch, kThreads / 32, key) : 0.0f;
    if (p_.slot_blocks > 1) {  // the cluster has this slot alone
      const u32 rank = ptx::cluster_ctarank();
      const u32 of_blocks = scratch + kThreads / 32 * S.block_n * 4;
      const u32 place = of_blocks + (rank * S.block_n + static_cast<u32>(key)) * 4;
      if (has_key) ptx::st_shared_cluster_float(ptx::mapa(place, 0), sum);
      ptx::cluster_sync();
      if (rank != 0) return;
      if (has_key) sum = column_sum(of_blocks, p_.slot_blocks, key);
    }
    if (has_key) store1<kType>(elements + key * stride * size_of(kType), sum);
    ptx::bar_sync(1, kThreads);
  }

  /// Of so many rows in shared memory, one number a key.
  static ATTUNE_DEVICE float column_sum(u32 rows, i32 count, i32 key) {
    float sum = 0.0f;
#pragma unroll
    for (i32 row = 0; row < count; ++row) {
      sum += float_of(ptx::ld_shared_b32(rows + static_cast<u32>(row * S.block_n + key) * 4));
    }
    return sum;
  }

  const GradBiasSm90Params& p_;
  const Memory memory_;
  const typename Memory::PairRing pairs_;
  const typename Memory::BiasRing biases_;
  const u32 group_;
  typename Memory::Cursor at_{0};
  Tile sums_;
};

template <KernelSpec S>
ATTUNE_DEVICE void grad_bias_sm90(const GradBiasSm90Params& params) {
  static_assert(S.family == Family::sm90 && S.dtype != DType::f32);
  static_assert(S.bias == Bias::f32 || S.bias == Bias::f16 || S.bias == Bias::bf16);
  static_assert(S.head_dim % 8 == 0 && S.head_dim_v % 8 == 0);
  static_assert(S.block_m == GradBiasSm90Shared::kWarpgroups * GradBiasSm90Shared::kGroupRows);
  static_assert(S.stages >= 2 && S.warps == 12);

  extern __shared__ __align__(1024) u8 shared[];
  const GradBiasMemory<S> memory{ptx::shared_address(shared)};
  if (threadIdx.x == 0) {
    for (const TensorMap* map :
         {&params.query, &params.key, &params.value, &params.grad_output, &params.bias}) {
      ptx::prefetch_tensormap(*map);
    }
    memory.pairs().init(GradBiasSm90Shared::kWarpgroups * kWarpgroup / 32);
    memory.biases().init(GradBiasSm90Shared::kWarpgroups * kWarpgroup);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (params.slot_blocks > 1) ptx::cluster_sync();                 // all of its blocks have begun
  const u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // uniform, and known to be
  if (warp < 4) {
    ptx::setmaxnreg_dec<40>();
    if (warp == 0) {
      GradBiasSm90Producer<S>(params, memory).run();
      if (params.slot_blocks > 1) ptx::cluster_sync();  // with the consumers, in store_row()
    }
  } else {
    ptx::setmaxnreg_inc<232>();
    GradBiasSm90Consumer<S>(params, memory, warp / 4 - 1).run();
  }
}

}  // namespace attune::kernel
