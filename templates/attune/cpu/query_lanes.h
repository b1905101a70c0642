// What a task whose lanes are queries does to numbers of pairs: scores get their bias and mask, and dropout
// drops. Row j - keys.begin of the numbers is key j of the task's block.
#pragma once

#include "attune/cpu/simd.h"
#include "attune/cpu/task.h"
#include "attune/philox.h"
#include "attune/semantics.h"

namespace attune::kernel {

/// The bias of `lanes` keys from key j on, a vector of queries each. Neither keys from `columns` on nor
/// queries from `rows` on are read: those repeat the last, these are 0.
template <KernelSpec S>
ATTUNE_HD void load_bias(const Task<S>& task, i32 i, i32 rows, i32 j, i32 columns,
                         Floats<S.lanes> (&tile)[S.lanes]) {
  constexpr i32 L = S.lanes;
  const Block& block = task.slot.block;
  const BiasStrides& strides = task.params.bias_strides;
  const auto* bias = static_cast<const BiasElement<S.bias>*>(task.params.bias) +
                     head_offset(task.slot, strides) + (block.q_begin + i) * strides.query;
  i64 column[L];
#pragma clang loop unroll(disable) vectorize(disable)
  for (i32 n = 0; n < L; ++n) {
    column[n] = key_row<S>(task.params, block, j + min(n, columns - 1)) * strides.key;
  }
  if (strides.query == 0) {
#pragma clang loop unroll(disable) vectorize(disable)
    for (i32 n = 0; n < L; ++n) tile[n] = Floats<L>(load_bias_as_float<S.bias>(bias + column[n]));
    return;
  }
  const bool neighbours = S.keys == Keys::contiguous && strides.key == 1 && columns == L;
#pragma clang loop unroll(disable)
  for (i32 r = 0; r < L; ++r, bias += strides.query) {
    float row[L] = {};
    if (r >= rows) {
      tile[r] = load<Floats<L>>(row);
    } else if (neighbours) {
      __builtin_prefetch(bias + column[0] + 2 * L);  // rows are too many streams for the hardware to follow
      tile[r] = load_bias_as_float<S.bias, L>(bias + column[0]);
    } else {
#pragma clang loop unroll(disable) vectorize(disable)
      for (i32 n = 0; n < L; ++n) row[n] = load_bias_as_float<S.bias>(bias + column[n]);
      tile[r] = load<Floats<L>>(row);
    }
  }
  transpose<L>(tile);
}

/// Scores of the keys [begin, end) with their bias.
template <KernelSpec S>
__attribute__((noinline)) void add_bias(const Task<S>& task, Queries queries, KeyRange keys,
                                        PairNumbers<S>& scores) {
  constexpr i32 L = S.lanes;
#pragma clang loop unroll(disable)
  for (i32 m = 0; m < queries.count; m += L) {
#pragma clang loop unroll(disable)
    for (i32 j = keys.begin; j < keys.end; j += L) {
      const i32 columns = min(L, keys.end - j);
      Floats<L> bias[L];
      load_bias<S>(task, queries.begin + m, min(L, queries.count - m), j, columns, bias);
#pragma clang loop unroll(disable)
      for (i32 n = 0; n < columns; ++n) {
        float* score = &scores[j - keys.begin + n][m];
        store(score, with_bias<S.bias>(load<Floats<L>>(score), bias[n]));
      }
    }
  }
}

/// Scores of the keys [keys.begin, keys.end) become -inf for queries that do not see the key. The scores are
/// those of key j0 and query i0 onwards.
template <KernelSpec S, i32 V>
ATTUNE_HD void mask_scores(Window window, i32 i0, i32 j0, KeyRange keys, PairNumbers<S>& scores) {
  constexpr i32 L = S.lanes;
  const Ints<L> lane = lane_numbers<L>();
#pragma clang loop unroll(disable)
  for (i32 j = keys.begin; j < keys.end; ++j) {
#pragma clang loop unroll(full)
    for (i32 v = 0; v < V; ++v) {
      float* score = &scores[j - j0][v * L];
      const Ints<L> seen = visible_lanes<S>(window, lane + (i0 + v * L), Ints<L>(j));
      store(score, seen ? load<Floats<L>>(score) : Floats<L>(neg_inf()));
    }
  }
}

/// The numbers of dropped pairs become 0.
template <KernelSpec S>
__attribute__((noinline)) void drop(const Task<S>& task, Queries queries, KeyRange keys,
                                    PairNumbers<S>& numbers) {
  constexpr i32 L = S.lanes;
  const DropoutParams& dropout = task.params.dropout;
  const i32 head = head_number(task.params, task.slot);
#pragma clang loop unroll(disable)
  for (i32 m = 0; m < queries.count; m += L) {
    const Words<L> query = __builtin_convertvector(lane_numbers<L>() + (queries.begin + m), Words<L>);
    // One call decides about the 8 keys first + 8 * word + half.
    const auto drop_keys_of_call = [&](i32 first) {
      const Philox<Words<L>> bits =
          dropout_bits<Words<L>>(dropout, task.slot.block.index, head, query, dropout_call(first));
#pragma clang loop unroll(full)
      for (i32 k = 0; k < 8; ++k) {
        const i32 j = first + k / 2 * 8 + k % 2;
        if (j < keys.begin || j >= keys.end) continue;
        float* number = &numbers[j - keys.begin][m];
        const Ints<L> keep = kept(dropout, bits.word[dropout_word(k / 2 * 8)], k % 2);
        store(number, keep ? load<Floats<L>>(number) : Floats<L>(0.0f));
      }
    };
#pragma clang loop unroll(disable)
    for (i32 group = keys.begin / kDropoutGroup * kDropoutGroup; group < keys.end; group += kDropoutGroup) {
#pragma clang loop unroll(disable)
      for (i32 call = 0; call < 4; ++call) drop_keys_of_call(group + 2 * call);
    }
  }
}

}  // namespace attune::kernel
