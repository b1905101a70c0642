// Blocks: which rows of the tensors attend to each other. A dense problem has one block per batch entry; a
// varlen problem packs its sequences on one axis, and every bias class with "BlockDiagonal" in its name,
// padded, gappy and paged included, is "start + length" for the queries and for the keys, the latter possibly
// behind a table of pages.
//
// Tables may come from a device and be wrong. Whatever is read from them is clamped to the tensors' extents:
// a wrong table gives wrong numbers, never an access outside.
#pragma once

#include "attune/hd.h"
#include "attune/params.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

constexpr Divider make_divider(i32 divisor) {
  u32 shift = 0;
  while ((u64{1} << shift) < static_cast<u64>(divisor)) ++shift;
  const u64 excess = (u64{1} << shift) - static_cast<u64>(divisor);
  return {divisor, static_cast<u32>((excess << 32) / static_cast<u64>(divisor) + 1), shift};
}

/// n / divider, for 0 <= n < 2^31.
ATTUNE_HD constexpr i32 divide(i32 n, const Divider& divider) {
  const u32 dividend = static_cast<u32>(n);
  const u32 high = static_cast<u32>(u64{dividend} * divider.multiplier >> 32);
  return static_cast<i32>((high + dividend) >> divider.shift);
}

/// One block of the attention matrix. Windows, dropout and tiles count queries and keys from its beginning.
struct Block {
  i32 index = 0;    // batch entry or sequence
  i32 batch = 0;    // index on the tensors' batch axis: 0 for sequences
  i32 q_begin = 0;  // first query row
  i32 len_q = 0;
  i32 k_begin = 0;  // first key row; paged: first logical key of the sequence's row of the table
  i32 len_k = 0;
};

template <KernelSpec S>
ATTUNE_HD constexpr Block block_of(const ForwardParams& p, i32 index) {
  if constexpr (S.blocks == Blocks::dense) {
    return {.index = index, .batch = index, .q_begin = 0, .len_q = p.len_q, .k_begin = 0, .len_k = p.len_k};
  } else {
    const Sequences& s = p.sequences;
    const i32 q_begin = clamp(s.q_start[index], 0, p.len_q);
    const i32 q_end = clamp(s.q_start[index + 1], q_begin, p.len_q);
    const i32 key_rows = S.keys == Keys::paged ? s.table_width * s.page_size.divisor : p.len_k;
    const i32 k_begin = clamp(s.k_start[index], 0, key_rows);
    const i32 len_k = s.k_len != nullptr ? s.k_len[index] : max(s.k_start[index + 1], k_begin) - k_begin;
    return {.index = index,
            .batch = 0,
            .q_begin = q_begin,
            .len_q = q_end - q_begin,
            .k_begin = k_begin,
            .len_k = clamp(len_k, 0, key_rows - k_begin)};
  }
}

template <KernelSpec S>
ATTUNE_HD constexpr Window window_of_block(const ForwardParams& p, const Block& block) {
  if constexpr (S.blocks == Blocks::dense) return p.window;
  return window_of(p.reach, block.len_q, block.len_k);
}

/// The page at a place of the table.
template <typename Place>
ATTUNE_HD constexpr i32 page_at(const ForwardParams& p, Place place) {
  const i32 page = p.sequences.pages[place];
  return clamp(page, 0, max(divide(p.len_k, p.sequences.page_size) - 1, 0));
}

/// The row of key, value and bias column that key j of a block, 0 <= j < len_k, lies in.
template <KernelSpec S>
ATTUNE_HD constexpr i32 key_row(const ForwardParams& p, const Block& block, i32 j) {
  const i32 logical = block.k_begin + j;
  if constexpr (S.keys == Keys::contiguous) {
    return logical;
  } else {
    const Sequences& s = p.sequences;
    const i32 size = s.page_size.divisor;
    const i32 column = divide(logical, s.page_size);
    return page_at(p, i64{block.index} * s.table_width + column) * size + logical - column * size;
  }
}

// ---- Tiles of queries, and the slots that they are launched in ----
//
// A slot is what one GPU block or one CPU task does: one tile of queries of one head, and of its value
// columns one part. Slots are numbered linearly, so that batch and heads may be large; parts of a tile are
// neighbours, then the tiles of one head, which share its keys in the cache, then the heads.

/// A tile of block_m queries: the first is query tile * block_m of its block. It may lie past the block's
/// end.
struct QueryTile {
  i32 block = 0;
  i32 tile = 0;
};

/// Tiles of one head, over all blocks of a varlen problem or in one batch entry. Lengths of sequences may be
/// known to the device alone, so there are enough for any: cutting a sequence of n rows that begins anywhere
/// needs no more slots than the multiples of block_m that it crosses, and one.
ATTUNE_HD constexpr i64 tiles_of_head(const KernelSpec& spec, i32 len_q, i32 sequences) {
  if (spec.blocks == Blocks::dense) return ceil_div(len_q, spec.block_m);
  return i64{len_q / spec.block_m} + sequences;
}

