// The gradient of a bias tensor on tensor cores for sm_80 and up, f16 and bf16.
//
// One block computes one slot (backward.h), block_m rows by block_n columns of the bias tensor: rows of the
// query by rows of the key. Sums of dS stay in registers, keys as rows (key_row_scores.cuh), while it walks
// over all batch entries, sequences and heads that the elements were added to; for a bias of one row also
// over all queries. It loads, waits and computes: blocks that share a multiprocessor cover for each other.
//
// Registers of one thread, 255 at most: 16 * tile_m x 8 * tile_n scores, as many gradients, elements of the
// bias and sums.
#pragma once

#include "attune/backward.h"
#include "attune/cuda/key_row_scores.cuh"
#include "attune/cuda/mma_tile.cuh"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/segments.cuh"
#include "attune/cuda/tile.cuh"
#include "attune/cuda/vector.cuh"
#include "attune/params.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
class GradBiasMma : KeyRowScores<S> {
  static_assert(S.family == Family::mma && S.dtype != DType::f32);
  static_assert(S.bias == Bias::f32 || S.bias == Bias::f16 || S.bias == Bias::bf16);
  using Base = KeyRowScores<S>;
  using Base::key_tile_, Base::p_, Base::queries_, Base::segment_, Base::tile_, Base::value_tile_,
      Base::window_;
  using Base::kShared, Base::kThreads, Base::kWarpQueries, Base::kSharers;
  using Base::row_of, Base::column_of, Base::rows_of, Base::sharer;
  using typename Base::Scores;
  static_assert(kWarpQueries == Base::kPassQueries);

 public:
  static ATTUNE_DEVICE void run(const BackwardParams& params, u32 shared) {
    GradBiasMma(params, shared, bias_slot_of<S>(params, blockIdx.x)).run();
  }

 private:
  ATTUNE_DEVICE GradBiasMma(const BackwardParams& params, u32 shared, const BiasSlot& slot)
      : Base(params, shared, slot.begin), slot_(slot) {}

  ATTUNE_DEVICE void run() {
    clear(sums_);
#pragma unroll 1
    for (i32 number = 0; number < biased_batches(p_); ++number) {
      for_each_segment_of_block<S>(p_.forward, slot_.batch + number, slot_.begin, slot_.end,
                                   [&](const KeySegment& segment) { add_segment(segment); });
    }
    if (p_.bias_rows == 1) add_up_rows();
    store(bias_slot_of<S>(p_, ptx::opaque(blockIdx.x)));
  }

  ATTUNE_DEVICE void add_segment(const KeySegment& whole) {
    const Block& block = whole.block;
    window_ = window_of_block<S>(p_.forward, block);
    segment_ = seen_part<S>(whole, window_);
    const i32 keys = segment_.end - segment_.begin;
    if (keys <= 0) return;
    const QueryRange visiting = visiting_queries<S>(window_, block.len_q, segment_.key, segment_.key + keys);
    queries_ = {max(visiting.begin, slot_.m_begin - block.q_begin),
                min(visiting.end, slot_.m_end - block.q_begin)};
    // Where rows are kept apart, the tile's first row is the slot's, even if that comes before the block.
    const i32 first = p_.bias_rows == 1 ? queries_.begin : slot_.m_begin - block.q_begin;
#pragma unroll 1
    for (i32 m = first; m < queries_.end; m += S.block_m) {
#pragma unroll 1
      for (i32 number = 0; number < biased_heads(p_); ++number) {
        Base::head_ = biased_head(p_, slot_, number);
        load(Base::head_now(), m);
        add_tile(m);
      }
    }
  }

