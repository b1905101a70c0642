// Backward: which kernel computes which gradient, and the slots that its work is launched in.
//
// With P = exp(scale * q.k + bias - lse) (0 where masked), Z = 1 / (1 - p) where dropout keeps a pair and 0
// where it drops it, and dO the gradient of the output O = (P * Z) V:
//
//   delta_i = sum_c dO_ic O_ic - dLSE_i           one number of each query
//   dS      = P * (Z * (dO V^T) - delta)          the gradient of the scores, after scale and bias
//   dV = (P * Z)^T dO     dQ = scale * dS K     dK = scale * dS^T Q     dBias = dS
//
// (Dao et al., FlashAttention, arXiv 2205.14135, appendix B.4; the gradient through the LSE, which attention
// over some of the keys needs, subtracts from delta, since d lse_i / d S_ij = P_ij.)
//
// Each gradient is computed by a kernel whose blocks own elements of it: nothing is added up in memory, so
// each run gives the same bits, and memory beyond inputs and results is two numbers of each query.
//
//   operation        a block owns                     and walks over
//   delta            queries                          the columns of their rows
//   grad_query       a tile of queries of one head    the keys that they see
//   grad_key_value   a tile of rows of key and value  the queries that see them, of every head and sequence
//   grad_bias        a tile of the bias tensor        the pairs that it was added to
//
// grad_key_value may also add its share of dQ to float32 sums in memory (QueryGradient::atomic): that saves
// computing P a second time, and costs the order of summation, unless tiles of keys take turns to add
// (QueryGradient::ordered). round_query then makes the result of the sums. On Hopper it may store dBias, too
// (stores_bias_gradient in spec.h).
#pragma once

#include "attune/blocks.h"
#include "attune/hd.h"
#include "attune/params.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

// ---- One element ----

/// The LSE of a query in base 2, such that exp2(s2 - lse2) is its probability. A query that sees no key has
/// an LSE of -inf here and +inf elsewhere; both become +inf, which makes its probabilities 0.
ATTUNE_HD float backward_lse2(float lse) {
  return lse == neg_inf() ? -neg_inf() : lse * kLog2e;
}

/// What delta writes of a query.
struct QueryPair {
  float lse2;
  float delta;
};

/// Of a query that sees no key, or keys with scores of -inf alone: +inf and 0. Where something of it is not
/// finite, its query, dO or gradient of the LSE, its LSE is NaN or its delta not finite: it has NaN and 0.
/// That makes P and dS NaN, with keys that it does not see as well until the mask has made them 0.
ATTUNE_HD QueryPair query_pair(float lse, float delta) {
  const float lse2 = backward_lse2(lse);
  if (lse2 == -neg_inf()) return {lse2, 0.0f};
  const bool finite = is_finite(lse2) && is_finite(delta);
  return {finite ? lse2 : nan(), finite ? delta : 0.0f};
}

/// Is a query with this LSE void: does it see no key, or is something of it not finite? Where a tile has keys
/// of other sequences, kernels put zeros in the place of its rows of query and dO: else the weight of 0 that
/// it has with those keys, times NaN, would be NaN in their gradients.
ATTUNE_HD bool is_void(float lse2) {
  return !is_finite(lse2);
}

/// The index of a query's number; `query` counts in its block.
ATTUNE_HD constexpr i64 offset_of(const QueryNumbers& numbers, const Slot& slot, i32 query) {
  const Strides& s = numbers.strides;
  const bool padded = numbers.per_sequence != 0;
  const i32 row = min(padded ? query : slot.block.q_begin + query, numbers.length - 1);
  return (padded ? slot.block.index : slot.block.batch) * s.batch + slot.group * s.group +
         slot.head * s.head + row * s.seq;
}

// ---- Slots of delta, grad_query and round_query: those of forward (slot_of in blocks.h) ----

// ---- The order in which tiles of keys add to sums of the query's gradient ----

/// Queries of the smallest tile that takes turns, and how many parts of its sums do.
inline constexpr i32 kTurnRows = 64;
inline constexpr i32 kTurnParts = 2;

/// How many tiles of queries one head has, and the number of a packed sequence's first: no two sequences
/// share a tile.
ATTUNE_HD constexpr i32 turn_tiles(const ForwardParams& p) {
  return ceil_div(p.len_q, kTurnRows) + p.sequences.count;
}
ATTUNE_HD constexpr i32 first_turn_tile(const Block& block) {
  return block.q_begin / kTurnRows + block.index;
}

