// What the gradients of grad_query, grad_key_value and grad_bias have in common (backward.h), whatever their
// lanes are.
#pragma once

#include "attune/cpu/products.h"
#include "attune/cpu/simd.h"

namespace attune::kernel {

/// Of a vector of pairs.
template <i32 L>
struct PairGradients {
  Floats<L> weight;      // the probability
  Floats<L> grad_score;  // dS
};

/// `grad_weight` is dP, with dropout Z dP. Where the query does not see the key both are 0, whatever the
/// other numbers are.
template <i32 L>
ATTUNE_HD PairGradients<L> pair_gradients(Floats<L> score2, Floats<L> lse2, Floats<L> grad_weight,
                                          Floats<L> delta) {
  using F = Floats<L>;
  const Ints<L> hidden = (score2 == neg_inf()) | (lse2 == -neg_inf());
  const F weight = hidden ? F(0.0f) : exp2<L>(score2 - lse2);
  return {weight, hidden ? F(0.0f) : weight * (grad_weight - delta)};
}

/// sums += the transpose of rows * weights: C columns of the rows from column c on, V vectors of weights, of
/// which the first `lanes` lanes count.
template <i32 L, i32 V, i32 C, bool kSomeLanes, i32 kWidth, i32 kColumns>
__attribute__((noinline)) void accumulate_tile(Rows rows, i32 c, i32 lanes, const float (*weights)[kWidth],
                                               float (*sums)[kColumns]) {
  using F = Floats<L>;
  F sum[C][V];
#pragma clang loop unroll(full)
  for (i32 r = 0; r < C; ++r) {
#pragma clang loop unroll(full)
    for (i32 v = 0; v < V; ++v) sum[r][v] = load<F>(&sums[c + r][v * L]);
  }
  add_products<L>(rows, c, weights, sum);
#pragma clang loop unroll(full)
  for (i32 v = 0; v < V; ++v) {
    const Ints<L> counts = lane_numbers<L>() + v * L < lanes;
#pragma clang loop unroll(full)
    for (i32 r = 0; r < C; ++r) {
      float* result = &sums[c + r][v * L];
      store(result, !kSomeLanes || counts ? sum[r][v] : load<F>(result));
    }
  }
}

/// The same for all columns of the rows; sums begin at column m.
template <i32 L, i32 kTile, i32 V, bool kSomeLanes, i32 kDim, i32 kWidth, i32 kColumns>
ATTUNE_HD void accumulate(Rows rows, i32 m, i32 lanes, const float (*weights)[kWidth],
                          float (&sums)[kDim][kColumns]) {
  auto* first = reinterpret_cast<float(*)[kColumns]>(&sums[0][m]);
  for_each_column_tile<kDim, kTile>(
      [&]<i32 C>(i32 c) { accumulate_tile<L, V, C, kSomeLanes>(rows, c, lanes, weights, first); });
}

/// The first `columns` columns, up to a whole vector, become 0.
template <i32 L, i32 kDim, i32 kColumns>
ATTUNE_HD void clear(i32 columns, float (&sums)[kDim][kColumns]) {
#pragma clang loop unroll(disable)
  for (i32 c = 0; c < kDim; ++c) {
#pragma clang loop unroll(disable)
    for (i32 m = 0; m < columns; m += L) store(&sums[c][m], Floats<L>(0.0f));
  }
}

}  // namespace attune::kernel
