// The producer of grad_bias_sm90.cuh, a warp whose first lane talks to the copy engine, and what it tells the
// consumers.
#pragma once

#include "attune/backward.h"
#include "attune/cuda/panels.cuh"
#include "attune/cuda/pipeline.cuh"
#include "attune/cuda/ptx_sm90.cuh"
#include "attune/cuda/score_bias.cuh"
#include "attune/cuda/segments.cuh"
#include "attune/cuda/shared.h"
#include "attune/params.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

/// What comes with a pair of tiles. Queries and keys count from the first of their tiles.
struct GradBiasStep {
  i32 slot;   // negative: no more work
  i32 flags;  // GradBiasFlag
  i32 row;    // of the query: that of the tile's first
  i32 head;   // of the query, over all groups
  i32 batch;
  i32 column;                   // row of the key: that of the tile's first
  i32 first_query, last_query;  // [first, last) are the block's
  i32 first_key, last_key;      // likewise, and some query of it sees them
  i32 lower, upper;             // query i sees key j iff i + lower <= j <= i + upper
};
/// Where dropout counts from: the tiles' first query and key in their block, which may begin later.
struct GradBiasPlace {
  i32 block;  // batch entry or sequence
  i32 head;
  i32 query;
  i32 key;
};
enum GradBiasFlag : i32 {
  kComputes = 1,  // there are tiles to multiply; no pair of a slot without them sees each other
  kLast = 2,      // it is the last of its slot
  kMasked = 4,    // is any of its pairs invisible?
  kOddBias = 8    // the parity of the slot's bias
};

/// Where things lie in shared memory.
template <KernelSpec S>
struct GradBiasMemory {
  static constexpr GradBiasSm90Shared kShared{S};
  using PairRing = Ring<S.stages, kShared.pair_bytes>;
  using BiasRing = Ring<1, kShared.bias_bytes>;
  using Cursor = typename PairRing::Cursor;

  u32 base;

  ATTUNE_DEVICE PairRing pairs() const { return {base, base + kShared.barrier_offset}; }
  ATTUNE_DEVICE BiasRing biases() const {
    return {base + kShared.bias_offset, base + kShared.barrier_offset + PairRing::kBarrierBytes};
  }
  /// A pair: queries, then keys.
  ATTUNE_DEVICE u32 query_tile(const Cursor& at) const { return pairs().tile(at); }
  ATTUNE_DEVICE u32 key_tile(const Cursor& at) const { return query_tile(at) + kShared.query_bytes; }

  ATTUNE_DEVICE void write_step(const Cursor& at, const GradBiasStep& s) const {
    const u32 step = step_address(at);
    ptx::st_shared_word4(step, {s.slot, s.flags, s.row, s.head});
    ptx::st_shared_word4(step + 16, {s.batch, s.column, s.first_query, s.last_query});
    ptx::st_shared_word4(step + 32, {s.first_key, s.last_key, s.lower, s.upper});
  }
  ATTUNE_DEVICE void write_place(const Cursor& at, const GradBiasPlace& place) const {
    ptx::st_shared_word4(step_address(at) + 48, {place.block, place.head, place.query, place.key});
  }
  ATTUNE_DEVICE GradBiasStep read_step(const Cursor& at) const {
    const u32 step = step_address(at);
    const ptx::Word4 a = ptx::ld_shared_word4(step);
    const ptx::Word4 b = ptx::ld_shared_word4(step + 16);
    const ptx::Word4 c = ptx::ld_shared_word4(step + 32);
    return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w};
  }
  ATTUNE_DEVICE u32 read_flags(const Cursor& at) const { return ptx::ld_shared_b32(step_address(at) + 4); }
  ATTUNE_DEVICE GradBiasPlace read_place(const Cursor& at) const {
    const ptx::Word4 w = ptx::ld_shared_word4(step_address(at) + 48);
    return {w.x, w.y, w.z, w.w};
  }

 private:
  ATTUNE_DEVICE u32 step_address(const Cursor& at) const {
    return base + kShared.step_offset + at.stage * GradBiasSm90Shared::kStepBytes;
  }
};

template <KernelSpec S>
class GradBiasSm90Producer {
  using Memory = GradBiasMemory<S>;
  using Bias = BiasTile<S>;

 public:
  ATTUNE_DEVICE GradBiasSm90Producer(const GradBiasSm90Params& params, Memory memory)
      : p_(params), memory_(memory), pairs_(memory.pairs()), biases_(memory.biases()) {}

  ATTUNE_DEVICE void run() {
#pragma unroll 1
    for (u32 number = blockIdx.x / slot_blocks(); number < static_cast<u32>(p_.slots);
         number += gridDim.x / slot_blocks()) {
      produce(number);
    }
    announce({.slot = -1});
  }

 private:
  static ATTUNE_DEVICE bool first_lane() {
    return threadIdx.x % 32 == 0;
  }

  ATTUNE_DEVICE u32 slot_blocks() const {
    return static_cast<u32>(p_.slot_blocks);
  }

  ATTUNE_DEVICE void produce(u32 number) {
    const BiasSlot slot = bias_slot_of<S>(p_.backward, number);
    found_ = {.slot = static_cast<i32>(number), .flags = kLast, .column = slot.begin};
    begins_ = true;
#pragma unroll 1
    for (i32 i = 0; i < biased_batches(p_.backward); ++i) {
      for_each_segment_of_block<S>(p_.backward.forward, slot.batch + i, slot.begin, slot.end,
                                   [&](const KeySegment& segment) { produce_segment(slot, segment); });
    }
    if ((found_.flags & kComputes) != 0) {
      found_.flags |= kLast;
      load(slot);
    } else {
      announce(found_);
    }
  }