/// The numbers in `turns`: how many tiles of keys have been handed out; then, of each head, tile of queries
/// and part, the last tile of keys that has added, counted from 1. Of paged keys, whose tiles are in no
/// order, how many of their parts have (parts_before).
ATTUNE_HD constexpr i64 query_turns(const ForwardParams& p) {
  return 1 + i64{p.batch} * p.groups * p.heads * turn_tiles(p) * kTurnParts;
}

// ---- Where the sums of the query's gradient lie ----

/// Kernels whose warps add accumulators in the order in which registers hold them leave fragments of 16
/// queries by 8 columns: lane l of a warp holds the columns l % 4 * 2 and the next, of the queries l / 4 and
/// l / 4 + 8.
inline constexpr i32 kFragmentRows = 16;
inline constexpr i32 kFragmentColumns = 8;
inline constexpr i32 kFragmentElements = kFragmentRows * kFragmentColumns;

/// Does the kernel leave fragments? That of mma adds to rows.
ATTUNE_HD constexpr bool leaves_fragments(const KernelSpec& s) {
  return s.family == Family::sm90;
}

/// Rows of one head's sums: of fragments there are only whole ones.
ATTUNE_HD constexpr i64 sum_rows(const BackwardParams& p) {
  if (p.sum_fragments == 0) return p.forward.len_q;
  return round_up(p.forward.len_q, kFragmentRows) + i64{p.forward.sequences.count} * kFragmentRows;
}

/// The first row of a block's sums. Each sequence begins with a fragment of its own, and has room for as many
/// as it crosses multiples of kFragmentRows, and one more: enough wherever its rows begin and end.
ATTUNE_HD constexpr i32 first_sum_row(const BackwardParams& p, const Block& block) {
  if (p.sum_fragments == 0 || p.forward.sequences.count == 0) return block.q_begin;
  return (block.q_begin / kFragmentRows + block.index) * kFragmentRows;
}

/// The number of a query's row of sums. With fragments, for the first of their queries: how many rows' worth
/// of elements lie before them.
ATTUNE_HD constexpr i64 sum_row(const BackwardParams& p, const Slot& slot, i32 query) {
  const i64 head = i64{slot.block.batch} * p.forward.groups * p.forward.heads + head_number(p.forward, slot);
  return head * sum_rows(p) + first_sum_row(p, slot.block) + query;
}

// ---- Slots of grad_key_value ----

/// The rows [begin, end) of key and value, one head of theirs, and one part of the columns. `group` and
/// `head` are the first of the query's that use it. In a dense problem rows are the keys of batch entry
/// `batch`; in a varlen one they may belong to several sequences, to one sequence twice, or to none.
struct KeySlot {
  i32 batch = 0;
  i32 group = 0;
  i32 head = 0;
  i32 part = 0;
  i32 begin = 0;
  i32 end = 0;
};

constexpr i64 key_slots(const KernelSpec& spec, const BackwardParams& p) {
  return i64{p.forward.batch} * p.key_groups * p.key_heads * ceil_div(p.forward.len_k, spec.block_n) *
         column_parts(spec);
}

/// Elements from the start of a gradient of key or value to its row 0 of this batch entry and head.
ATTUNE_HD constexpr i64 head_offset(const KeySlot& slot, const Strides& strides) {
  return slot.batch * strides.batch + slot.group * strides.group + slot.head * strides.head;
}

/// Number is i64 on the CPU and u32 on a GPU, as in slot_of.
template <KernelSpec S, typename Number>
ATTUNE_HD constexpr KeySlot key_slot_of(const BackwardParams& p, Number number) {
  const auto tiles = static_cast<Number>(ceil_div(p.forward.len_k, S.block_n));
  const auto groups = static_cast<Number>(p.key_groups);
  const auto heads = static_cast<Number>(p.key_heads);
  constexpr auto parts = static_cast<Number>(column_parts(S));
  KeySlot slot;
  slot.part = static_cast<i32>(number % parts);
  number /= parts;
  // Under a causal mask the first keys are the longest: they start first.
  slot.begin = static_cast<i32>(number % tiles) * S.block_n;
  slot.end = min(slot.begin + S.block_n, p.forward.len_k);
  number /= tiles;
  slot.head = static_cast<i32>(number % heads);
  number /= heads;
  slot.group = static_cast<i32>(number % groups);
  slot.batch = static_cast<i32>(number / groups);
  return slot;
}

