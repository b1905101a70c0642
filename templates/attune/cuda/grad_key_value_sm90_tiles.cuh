// What the warps of grad_key_value_sm90.cuh have in common: shared memory, what they tell each other there of
// tiles and turns, and the order of the tiles.
#pragma once

#include "attune/backward.h"
#include "attune/cuda/dropout_sm90.cuh"
#include "attune/cuda/panels.cuh"
#include "attune/cuda/pipeline.cuh"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/ptx_sm90.cuh"
#include "attune/cuda/segments.cuh"
#include "attune/cuda/shared.h"
#include "attune/cuda/tile.cuh"
#include "attune/params.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

/// The place of this block in its cluster, and of the other.
template <KernelSpec S>
ATTUNE_DEVICE i32 cluster_rank() {
  return S.cluster != 0 ? static_cast<i32>(ptx::cluster_ctarank()) : 0;
}

template <KernelSpec S>
ATTUNE_DEVICE u32 other_rank() {
  return static_cast<u32>(1 - cluster_rank<S>());
}

/// Barriers of what blocks of a cluster exchange, by when they complete: when ...
enum Sm90Exchange : u32 {
  kGradientsShown,  // this block's dS is there for the warp that sends it; for each place
  kGradientsSent = kGradientsShown + 2,  // it has come to the other block; likewise
  kGradientsCame = kGradientsSent + 2,   // the other's has come here
  kTileCame,                             // the next tile of keys has come from the first block
  kTileSeen,                             // and has been read by the other
  kOtherSummed                           // both warpgroups of the other block have multiplied with both
};

/// Where things lie in shared memory.
template <KernelSpec S>
struct Sm90Memory {
  static constexpr GradKeyValueSm90Shared kShared{S};
  using KeyRing = Ring<1, kShared.query_offset>;          // keys, then values
  using QueryRing = Ring<S.stages, kShared.stage_bytes>;  // queries, then output gradients
  using BiasRing = Ring<kShared.bias_stages, kShared.bias_bytes>;
  using LastPanelRing = Ring<1, kShared.last_panel_bytes>;
  using QueryCursor = typename QueryRing::Cursor;

  u32 base;

