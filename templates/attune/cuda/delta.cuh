// What the gradients need of every query (backward.h): its LSE in base 2 and delta. Where the call asks for
// them, also a copy of the output's gradient that the other kernels can read, and zeros that grad_key_value
// starts from: of the sums of the query's gradient, of the turns in which it adds to these, and of the bias's
// gradient, of which it leaves out tiles under a window. Memory bounds the kernel, and each byte is touched
// once: a row belongs to kLanes neighbouring threads, each to kColumns vectors of 4 of its columns.
#pragma once

#include "attune/backward.h"
#include "attune/blocks.h"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/vector.cuh"
#include "attune/num.h"
#include "attune/params.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
class Delta {
  static constexpr i32 kLanes = S.warps * 32 / S.block_m;
  static constexpr i32 kVectors = ceil_div(S.head_dim_v, 4);
  static constexpr i32 kColumns = ceil_div(kVectors, kLanes);
  static constexpr i32 kBytes = size_of(S.output_dtype);  // of an element of the output and its gradient

  static_assert(S.family == Family::rows && 32 % kLanes == 0);
  static_assert(S.head_dim_v >= 1 && S.head_dim_v <= kMaxHeadDim);

  using Values = float4[kColumns];

 public:
  static ATTUNE_DEVICE void run(const BackwardParams& params) {
    ptx::griddepcontrol_launch_dependents();  // all that follow wait for what is written here
    const Slot slot = slot_of<S>(params.forward, blockIdx.x);
    Delta(params, slot, slot.begin + static_cast<i32>(threadIdx.x / kLanes)).run();
  }

 private:
  ATTUNE_DEVICE Delta(const BackwardParams& params, const Slot& slot, i32 query)
      : p_(params),
        slot_(slot),
        query_(query),
        row_(lse_offset(params.forward, slot, query)),
        query_row_(slot.block.q_begin + query) {}