/// Query heads that share a head of key and value: 0 to sharing_heads(p), as group and head of the query.
ATTUNE_HD constexpr i32 sharing_heads(const BackwardParams& p) {
  return p.forward.groups / p.key_groups * (p.forward.heads / p.key_heads);
}
struct QueryHead {
  i32 group = 0;
  i32 head = 0;
};
ATTUNE_HD constexpr QueryHead sharing_head(const BackwardParams& p, const KeySlot& slot, i32 number) {
  const i32 heads = p.forward.heads / p.key_heads;
  return {slot.group + number / heads, slot.head + number % heads};
}

// ---- Segments: which keys of which block the rows of a tile are ----

/// The rows [begin, end) of a tensor's key and value are the keys [key, key + end - begin) of a block.
struct KeySegment {
  Block block;
  i32 begin = 0;
  i32 end = 0;
  i32 key = 0;
};

/// Places in which a row may be a key: one of a dense problem, one of each sequence, or one of each entry of
/// the table of pages.
template <KernelSpec S>
ATTUNE_HD constexpr i64 places(const ForwardParams& p) {
  if constexpr (S.blocks == Blocks::dense) return 1;
  if constexpr (S.keys == Keys::paged) return i64{p.sequences.count} * p.sequences.table_width;
  return p.sequences.count;
}

/// What of the rows [begin, end) is in a place (of batch entry `batch`, where the problem is dense); empty
/// where nothing is. Tables that are wrong are clamped as in key_row().
template <KernelSpec S, typename Place>
ATTUNE_HD constexpr KeySegment segment_at(const ForwardParams& p, i32 batch, i32 begin, i32 end,
                                          Place place) {
  if constexpr (S.blocks == Blocks::dense) {
    return {block_of<S>(p, batch), begin, end, begin};
  } else if constexpr (S.keys == Keys::contiguous) {
    const Block block = block_of<S>(p, static_cast<i32>(place));
    const i32 first = max(begin, block.k_begin);
    return {block, first, min(end, block.k_begin + block.len_k), first - block.k_begin};
  } else {
    const Sequences& s = p.sequences;
    const i32 size = s.page_size.divisor;
    const i32 page_row = page_at(p, place) * size;
    if (page_row >= end || page_row + size <= begin) return {};
    const Block block = block_of<S>(p, static_cast<i32>(place / s.table_width));
    // Logical key = row + shift.
    const i32 shift = static_cast<i32>(place % s.table_width) * size - page_row;
    const i32 first = max(max(begin, page_row), block.k_begin - shift);
    const i32 last = min(min(end, page_row + size), block.k_begin + block.len_k - shift);
    return {block, first, last, first + shift - block.k_begin};
  }
}

/// The keys of the segment that some query of its block sees: what is in others, NaN included, is not read.
template <KernelSpec S>
ATTUNE_HD constexpr KeySegment seen_part(KeySegment segment, const Window& window) {
  const Block& block = segment.block;
  const KeyRange seen = visited_keys<S>(window, block.len_k, 0, block.len_q);
  const i32 shift = segment.begin - segment.key;
  segment.begin = max(segment.begin, seen.begin + shift);
  segment.end = min(segment.end, seen.end + shift);
  segment.key = segment.begin - shift;
  return segment;
}

// Parts of tiles of paged keys add to sums of the query's gradient in the order of their rows, in one tile in
// that of their places in the table: a part's number among those of its sequence says when.

/// The keys of a sequence's row of the table, counted from the row's beginning, that a tile of its queries
/// sees: from this row of the query on.
template <KernelSpec S>
ATTUNE_HD constexpr KeyRange keys_seen_by_tile(const ForwardParams& p, i32 sequence, i32 row) {
  const Block block = block_of<S>(p, sequence);
  const i32 m_begin = row - block.q_begin;
  const i32 m_end = min(m_begin + S.block_m, block.len_q);
  const KeyRange seen = visited_keys<S>(window_of_block<S>(p, block), block.len_k, m_begin, m_end);
  return {block.k_begin + seen.begin, block.k_begin + seen.end};
}

/// In how many tiles rows before `end` are such keys of a place, an entry of this column.
template <KernelSpec S>
ATTUNE_HD constexpr i32 parts_before(const ForwardParams& p, const KeyRange& seen, i32 place, i32 column,
                                     i32 end) {
  const i32 size = p.sequences.page_size.divisor;
  const i32 page_row = page_at(p, place) * size;
  const i32 shift = page_row - column * size;
  const i32 first = max(page_row, seen.begin + shift);
  const i32 last = min(min(page_row + size, seen.end + shift), end);
  return first < last ? ceil_div(last, S.block_n) - first / S.block_n : 0;
}