/// All slots of a launch.
constexpr i64 forward_slots(const KernelSpec& spec, const ForwardParams& p) {
  return i64{p.batch} * p.groups * p.heads * tiles_of_head(spec, p.len_q, p.sequences.count) * p.splits *
         column_parts(spec);
}

/// Where a sequence's tiles begin among those of a head.
template <KernelSpec S>
ATTUNE_HD constexpr i32 first_tile(const ForwardParams& p, i32 sequence) {
  return clamp(p.sequences.q_start[sequence], 0, p.len_q) / S.block_m + sequence;
}

/// The tile with this number among those of a head, of batch entry `batch` where the problem is dense.
/// Numbers beyond the tiles of their block give one past its end.
template <KernelSpec S>
ATTUNE_HD constexpr QueryTile tile_of_head(const ForwardParams& p, i32 batch, i32 number) {
  if constexpr (S.blocks == Blocks::dense) {
    return {batch, number};
  } else {
    // The last sequence whose first tile is not beyond: first tiles rise strictly, by at least 1 each.
    i32 low = 0;
    i32 high = p.sequences.count - 1;
    while (low < high) {
      const i32 middle = (low + high + 1) / 2;
      if (first_tile<S>(p, middle) <= number) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return {low, max(number - first_tile<S>(p, low), 0)};
  }
}

/// What a slot computes: the queries [begin, end) of its block, for one head and one part of the value
/// columns. Empty (begin >= end) where a varlen problem has more slots than tiles.
struct Slot {
  Block block;
  i32 group = 0;
  i32 head = 0;  // of the group
  i32 part = 0;
  i32 split = 0;  // of the keys
  i32 begin = 0;
  i32 end = 0;
};

/// Number is i64 on the CPU and u32 on a GPU, whose blocks are fewer and whose 64-bit divisions are slow.
template <KernelSpec S, typename Number>
ATTUNE_HD constexpr Slot slot_of(const ForwardParams& p, Number number) {
  const auto tiles = static_cast<Number>(tiles_of_head(S, p.len_q, p.sequences.count));
  const auto groups = static_cast<Number>(p.groups);
  const auto heads = static_cast<Number>(p.heads);
  constexpr auto parts = static_cast<Number>(column_parts(S));
  Slot slot;
  slot.part = static_cast<i32>(number % parts);
  number /= parts;
  if constexpr (S.split == Split::on) {
    slot.split = static_cast<i32>(number % static_cast<Number>(p.splits));
    number /= static_cast<Number>(p.splits);
  }
  const i32 tile_number = static_cast<i32>(number % tiles);
  number /= tiles;
  slot.head = static_cast<i32>(number % heads);
  number /= heads;
  slot.group = static_cast<i32>(number % groups);
  const QueryTile found = tile_of_head<S>(p, static_cast<i32>(number / groups), tile_number);
  slot.block = block_of<S>(p, found.block);
  const i32 block_tiles = ceil_div(slot.block.len_q, S.block_m);
  // Under a causal mask the last rows are the longest: they start first, short ones even out the end.
  const bool reversed = S.window_right == Edge::bounded && found.tile < block_tiles;
  slot.begin = (reversed ? block_tiles - 1 - found.tile : found.tile) * S.block_m;
  slot.end = min(slot.begin + S.block_m, slot.block.len_q);
  return slot;
}

/// The share of a range that one of `parts` takes, which is as even as can be; empty for some where there are
/// more parts than numbers in the range.
ATTUNE_HD constexpr KeyRange part_of(KeyRange range, i32 part, i32 parts) {
  const i64 count = max(range.end - range.begin, 0);
  const auto bound = [&](i32 n) { return range.begin + static_cast<i32>(count * n / parts); };
  return {bound(part), bound(part + 1)};
}

/// Rows of the output, over all heads; so many lie between the results of blocks that share keys.
ATTUNE_HD constexpr i64 output_rows(const ForwardParams& p) {
  return i64{p.batch} * p.groups * p.heads * p.len_q;
}

/// Elements from a tensor's start to row 0 of this batch entry and head.
ATTUNE_HD constexpr i64 head_offset(const Slot& slot, const Strides& strides) {
  return slot.block.batch * strides.batch + slot.group * strides.group + slot.head * strides.head;
}
ATTUNE_HD constexpr i64 head_offset(const Slot& slot, const BiasStrides& strides) {
  return slot.block.batch * strides.batch + slot.group * strides.group + slot.head * strides.head;
}

/// The head's number over all groups: what dropout and the LSE count.
ATTUNE_HD constexpr i32 head_number(const ForwardParams& p, const Slot& slot) {
  return slot.group * p.heads + slot.head;
}

/// Where the LSE of a block's query goes.
ATTUNE_HD constexpr i64 lse_offset(const ForwardParams& p, const Slot& slot, i32 query) {
  return slot.split * output_rows(p) +
         (i64{slot.block.batch} * p.groups * p.heads + head_number(p, slot)) * p.len_q + slot.block.q_begin +
         query;
}

}  // namespace attune::kernel
