// Delta on a CPU (backward.h): a task takes block_m queries of one head, one after the other; lanes over
// value columns.
#pragma once

#include "attune/backward.h"
#include "attune/blocks.h"
#include "attune/cpu/rows.h"
#include "attune/cpu/simd.h"
#include "attune/params.h"

namespace attune::kernel {

template <KernelSpec S>
struct alignas(64) DeltaScratch {
  float grad_output[S.head_dim_v];  // of one row
};

template <KernelSpec S>
constexpr i32 delta_cpu_scratch_bytes() {
  return sizeof(DeltaScratch<S>);
}

/// The sum of grad_output * output over the columns of a row.
template <KernelSpec S>
ATTUNE_HD float row_delta(const Element<S.output_dtype>* output, const DeltaScratch<S>& scratch) {
  Floats<S.lanes> sums = Floats<S.lanes>(0.0f);
  for_each_vector<S.head_dim_v, S.lanes>([&]<i32 L>(i32 c) {
    const auto gradient = load<Floats<L>>(&scratch.grad_output[c]);
    const Floats<L> number = load_as_float<S.output_dtype, L>(output + c);
    if constexpr (L == S.lanes) {
      sums = fma<L>(gradient, number, sums);
    } else {
      sums[0] += gradient[0] * number[0];
    }
  });
  float sum = 0;
  for (i32 l = 0; l < S.lanes; ++l) sum += sums[l];
  return sum;
}

/// Where a query's row of the copy is: [batch, len_q, groups, heads, head_dim_v].
template <KernelSpec S>
ATTUNE_HD Element<S.dtype>* copied_row(const BackwardParams& params, const Slot& slot, i64 row) {
  const ForwardParams& p = params.forward;
  const i64 rows_before = (slot.block.batch * i64{p.len_q} + row) * p.groups * p.heads + head_number(p, slot);
  return static_cast<Element<S.dtype>*>(params.grad_output_copy) + rows_before * S.head_dim_v;
}

/// Computes one slot: a tile of queries of one head.
template <KernelSpec S>
ATTUNE_HD void delta_cpu(const BackwardParams& params, i64 number, void* memory) {
  using T = Element<S.output_dtype>;
  auto& scratch = *static_cast<DeltaScratch<S>*>(memory);
  const ForwardParams& p = params.forward;
  const Slot slot = slot_of<S>(p, number);
  const Strides& strides = params.grad_output_strides;
  const T* output = static_cast<const T*>(p.output) + head_offset(slot, p.output_strides);
  const T* grad_output = static_cast<const T*>(params.grad_output) + head_offset(slot, strides);
#pragma clang loop unroll(disable)
  for (i32 i = slot.begin; i < slot.end; ++i) {
    const i64 row = slot.block.q_begin + i;
    load_row<S.output_dtype, S.lanes>(grad_output + row * strides.seq, params.grad_output_column,
                                      scratch.grad_output);
    if (params.grad_output_copy != nullptr) {
      auto* copy = copied_row<S>(params, slot, row);
      for_each_vector<S.head_dim_v, S.lanes>([&]<i32 L>(i32 c) {
        store_as<S.dtype, L>(copy + c, load<Floats<L>>(&scratch.grad_output[c]));
        // As the other kernels will read it: where a query sees one key, delta then cancels what they
        // compute.
        store(&scratch.grad_output[c], load_as_float<S.dtype, L>(copy + c));
      });
    }
    const float grad_lse =
        params.grad_lse.data == nullptr ? 0.0f : params.grad_lse.data[offset_of(params.grad_lse, slot, i)];
    const i64 offset = lse_offset(p, slot, i);
    const float delta = row_delta<S>(output + row * p.output_strides.seq, scratch) - grad_lse;
    const QueryPair pair = query_pair(params.lse.data[offset_of(params.lse, slot, i)], delta);
    params.lse2[offset] = pair.lse2;
    params.delta[offset] = pair.delta;
  }
}

}  // namespace attune::kernel
