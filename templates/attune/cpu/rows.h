// Rows of tensors, as kernels read and write them: as float32 where they lie or in a copy, and transposed, so
// that a vector holds one column of `lanes` rows.
#pragma once

#include "attune/cpu/simd.h"

namespace attune::kernel {

/// Rows of float32.
struct Rows {
  const float* data;
  i64 stride;
  i32 count;
};

/// The rows [begin, end) of them.
ATTUNE_HD Rows slice(Rows rows, i32 begin, i32 end) {
  return {rows.data + begin * rows.stride, rows.stride, end - begin};
}

/// Calls visit<lanes>(column) for all columns of a row: whole vectors, then one by one.
template <i32 kDim, i32 L, typename Visit>
ATTUNE_HD void for_each_vector(Visit&& visit) {
  constexpr i32 kWhole = kDim / L * L;
#pragma clang loop unroll(disable)
  for (i32 c = 0; c < kWhole; c += L) visit.template operator()<L>(c);
#pragma clang loop unroll(disable)
  for (i32 c = kWhole; c < kDim; ++c) visit.template operator()<1>(c);
}

/// A row whose columns may be any distance apart, or all the same one.
template <DType D, i32 L, i32 kDim>
ATTUNE_HD void load_row(const Element<D>* row, i64 step, float (&buffer)[kDim]) {
  for_each_vector<kDim, L>([&]<i32 N>(i32 c) {
    if (step == 1) return store(&buffer[c], load_as_float<D, N>(row + c));
    for (i32 l = c; l < c + N; ++l) buffer[l] = load_as_float<D>(row + l * step);
  });
}

/// `count` rows, the one with number n at row_of(n): widened into `buffer`, or in place, `stride` apart.
template <DType D, i32 L, bool kCopied, i32 kDim, typename RowOf>
ATTUNE_HD Rows fetch(RowOf&& row_of, i64 stride, i32 count, float (*buffer)[kDim]) {
  if constexpr (!kCopied) {
    return {row_of(0), stride, count};
  } else {
#pragma clang loop unroll(disable)
    for (i32 n = 0; n < count; ++n) {
      const Element<D>* row = row_of(n);
      if constexpr (kDim >= L) {
        for (i32 c = 0; c + L <= kDim; c += L) store(&buffer[n][c], load_as_float<D, L>(row + c));
        // The last vector overlaps the one before it.
        store(&buffer[n][kDim - L], load_as_float<D, L>(row + kDim - L));
      } else {
        for (i32 c = 0; c < kDim; ++c) buffer[n][c] = load_as_float<D>(row + c);
      }
    }
    return {&buffer[0][0], kDim, count};
  }
}

/// `count` rows, times factor, become columns. Lanes without a row become 0, up to a whole vector.
template <DType D, i32 L, i32 kDim, i32 kColumns>
__attribute__((noinline)) void load_transposed(const Element<D>* rows, i64 stride, i32 count, float factor,
                                               float (&columns)[kDim][kColumns]) {
  constexpr i32 kWhole = kDim / L * L;
#pragma clang loop unroll(disable)
  for (i32 m = 0; m < count; m += L) {
    const i32 lanes = min(L, count - m);
    const Element<D>* first = rows + m * stride;
#pragma clang loop unroll(disable)
    for (i32 c = 0; c < kWhole; c += L) {
      Floats<L> tile[L];
#pragma clang loop unroll(full)
      for (i32 i = 0; i < L; ++i) {
        tile[i] = i < lanes ? load_as_float<D, L>(first + i * stride + c) * factor : Floats<L>(0.0f);
      }
      transpose<L>(tile);
#pragma clang loop unroll(full)
      for (i32 i = 0; i < L; ++i) store(&columns[c + i][m], tile[i]);
    }
#pragma clang loop unroll(disable) vectorize(disable)
    for (i32 c = kWhole; c < kDim; ++c) {
#pragma clang loop unroll(disable) vectorize(disable)
      for (i32 i = 0; i < L; ++i) {
        columns[c][m + i] = i < lanes ? load_as_float<D>(first + i * stride + c) * factor : 0.0f;
      }
    }
  }
}

/// `count` columns become rows, times factor_of(m) for the vector of columns from m on.
template <DType D, i32 L, i32 kDim, i32 kColumns, typename FactorOf>
ATTUNE_HD void store_transposed(const float (&columns)[kDim][kColumns], Element<D>* rows, i64 stride,
                                i32 count, FactorOf&& factor_of) {
  constexpr i32 kWhole = kDim / L * L;
#pragma clang loop unroll(disable)
  for (i32 m = 0; m < count; m += L) {
    const i32 lanes = min(L, count - m);
    const Floats<L> factor = factor_of(m);
#pragma clang loop unroll(disable)
    for (i32 c = 0; c < kWhole; c += L) {
      Floats<L> tile[L];
#pragma clang loop unroll(full)
      for (i32 i = 0; i < L; ++i) tile[i] = load<Floats<L>>(&columns[c + i][m]) * factor;
      transpose<L>(tile);
#pragma clang loop unroll(full)
      for (i32 i = 0; i < L; ++i) {
        if (i < lanes) store_as<D, L>(rows + (m + i) * stride + c, tile[i]);
      }
    }
#pragma clang loop unroll(disable) vectorize(disable)
    for (i32 c = kWhole; c < kDim; ++c) {
#pragma clang loop unroll(disable) vectorize(disable)
      for (i32 i = 0; i < lanes; ++i) {
        store_as<D>(rows + (m + i) * stride + c, columns[c][m + i] * factor[i]);
      }
    }
  }
}

/// `count` numbers, and `rest` up to a whole vector.
template <i32 L>
ATTUNE_HD void load_numbers(const float* numbers, i32 count, float rest, float* buffer) {
#pragma clang loop unroll(disable) vectorize(disable)
  for (i32 m = 0; m < round_up(count, L); ++m) buffer[m] = m < count ? numbers[m] : rest;
}

}  // namespace attune::kernel