  ATTUNE_DEVICE void load(const Slot& head, i32 m) {
    const ForwardParams& p = p_.forward;
    const i32 first = queries_.begin - m;
    const i32 last = queries_.end - m;
    const i64 row = head.block.q_begin + m;
    __syncthreads();  // the tiles before are no longer read
    Base::template load_rows<S.head_dim>(key_tile_, rows_of(p.key) + head_offset(head, p.key_strides),
                                         p.key_strides.seq);
    Base::template load_rows<S.head_dim_v>(value_tile_, rows_of(p.value) + head_offset(head, p.value_strides),
                                           p.value_strides.seq);
    copy_rows<S.block_m, S.head_dim, S.copy_bytes, kThreads>(
        tile_, rows_of(p.query) + head_offset(head, p.query_strides) + row * p.query_strides.seq,
        p.query_strides.seq, first, last);
    copy_rows<S.block_m, S.head_dim_v, S.copy_bytes, kThreads>(tile_ + kShared.second_ring_offset,
                                                               rows_of(p_.grad_output) +
                                                                   head_offset(head, p_.grad_output_strides) +
                                                                   row * p_.grad_output_strides.seq,
                                                               p_.grad_output_strides.seq, first, last);
    Base::copy_numbers(tile_, m, first, last);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    __syncthreads();
  }

  ATTUNE_DEVICE void add_tile(i32 m) {
    Scores probabilities, gradients;
    Base::differentiate(probabilities, gradients, m, first_row());
#pragma unroll
    for (i32 i = 0; i < S.tile_m; ++i) {
#pragma unroll
      for (i32 n = 0; n < S.tile_n; ++n) {
#pragma unroll
        for (i32 e = 0; e < 4; ++e) sums_[i][n][e] += gradients[i][n][e];
      }
    }
  }

  /// The warp's first query of the tile.
  static ATTUNE_DEVICE i32 first_row() {
    return sharer() * kWarpQueries;
  }

  /// A bias of one row: the first of a thread's queries gets the sum of all of the block's, added up in a
  /// fixed order.
  ATTUNE_DEVICE void add_up_rows() {
    __syncthreads();  // the tiles are no longer read
#pragma unroll
    for (i32 i = 0; i < S.tile_m; ++i) {
#pragma unroll
      for (i32 half = 0; half < 2; ++half) {
        float sum = 0.0f;
#pragma unroll
        for (i32 n = 0; n < S.tile_n; ++n) sum += sums_[i][n][half * 2] + sums_[i][n][half * 2 + 1];
        sum = quad_sum(sum);
        ptx::st_shared_b32(sum_address(row_of(i, half * 2), sharer()), bits_of(sum));
      }
    }
    __syncthreads();
#pragma unroll
    for (i32 i = 0; i < S.tile_m; ++i) {
#pragma unroll
      for (i32 half = 0; half < 2; ++half) {
        float sum = 0.0f;
#pragma unroll
        for (i32 other = 0; other < kSharers; ++other) {
          sum += float_of(ptx::ld_shared_b32(sum_address(row_of(i, half * 2), other)));
        }
        sums_[i][0][half * 2] = sum;
      }
    }
  }
  ATTUNE_DEVICE u32 sum_address(i32 row, i32 sharer) const {
    return key_tile_ + static_cast<u32>(row * kSharers + sharer) * 4;
  }

  ATTUNE_DEVICE void store(const BiasSlot& slot) const {
    const BiasStrides& strides = p_.grad_bias_strides;
    constexpr DType kType = bias_dtype(S.bias);
    u8* elements = static_cast<u8*>(p_.grad_bias) + head_offset(slot, strides) * size_of(kType);
    const i32 end = p_.bias_rows == 1 ? 1 : slot.m_end;
#pragma unroll
    for (i32 n = 0; n < S.tile_n; ++n) {
#pragma unroll
      for (i32 i = 0; i < S.tile_m; ++i) {
#pragma unroll
        for (i32 e = 0; e < 4; ++e) {
          const i32 row = slot.m_begin + first_row() + column_of(n, e);
          const i32 column = slot.begin + row_of(i, e);
          if (row >= end || column >= slot.end) continue;
          store1<kType>(elements + (row * strides.query + column * strides.key) * size_of(kType),
                        sums_[i][n][e]);
        }
      }
    }
  }

  const BiasSlot slot_;
  Scores sums_;
};

template <KernelSpec S>
ATTUNE_DEVICE void grad_bias_mma(const BackwardParams& params) {
  extern __shared__ __align__(128) u8 shared[];
  GradBiasMma<S>::run(params, ptx::shared_address(shared));
}

}  // namespace attune::kernel
