// Merging attention over disjoint sets of keys. With m = max_i lse_i, chunk i weighs w_i = exp(lse_i - m):
//
//   output = sum_i w_i output_i / sum_i w_i        lse = m + ln sum_i w_i
//
// A chunk whose lse is -inf saw no key: it weighs nothing and its output is not even read, NaN or not.
// A row of which no chunk saw a key has output 0 and lse -inf. An lse of NaN or +inf, which attention over
// finite numbers never gives, makes the row NaN, as the formula does in IEEE arithmetic.
//
// Backward: with w_i = exp(lse_i - lse), which d lse / d lse_i also is, and dO and dLSE the gradients of
// output and lse,
//
//   dO_i = w_i dO        dLSE_i = w_i (dLSE + sum_c (output_i - output)_c dO_c)
//
// A chunk that saw no key, or whose row has the merged lse -inf, gets gradients of 0: w_i is 0, and neither
// dO nor anything else of the row that could be NaN is multiplied by it.
#pragma once

#include "attune/hd.h"
#include "attune/num.h"
#include "attune/params.h"

namespace attune::kernel {

/// One output row; rows are numbered [batch, len, groups, heads].
struct MergeRow {
  i32 batch = 0;
  i32 query = 0;
  i32 group = 0;
  i32 head = 0;
};

/// Params are MergeParams or GradMergeParams.
template <typename Params>
ATTUNE_HD constexpr i64 merge_rows(const Params& p) {
  return i64{p.batch} * p.len * p.groups * p.heads;
}

/// Slots of block_m rows.
template <typename Params>
constexpr i64 merge_slots(const KernelSpec& spec, const Params& p) {
  return (merge_rows(p) + spec.block_m - 1) / spec.block_m;
}

/// Number is i64, or u32 where a GPU knows that it suffices: its 64-bit divisions are slow.
template <typename Params, typename Number>
ATTUNE_HD constexpr MergeRow merge_row(const Params& p, Number number) {
  const auto heads = static_cast<Number>(p.heads);
  const auto groups = static_cast<Number>(p.groups);
  const auto len = static_cast<Number>(p.len);
  MergeRow row;
  row.head = static_cast<i32>(number % heads);
  number /= heads;
  row.group = static_cast<i32>(number % groups);
  number /= groups;
  row.query = static_cast<i32>(number % len);
  row.batch = static_cast<i32>(number / len);
  return row;
}

ATTUNE_HD constexpr i64 offset_of(const MergeRow& row, const Strides& strides) {
  return row.batch * strides.batch + row.query * strides.seq + row.group * strides.group +
         row.head * strides.head;
}

ATTUNE_HD constexpr const Chunk& chunk_of(const MergeParams& p, i32 chunk) {
  return p.chunk[chunk];
}
ATTUNE_HD constexpr const Chunk& chunk_of(const GradMergeParams& p, i32 chunk) {
  return p.chunk[chunk].chunk;
}

/// Where the merged LSE of a row goes.
template <typename Params>
ATTUNE_HD constexpr i64 lse_offset(const Params& p, const MergeRow& row) {
  return ((i64{row.batch} * p.groups + row.group) * p.heads + row.head) * p.len + row.query;
}

}  // namespace attune::kernel
