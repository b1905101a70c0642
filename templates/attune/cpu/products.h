// Products as register tiles. One factor is rows, of which an element at a time is broadcast, straight from
// where it lies; the other is columns, of which V vectors of `lanes` are taken at a time. So there is no
// horizontal reduction, every extent is exact without padding, and rows may have any stride.
#pragma once

#include "attune/cpu/rows.h"
#include "attune/cpu/simd.h"

namespace attune::kernel {

/// Rows n to n + kTile of rows * columns, for V vectors of columns from column m on: kTile * V sums in
/// registers. Rows past the end repeat the last one; their results are never read.
template <i32 L, i32 kTile, i32 V, i32 kDim, i32 kColumns, i32 kWidth>
__attribute__((noinline)) void multiply_tile(Rows rows, i32 n, const float (*columns)[kColumns],
                                             float (*result)[kWidth]) {
  using F = Floats<L>;
  const float* row[kTile];
  F sum[kTile][V];
#pragma clang loop unroll(full)
  for (i32 r = 0; r < kTile; ++r) {
    row[r] = rows.data + min(n + r, rows.count - 1) * rows.stride;
#pragma clang loop unroll(full)
    for (i32 v = 0; v < V; ++v) sum[r][v] = F(0.0f);
  }
#pragma clang loop unroll_count(2)
  for (i32 c = 0; c < kDim; ++c) {
    F column[V];
#pragma clang loop unroll(full)
    for (i32 v = 0; v < V; ++v) column[v] = load<F>(&columns[c][v * L]);
#pragma clang loop unroll(full)
    for (i32 r = 0; r < kTile; ++r) {
      const F element = F(row[r][c]);
#pragma clang loop unroll(full)
      for (i32 v = 0; v < V; ++v) sum[r][v] = fma<L>(element, column[v], sum[r][v]);
    }
  }
#pragma clang loop unroll(full)
  for (i32 r = 0; r < kTile; ++r) {
#pragma clang loop unroll(full)
    for (i32 v = 0; v < V; ++v) store(&result[n + r][v * L], sum[r][v]);
  }
}

/// result = rows * columns, for V vectors of columns from column m on; the result's begin at 0.
template <i32 L, i32 kTile, i32 V, i32 kDim, i32 kColumns, i32 kWidth>
ATTUNE_HD void multiply(Rows rows, i32 m, const float (&columns)[kDim][kColumns], float (*result)[kWidth]) {
#pragma clang loop unroll(disable)
  for (i32 n = 0; n < rows.count; n += kTile) {
    multiply_tile<L, kTile, V, kDim>(rows, n, reinterpret_cast<const float(*)[kColumns]>(&columns[0][m]),
                                     result);
  }
}

/// sum += the transpose of rows, from column c on, times weights.
template <i32 L, i32 V, i32 C, i32 kWidth>
ATTUNE_HD void add_products(Rows rows, i32 c, const float (*weights)[kWidth], Floats<L> (&sum)[C][V]) {
  using F = Floats<L>;
  const float* row = rows.data + c;
#pragma clang loop unroll_count(2)
  for (i32 n = 0; n < rows.count; ++n, row += rows.stride) {
    F weight[V];
#pragma clang loop unroll(full)
    for (i32 v = 0; v < V; ++v) weight[v] = load<F>(&weights[n][v * L]);
#pragma clang loop unroll(full)
    for (i32 r = 0; r < C; ++r) {
      const F element = F(row[r]);
#pragma clang loop unroll(full)
      for (i32 v = 0; v < V; ++v) sum[r][v] = fma<L>(element, weight[v], sum[r][v]);
    }
  }
}

/// Calls visit.template operator()<C>(c) for all columns c of a row, C = kTile at a time and then the rest.
template <i32 kDim, i32 kTile, typename Visit>
ATTUNE_HD void for_each_column_tile(Visit&& visit) {
  constexpr i32 kWhole = kDim / kTile * kTile;
#pragma clang loop unroll(disable)
  for (i32 c = 0; c < kWhole; c += kTile) visit.template operator()<kTile>(c);
  if constexpr (kWhole < kDim) visit.template operator()<kDim - kWhole>(kWhole);
}

}  // namespace attune::kernel