  ATTUNE_DEVICE void run() const {
    if (p_.turns != nullptr) clear_turn();
    float sum = 0.0f;
    if (query_ < slot_.end) {
      Values output, gradient;
      load_output(output);
      load_gradient(gradient);
#pragma unroll
      for (i32 c = 0; c < kColumns; ++c) sum = dot4(output[c], gradient[c], sum);
      if (p_.grad_output_copy != nullptr) store_copy(gradient);
    }
    if (p_.query_sums != nullptr) clear_query_sums();
    if (p_.grad_bias != nullptr && query_ < slot_.end) clear_bias_gradient();
#pragma unroll
    for (i32 distance = 1; distance < kLanes; distance *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    if (query_ < slot_.end && lane() == 0) store_numbers(sum);
  }

  static ATTUNE_DEVICE i32 lane() {
    return static_cast<i32>(threadIdx.x % kLanes);
  }
  /// The first column of the c-th of this thread's vectors.
  static ATTUNE_DEVICE i32 column_of(i32 c) {
    return (lane() + c * kLanes) * 4;
  }

  ATTUNE_DEVICE void load_output(Values& output) const {
    const Strides& strides = p_.forward.output_strides;
    const u8* row = static_cast<const u8*>(p_.forward.output) +
                    (head_offset(slot_, strides) + query_row_ * strides.seq) * kBytes;
#pragma unroll
    for (i32 c = 0; c < kColumns; ++c) {
      output[c] = load4<S.output_dtype, S.copy_bytes>(row + column_of(c) * kBytes, valid(column_of(c)));
    }
  }

  /// What is copied has any strides and alignment, and is read element by element. Rounded as the other
  /// kernels will read it: where a query sees one key, delta then cancels what they compute.
  ATTUNE_DEVICE void load_gradient(Values& gradient) const {
    const Strides& strides = p_.grad_output_strides;
    const u8* row = static_cast<const u8*>(p_.grad_output) +
                    (head_offset(slot_, strides) + query_row_ * strides.seq) * kBytes;
#pragma unroll
    for (i32 c = 0; c < kColumns; ++c) {
      const i32 column = column_of(c);
      if (p_.grad_output_copy == nullptr) {
        gradient[c] = load4<S.output_dtype, S.copy_bytes>(row + column * kBytes, valid(column));
      } else {
        const i64 step = p_.grad_output_column * kBytes;
        gradient[c] = rounded4<S.dtype>(gather4<S.output_dtype>(row + column * step, step, valid(column)));
      }
    }
  }

  /// Columns that there are from this one on: below 1 where a lane is past the last.
  static ATTUNE_DEVICE i32 valid(i32 column) {
    return S.head_dim_v % (4 * kLanes) == 0 ? 4 : S.head_dim_v - column;
  }

  ATTUNE_DEVICE void store_copy(const Values& gradient) const {
    constexpr i32 kCopyBytes = size_of(S.dtype);
    u8* row = static_cast<u8*>(p_.grad_output_copy) +
              ((i64{slot_.block.batch} * p_.forward.len_q + query_row_) * heads() + head()) * S.head_dim_v *
                  kCopyBytes;
#pragma unroll
    for (i32 c = 0; c < kColumns; ++c) {
      store4<S.dtype, packed_alignment(S.head_dim_v * kCopyBytes)>(row + column_of(c) * kCopyBytes,
                                                                   gradient[c], valid(column_of(c)));
    }
  }

  /// Of this thread's row; where sums are fragments, to the end of the last fragment.
  ATTUNE_DEVICE void clear_query_sums() const {
    const i32 end = p_.sum_fragments == 0 ? slot_.end : round_up(slot_.end, kFragmentRows);
    if (query_ >= end) return;
    u8* sums = reinterpret_cast<u8*>(p_.query_sums + sum_row(p_, slot_, query_) * S.head_dim);
#pragma unroll 1
    for (i32 column = lane() * 4; column < S.head_dim; column += kLanes * 4) {
      store4<DType::f32, packed_alignment(S.head_dim * 4)>(sums + column * 4, float4{0, 0, 0, 0},
                                                           S.head_dim - column);
    }
  }

  /// The query's row, of 16-bit elements that lie as the copy engine wants them.
  ATTUNE_DEVICE void clear_bias_gradient() const {
    constexpr i32 kChunk = 8;
    const BiasStrides& strides = p_.grad_bias_strides;
    u16* row = static_cast<u16*>(p_.grad_bias) + head_offset(slot_, strides) + query_row_ * strides.query;
    const i32 whole = p_.forward.len_k / kChunk * kChunk;
#pragma unroll 4
    for (i32 key = lane() * kChunk; key < whole; key += kLanes * kChunk) {
      *reinterpret_cast<int4*>(row + key) = int4{0, 0, 0, 0};
    }
    for (i32 key = whole + lane(); key < p_.forward.len_k; key += kLanes) row[key] = 0;
  }

  /// One for each thread: there are more of these than of turns.
  ATTUNE_DEVICE void clear_turn() const {
    static_assert(S.block_m <= kTurnRows && S.warps * 32 > 2 * kTurnParts);
    const i64 turn = i64{blockIdx.x} * blockDim.x + threadIdx.x;
    if (turn < query_turns(p_.forward)) p_.turns[turn] = 0;
  }

  ATTUNE_DEVICE void store_numbers(float sum) const {
    if (p_.grad_lse.data != nullptr) sum -= p_.grad_lse.data[offset_of(p_.grad_lse, slot_, query_)];
    const QueryPair pair = query_pair(p_.lse.data[offset_of(p_.lse, slot_, query_)], sum);
    p_.lse2[row_] = pair.lse2;
    p_.delta[row_] = pair.delta;
  }

  ATTUNE_DEVICE i32 heads() const {
    return p_.forward.groups * p_.forward.heads;
  }
  ATTUNE_DEVICE i32 head() const {
    return head_number(p_.forward, slot_);
  }

  const BackwardParams& p_;
  const Slot slot_;
  const i32 query_;      // of the block
  const i64 row_;        // its number's index
  const i64 query_row_;  // its row of the tensors
};

template <KernelSpec S>
ATTUNE_DEVICE void delta(const BackwardParams& params) {
  Delta<S>::run(params);
}

}  // namespace attune::kernel