  ATTUNE_DEVICE KeyRing keys() const { return {base, base + kShared.barrier_offset}; }
  ATTUNE_DEVICE QueryRing queries() const {
    return {base + kShared.query_offset, base + kShared.barrier_offset + KeyRing::kBarrierBytes};
  }
  ATTUNE_DEVICE BiasRing biases() const {
    return {base + kShared.bias_offset,
            base + kShared.barrier_offset + KeyRing::kBarrierBytes + QueryRing::kBarrierBytes};
  }
  /// Clusters: the last panel of output gradients, of one stage at a time.
  ATTUNE_DEVICE LastPanelRing last_panels() const {
    return {base + kShared.last_panel_offset, biases().barriers + BiasRing::kBarrierBytes};
  }
  /// Clusters: the barriers of the exchange of score gradients (grad_key_value_cluster_sm90.cuh).
  ATTUNE_DEVICE u32 exchange(u32 barrier) const {
    return last_panels().barriers + LastPanelRing::kBarrierBytes + barrier * 8;
  }
  /// Clusters: the next tile of keys, of which the first block tells the other.
  ATTUNE_DEVICE u32 next_tile() const { return work() + 48; }
  /// Clusters: this block's columns of the other's keys.
  ATTUNE_DEVICE u32 other_key_tile() const { return base + 2 * kShared.key_bytes; }
  ATTUNE_DEVICE u32 key_tile() const { return base; }
  ATTUNE_DEVICE u32 value_tile() const { return base + kShared.key_bytes; }
  ATTUNE_DEVICE u32 query_tile(const QueryCursor& at) const { return queries().tile(at); }
  ATTUNE_DEVICE u32 grad_output_tile(const QueryCursor& at) const {
    return query_tile(at) + kShared.query_bytes;
  }
  /// The work item that comes with a tile of keys, the part of them, its window and its sequence.
  ATTUNE_DEVICE u32 work() const { return base + kShared.work_offset; }
  ATTUNE_DEVICE u32 part() const { return work() + 16; }
  ATTUNE_DEVICE u32 window() const { return work() + 32; }
  ATTUNE_DEVICE u32 sequence() const { return work() + 48; }
  /// What a stage holds.
  ATTUNE_DEVICE u32 step(const QueryCursor& at) const { return base + kShared.step_offset + at.stage * 16; }
  /// The LSE of a stage's queries, then their delta.
  ATTUNE_DEVICE u32 numbers(const QueryCursor& at) const {
    return base + kShared.number_offset + at.stage * (2 * S.block_m * 4);
  }
  ATTUNE_DEVICE u32 scores(u32 buffer) const {
    return base + kShared.score_offset + buffer * kShared.score_bytes;
  }
  /// When what a stage gives may be added to the sums.
  ATTUNE_DEVICE u32 turn(const QueryCursor& at) const { return base + kShared.turn_offset + at.stage * 16; }
  /// How many may be added so far: steps or, where their parts are added one after the other, parts.
  ATTUNE_DEVICE u32 allowed() const { return base + kShared.allowed_offset; }
  /// Sums on their way to memory; and where they go, how many rows they have, and when they may.
  static constexpr u32 place_of_sums(u32 group, u32 buffer) {
    return group * kShared.sum_buffers + (kShared.sum_buffers == 1 ? 0 : buffer);
  }
  ATTUNE_DEVICE u32 sums(u32 group, u32 buffer) const {
    return base + kShared.sum_offset + place_of_sums(group, buffer) * kShared.sum_bytes;
  }
  ATTUNE_DEVICE u32 target(u32 group, u32 buffer) const {
    return base + kShared.target_offset + place_of_sums(group, buffer) * 32;
  }
  /// Completes when a warpgroup has staged them.
  ATTUNE_DEVICE u32 staged(u32 group, u32 buffer) const {
    return base + kShared.staged_offset + place_of_sums(group, buffer) * 8;
  }
  /// Completes when all warps have added so-and-so many parts of sums to memory.
  ATTUNE_DEVICE u32 added(u32 parts) const {
    return base + kShared.added_offset + parts % GradKeyValueSm90Shared::added_barriers(S) * 8;
  }
  /// What two neighbouring warps of consumers tell each other about dropout.
  ATTUNE_DEVICE u32 drawn(u32 pair) const {
    return base + kShared.drawn_offset + pair * KeptKeyRows<S>::kPairBytes;
  }
};

/// Named barriers: of both warpgroups; of each; of each for the other; of each with its adder, for two
/// buffers; and of each two warps. 0 is __syncthreads.
enum Sm90Barrier : u32 { kExchange = 1, kGroup = 2, kShown = 4, kTaken = 6, kDrawn = 10 };
inline constexpr u32 kAdderThreads = kWarpgroup + 32;

/// Where warpgroups tell each other of probabilities in float16, these are 2^bits times as large, so that
/// those of long rows are normal numbers; the largest, of 1, stays far from what float16 holds.
template <KernelSpec S>
inline constexpr i32 kProbabilityBits = shares_columns(S) && (S.cluster != 0 || S.dtype == DType::bf16) ? 10
                                                                                                        : 0;
template <KernelSpec S>
inline constexpr float kProbabilityScale = 1 << kProbabilityBits<S>;

/// Who fills a stage of queries: the copy engine, and the warp that reads their numbers.
inline constexpr u32 kQueryFills = 2;
/// Who lets a stage go: of consumers a thread of each warpgroup, or in clusters, whose warps read on their
/// own where sums go, of each warp; and warps that see to turns.
template <KernelSpec S>
inline constexpr u32 kConsumerReleases =
    (S.cluster != 0 ? kWarpgroup / 32 : 1) * GradKeyValueSm90Shared::kWarpgroups;
template <KernelSpec S>
inline constexpr u32 kTurnWarps = S.query_gradient != QueryGradient::ordered ? 0
                                  : shares_columns(S)                        ? 2
                                                                             : 1;