/// Calls visit(segment) for every segment of the rows [begin, end) that holds a key, in a fixed order.
template <KernelSpec S, typename Visit>
ATTUNE_HD constexpr void for_each_segment(const ForwardParams& p, i32 batch, i32 begin, i32 end,
                                          Visit&& visit) {
  const i64 count = places<S>(p);
  for (i64 place = 0; place < count; ++place) {
    const KeySegment segment = segment_at<S>(p, batch, begin, end, place);
    if (segment.begin < segment.end) visit(segment);
  }
}

/// A segment's block as a slot of one head, for the offsets of blocks.h.
ATTUNE_HD constexpr Slot slot_of_segment(const KeySegment& segment, QueryHead head) {
  Slot slot;
  slot.block = segment.block;
  slot.group = head.group;
  slot.head = head.head;
  return slot;
}

// ---- Slots of grad_bias ----

/// The elements [m_begin, m_end) x [begin, end) of the bias, rows of the query by rows of the key, for one of
/// its batch entries and heads. `batch`, `group` and `head` are the first that it was added to. A bias of one
/// row has slots whose rows are all of the query's, over which the gradient is summed up.
struct BiasSlot {
  i32 batch = 0;
  i32 group = 0;
  i32 head = 0;
  i32 m_begin = 0;
  i32 m_end = 0;
  i32 begin = 0;
  i32 end = 0;
};

/// Elements from the start of the bias's gradient to its row 0 of this batch entry and head.
ATTUNE_HD constexpr i64 head_offset(const BiasSlot& slot, const BiasStrides& strides) {
  return slot.batch * strides.batch + slot.group * strides.group + slot.head * strides.head;
}

/// Tiles of rows: one where the bias has a single row for all queries.
ATTUNE_HD constexpr i32 bias_row_tiles(const KernelSpec& spec, const BackwardParams& p) {
  return p.bias_rows == 1 ? 1 : ceil_div(p.forward.len_q, spec.block_m);
}

constexpr i64 bias_slots(const KernelSpec& spec, const BackwardParams& p) {
  return i64{p.bias_batch} * p.bias_groups * p.bias_heads * bias_row_tiles(spec, p) *
         ceil_div(p.forward.len_k, spec.block_n);
}

template <KernelSpec S, typename Number>
ATTUNE_HD constexpr BiasSlot bias_slot_of(const BackwardParams& p, Number number) {
  const auto column_tiles = static_cast<Number>(ceil_div(p.forward.len_k, S.block_n));
  const auto row_tiles = static_cast<Number>(bias_row_tiles(S, p));
  const auto groups = static_cast<Number>(p.bias_groups);
  const auto heads = static_cast<Number>(p.bias_heads);
  BiasSlot slot;
  slot.begin = static_cast<i32>(number % column_tiles) * S.block_n;
  slot.end = min(slot.begin + S.block_n, p.forward.len_k);
  number /= column_tiles;
  slot.m_begin = static_cast<i32>(number % row_tiles) * S.block_m;
  slot.m_end = p.bias_rows == 1 ? p.forward.len_q : min(slot.m_begin + S.block_m, p.forward.len_q);
  number /= row_tiles;
  slot.head = static_cast<i32>(number % heads);
  number /= heads;
  slot.group = static_cast<i32>(number % groups);
  slot.batch = static_cast<i32>(number / groups);
  return slot;
}

/// Batch entries (dense) and heads that an element of the bias was added to.
ATTUNE_HD constexpr i32 biased_batches(const BackwardParams& p) {
  return p.forward.batch / p.bias_batch;
}
ATTUNE_HD constexpr i32 biased_heads(const BackwardParams& p) {
  return p.forward.groups / p.bias_groups * (p.forward.heads / p.bias_heads);
}
ATTUNE_HD constexpr QueryHead biased_head(const BackwardParams& p, const BiasSlot& slot, i32 number) {
  const i32 heads = p.forward.heads / p.bias_heads;
  return {slot.group + number / heads, slot.head + number % heads};
}

// ---- All slots of a launch ----

constexpr i64 backward_slots(const KernelSpec& spec, const BackwardParams& p) {
  switch (spec.operation) {
    case Operation::grad_key_value: return key_slots(spec, p);
    case Operation::grad_bias: return bias_slots(spec, p);
    default: return forward_slots(spec, p.forward);
  }
}

}  // namespace attune::kernel