  ATTUNE_DEVICE void produce_segment(const BiasSlot& slot, const KeySegment& whole) {
    const Block& block = whole.block;
    const Window window = window_of_block<S>(p_.backward.forward, block);
    const KeySegment keys = seen_part<S>(whole, window);
    const i32 count = keys.end - keys.begin;
    if (count <= 0) return;
    const QueryRange visiting = visiting_queries<S>(window, block.len_q, keys.key, keys.key + count);
    const bool one_row = p_.backward.bias_rows == 1;
    const i32 begin = max(visiting.begin, slot.m_begin - block.q_begin);
    const i32 end = min(visiting.end, slot.m_end - block.q_begin);
    const i32 own = static_cast<i32>(blockIdx.x % slot_blocks()) * S.block_m;
    // Where rows are kept apart, the tile's first row is the slot's, even if that comes before the block.
#pragma unroll 1
    for (i32 m = one_row ? begin + own : slot.m_begin - block.q_begin; begin < end && m < end;
         m += S.block_m * p_.slot_blocks) {
#pragma unroll 1
      for (i32 number = 0; number < biased_heads(p_.backward); ++number) {
        const QueryHead head = biased_head(p_.backward, slot, number);
        if ((found_.flags & kComputes) != 0) load(slot);
        found_.head = head.group * p_.backward.forward.heads + head.head;
        found_.batch = block.batch;
        found_.row = block.q_begin + m;
        found_.first_query = begin - m;
        found_.last_query = end - m;
        found_.first_key = keys.begin - slot.begin;
        found_.last_key = keys.end - slot.begin;
        place_ = {block.index, found_.head, m, keys.key - found_.first_key};
        const i32 shift = place_.query - place_.key;
        found_.lower = window.lower + shift;
        found_.upper = window.upper + shift;
        found_.flags = kComputes | (sees_all() ? 0 : kMasked);
      }
    }
  }

  /// Does each query of the step that was found see each key?
  ATTUNE_DEVICE bool sees_all() const {
    bool all = found_.first_query <= 0 && found_.last_query >= S.block_m && found_.first_key <= 0 &&
               found_.last_key >= S.block_n;
    if constexpr (S.window_left == Edge::bounded) all = all && S.block_m - 1 + found_.lower <= 0;
    if constexpr (S.window_right == Edge::bounded) all = all && found_.upper >= S.block_n - 1;
    return all;
  }

  /// A step without tiles.
  ATTUNE_DEVICE void announce(const GradBiasStep& step) {
    pairs_.acquire(at_);
    if (first_lane()) {
      memory_.write_step(at_, step);
      ptx::mbarrier_arrive(pairs_.full(at_));
    }
    at_.advance();
  }

  /// The step that was found.
  ATTUNE_DEVICE void load(const BiasSlot& slot) {
    if (bias_at_.parity == (begins_ ? 0 : 1)) found_.flags |= kOddBias;
    load_pair<S.head_dim>(p_.query, p_.key);
    load_pair<S.head_dim_v>(p_.grad_output, p_.value);
    if (begins_) load_bias(slot);
    begins_ = false;
  }

  template <i32 Dim>
  ATTUNE_DEVICE void load_pair(const TensorMap& queries, const TensorMap& keys) {
    constexpr i32 kPanels = ceil_div(Dim, Sm90Shared::kPanelElements);
    pairs_.acquire(at_);
    if (first_lane()) {
      memory_.write_step(at_, found_);
      if constexpr (S.dropout == Dropout::on) memory_.write_place(at_, place_);
      const u32 full = pairs_.full(at_);
      const i32 batch = found_.batch;
      ptx::mbarrier_arrive_expect_tx(full, kPanels * kPanelBytes<S.block_m + S.block_n>);
      load_panels<kPanels, S.block_m>(memory_.query_tile(at_), queries, full,
                                      {0, found_.row, found_.head, batch}, ptx::kEvictLast);
      load_panels<kPanels, S.block_n>(memory_.key_tile(at_), keys, full,
                                      {0, found_.column, found_.head / p_.heads_per_key_head, batch},
                                      ptx::kEvictLast);
    }
    at_.advance();
  }

  ATTUNE_DEVICE void load_bias(const BiasSlot& slot) {
    biases_.acquire(bias_at_);
    if (first_lane()) {
      const u32 full = biases_.full(bias_at_);
      const i32 head = (slot.group * p_.backward.forward.heads + slot.head) / p_.heads_per_bias_head;
      ptx::BoxOrigin origin{slot.begin, p_.bias_rows == 1 ? 0 : slot.m_begin, head,
                            slot.batch * p_.bias_batches};
      ptx::mbarrier_arrive_expect_tx(full, p_.bias_rows * S.block_n * size_of(S.bias));
#pragma unroll 1
      for (i32 panel = 0; panel < Bias::kPanels; ++panel) {
        ptx::cp_async_bulk_tensor_load(biases_.tile(bias_at_) + panel * Bias::kPanelBytes, p_.bias, full,
                                       origin, ptx::kEvictFirst);
        origin.column += Bias::kPanelKeys;
      }
    }
    bias_at_.advance();
  }

  const GradBiasSm90Params& p_;
  const Memory memory_;
  const typename Memory::PairRing pairs_;
  const typename Memory::BiasRing biases_;
  typename Memory::Cursor at_{1};
  typename Memory::BiasRing::Cursor bias_at_{1};
  GradBiasStep found_;  // is loaded when the next one, or the end of the slot, has been found
  GradBiasPlace place_;
  bool begins_;  // the slot
};

}  // namespace attune::kernel