/// A warp's part of the sums on their way to memory, at the most.
inline constexpr u32 kFragmentBytes = kFragmentElements * 4;
inline constexpr u32 kStagedBytes = Sm90Shared::kPanelElements / kFragmentColumns * kFragmentBytes;

/// How warpgroups share dQ: one panel of columns each, or 64 queries each. They leave it in fragments
/// (backward.h), of 16 queries for each warp.
template <KernelSpec S>
struct Sm90Sums {
  static constexpr bool kSplitColumns = S.block_m == GradKeyValueSm90Shared::kGroupRows;
  static constexpr i32 kDim = kSplitColumns ? Sm90Shared::kPanelElements : round_up(wider_dim(S), 16);

  /// Those of a warp that have columns of the head dim.
  static ATTUNE_DEVICE i32 fragments(u32 group) {
    const i32 first = kSplitColumns ? static_cast<i32>(group) * kDim : 0;
    return max(min(S.head_dim - first, kDim), 0) / kFragmentColumns;
  }
};

/// A tile of keys: its first, the head of their gradients over all groups, and how many tiles of queries it
/// meets. Keys and queries are rows of the tensors here.
struct Sm90Work {
  i32 begin;
  i32 head;
  i32 batch;
  i32 steps;  // negative: no more work
};

template <KernelSpec S>
ATTUNE_DEVICE Sm90Work work_of(Sm90Memory<S> memory) {
  const ptx::Word4 w = ptx::ld_shared_word4(memory.work());
  return {w.x, w.y, w.z, w.w};
}

/// The keys [first, last) of a tile, all that some query of their block sees. In a tile of packed sequences
/// keys of several blocks may lie: it is worked on once for each.
struct Sm90Part {
  i32 first;
  i32 last;
  i32 ends;      // is it the tile's last?
  i32 sums_row;  // from a query's row to that of its sums
};

template <KernelSpec S>
ATTUNE_DEVICE Sm90Part part_of(Sm90Memory<S> memory) {
  const ptx::Word4 w = ptx::ld_shared_word4(memory.part());
  return {w.x, w.y, w.z, w.w};
}

/// Where dropout of packed sequences counts from.
struct Sm90Sequence {
  i32 index;
  i32 first_query;  // rows
  i32 first_key;
};

template <KernelSpec S>
ATTUNE_DEVICE Sm90Sequence sequence_of(Sm90Memory<S> memory) {
  const ptx::Word4 w = ptx::ld_shared_word4(memory.sequence());
  return {w.x, w.y, w.z};
}

/// Of Sm90Step::masked, in place of 1: queries are void (backward.h). Where they are NaN, so are their scores
/// with all keys: those that they do not see have to be hidden in a tile without a mask, too.
inline constexpr i32 kVoidQueries = 2;

/// A tile of queries: its first and their head over all groups.
struct Sm90Step {
  i32 begin;
  i32 head;
  i32 masked;  // is any of its pairs to be hidden?
  i32 rows;    // queries that the block has from the first on

  static constexpr u32 kMaskedOffset = 2 * sizeof(i32);
};

template <KernelSpec S>
ATTUNE_DEVICE Sm90Step step_at(Sm90Memory<S> memory, const typename Sm90Memory<S>::QueryCursor& at) {
  const ptx::Word4 w = ptx::ld_shared_word4(memory.step(at));
  return {w.x, w.y, w.z, w.w};
}

/// When a tile of keys adds to the sums of a tile of queries: tiles of keys are counted from 1.
struct Sm90Turn {
  i32 number;  // of the first part's turn (backward.h)
  i32 before;  // who adds before; 0: nobody. Paged keys: the place of those that add
  i32 mine;    // who adds; 0: nobody, there are no more steps
  i32 ends;    // is it the last step of a part of a tile of keys?
  i32 row;     // paged keys: the first of the queries
};

template <KernelSpec S>
ATTUNE_DEVICE Sm90Turn turn_at(Sm90Memory<S> memory, const typename Sm90Memory<S>::QueryCursor& at) {
  const ptx::Word4 w = ptx::ld_shared_word4(memory.turn(at));
  const i32 row = S.keys == Keys::paged ? step_at(memory, at).begin : 0;
  return {w.x, w.y, w.z, w.w, row};
}

/// Queries past the end of their block have an LSE of +inf, which makes their probabilities 0; but a bias
/// tensor may hold anything there, NaN too, where they are another sequence's.
constexpr bool hides_foreign_queries(const KernelSpec& s) {
  return s.blocks == Blocks::varlen && s.bias != Bias::none;
}

/// Tiles of queries [first, last) that see keys of a tile; those of [clear_first, clear_last) see all.
struct Sm90StepRange {
  i32 first;
  i32 last;
  i32 clear_first;
  i32 clear_last;
};

/// Tiles of keys in the order in which blocks take them, as in forward (forward_sm90.cuh): strided where all
/// are alike; under a window the longest first, whoever is free, within sections of heads whose queries fit
/// the L2 cache; those of packed sequences as they lie, whoever is free.
///
/// The first block of a cluster takes for both.
///
/// Under a window they walk over queries from the last one on, at which all tiles of a head may begin: so
/// they share queries, and sums, in the L2 cache.
///
/// Where tiles take turns to add to the sums, whoever is free takes each, the first too: a tile then waits
/// for none that has not begun, whatever else the GPU does. They walk from the last query on, too: tiles
/// before end later, or at the same query.
template <KernelSpec S>
struct Sm90Schedule {
  static constexpr bool kWindow = S.window_left == Edge::bounded || S.window_right == Edge::bounded;
  static constexpr bool kVarlen = S.blocks == Blocks::varlen;
  static constexpr bool kUneven = kWindow || kVarlen;
  static constexpr bool kOrdered = S.query_gradient == QueryGradient::ordered;
  static constexpr bool kFromLast = kWindow || kOrdered;
  /// Tiles of one head that start at different queries do not wait for each other's sums. At head dim 128
  /// that cost more than it saved: they no longer share what is in the L2 cache.
  static constexpr bool kStaggered = !kFromLast && (wider_dim(S) <= 64 || shares_columns(S));

  // Both of a whole warp.
  static ATTUNE_DEVICE i32 first(const GradKeyValueSm90Params& p) {
    return kOrdered ? take(p.counter, p.tiles + p.blocks) : static_cast<i32>(blockIdx.x) / cluster_blocks(S);
  }
  static ATTUNE_DEVICE i32 next(i32 tile, const GradKeyValueSm90Params& p) {
    if (kOrdered) return take(p.counter, p.tiles + p.blocks);
    return kUneven && p.counter != nullptr ? p.blocks + take(p.counter, p.tiles) : tile + p.blocks;
  }

  /// Without the number of its steps.
  static ATTUNE_DEVICE Sm90Work work(i32 tile, const GradKeyValueSm90Params& p) {
    i32 pair = tile / p.key_blocks;
    i32 key_block = tile % p.key_blocks;
    if constexpr ((kWindow && !kVarlen) || kOrdered) {
      const i32 section = tile / (p.section * p.key_blocks);
      const i32 first = section * p.section;
      const i32 width = min(p.section, p.pairs - first);
      const i32 rest = tile - first * p.key_blocks;
      const bool falling = p.counter == nullptr && section % 2 == 1;
      pair = first + rest % width;
      key_block = falling ? p.key_blocks - 1 - rest / width : rest / width;
    }
    if constexpr (kVarlen) return {key_block * S.block_n, pair, 0, 0};
    return {key_block * cluster_keys(S), pair % p.heads, pair / p.heads, 0};
  }

  static ATTUNE_DEVICE Sm90StepRange steps(const KeySegment& keys, const Window& window) {
    if (keys.begin >= keys.end) return {};
    const i32 len_q = keys.block.len_q;
    const i32 end = keys.key + keys.end - keys.begin;
    const QueryRange visiting = visiting_queries<S>(window, len_q, keys.key, end);
    const QueryRange clear = unmasked_queries<S>(window, len_q, keys.key, end);
    Sm90StepRange steps;
    steps.first = max(visiting.begin, 0) / S.block_m;
    steps.last = max(ceil_div(visiting.end, S.block_m), steps.first);
    steps.clear_first = ceil_div(max(clear.begin, 0), S.block_m);
    steps.clear_last = clear.end == len_q && !hides_foreign_queries(S) ? steps.last : clear.end / S.block_m;
    if (keys.end - keys.begin < cluster_keys(S)) steps.clear_last = 0;
    return steps;
  }

  /// The tile of queries that a tile of keys begins with, and the one after m.
  static ATTUNE_DEVICE i32 first_step(const Sm90StepRange& range, i32 key_block, i32 key_blocks) {
    if (kFromLast) return range.last - 1;
    if (!kStaggered) return range.first;
    const i32 count = range.last - range.first;
    if (kVarlen) return range.first + (count == 0 ? 0 : key_block % count);
    return range.first + static_cast<i32>(i64{key_block} * count / key_blocks);
  }
  static ATTUNE_DEVICE i32 next_step(const Sm90StepRange& range, i32 m) {
    if (kFromLast) return m - 1;  // all heads have met m
    return m + 1 == range.last ? range.first : m + 1;
  }
  /// Of the heads that share a tile of keys the one that meets a tile of queries first: so that neighbours do
  /// not add to the same sums at once, unless they take turns.
  static ATTUNE_DEVICE i32 first_sharing_head(i32 key_block, i32 sharing) {
    return kFromLast && !kOrdered ? key_block % sharing : 0;
  }

 private:
  /// A number from a counter that nobody else gets. After so many takes, all of a launch, it is 0 again.
  static ATTUNE_DEVICE i32 take(u32* counter, i32 times) {
    u32 taken = 0;
    if (threadIdx.x % 32 == 0) taken = ptx::atom_inc(counter, static_cast<u32>(times - 1));
    return static_cast<i32>(__shfl_sync(0xffffffffu, taken, 0));
  }
};

/// Before anything else, by all threads of a block.
template <KernelSpec S>
ATTUNE_DEVICE Sm90Memory<S> set_up_memory(const GradKeyValueSm90Params& params) {
  static_assert(begins_early(S));
  extern __shared__ __align__(1024) u8 shared[];
  const Sm90Memory<S> memory{ptx::shared_address(shared)};
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {&params.query, &params.key, &params.value, &params.grad_output}) {
      ptx::prefetch_tensormap(*map);
    }
    const u32 senders = S.cluster != 0 ? 1 : 0;  // of score gradients: they read how many there are
    memory.keys().init(GradKeyValueSm90Shared::kWarpgroups * kWarpgroup + senders);
    memory.queries().init(kConsumerReleases<S> + kTurnWarps<S>, kQueryFills);
    for (u32 group = 0; group < GradKeyValueSm90Shared::kWarpgroups; ++group) {
      for (u32 buffer = 0; buffer < Sm90Memory<S>::kShared.sum_buffers; ++buffer) {
        ptx::mbarrier_init(memory.staged(group, buffer), kWarpgroup / 32);
      }
    }
    for (u32 parts = 0; parts < GradKeyValueSm90Shared::added_barriers(S); ++parts) {
      ptx::mbarrier_init(memory.added(parts), GradKeyValueSm90Shared::kWarpgroups * kWarpgroup / 32);
    }
    ptx::st_shared_release(memory.allowed(), 0);
    if constexpr (S.bias != Bias::none) {
      ptx::prefetch_tensormap(params.bias);
      memory.biases().init(GradKeyValueSm90Shared::kWarpgroups * (shares_columns(S) ? 1 : kWarpgroup));
    }
    ptx::fence_mbarrier_init();
  }
  ptx::griddepcontrol_wait();  // what delta writes is there from here on
  __syncthreads();
  return memory;
}

}  // namespace attune::kernel
