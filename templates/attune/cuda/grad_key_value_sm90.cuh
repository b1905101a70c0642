// Gradients of key and value on Hopper, with the query's added up beside them: products of warpgroups
// (wgmma), tiles by the tensor copy engine, warp-specialised.
//
// A block stays on its SM and takes one tile of 128 keys after the other. One warp of it, the producer,
// copies the keys and values, and then a ring of tiles of queries and output gradients, of every head that
// shares them; two warpgroups of 128 threads own 64 keys each:
//
//                   queries      |  Q m  | Q m+1 |       ring of `stages`, with the LSE and delta of
//                   output grads | dO m  | dO m+1|       each query
//        +--------+
//   K, V | 64 x D |  warpgroup 0:  S^T = K Q^T   P^T = exp2(S^T - LSE)      dV += P^T dO
//   K, V | 64 x D |  warpgroup 1   dP^T = V dO^T dS^T = P^T (dP^T - delta)  dK += dS^T Q
//        +--------+                              dQ = dS K, shared by the warpgroups
//
// Scores are computed with keys as rows, so that P^T and dS^T are operands of dV and dK where they are, in
// registers. Only dS crosses shared memory: dQ sums over the keys of both warpgroups. Of it each computes 64
// rows or 64 columns and leaves them to a warp of the producer's, an adder, which has the copy engine add
// them to the float32 sums in memory (the structure of Shah et al., FlashAttention-3, arXiv 2407.08608).
//
// Tiles of packed sequences are rows of the tensors: one is worked on once for every block that has keys in
// it, and what lies beside the block's becomes 0 in shared memory. A tile of a bias tensor comes for each
// tile of queries; its gradient is the exchanged tile of dS, which the copy engine stores.
//
// Registers of one thread:    producer  consumer    S + dP, or dS + P + dQ, beside dK + dV
//   head dim  64, 128 x 128   24        240         64 + 64, or 32 + 32 + 32, beside 32 + 32
//   head dim 128,  64 x 128   24        240         32 + 32, or 16 + 16 + 32, beside 64 + 64
#pragma once

#include "attune/backward.h"
#include "attune/cuda/dropout_sm90.cuh"
#include "attune/cuda/panels.cuh"
#include "attune/cuda/pipeline.cuh"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/ptx_sm90.cuh"
#include "attune/cuda/ptx_wgmma.cuh"
#include "attune/cuda/score_bias.cuh"
#include "attune/cuda/segments.cuh"
#include "attune/cuda/shared.h"
#include "attune/cuda/tile.cuh"
#include "attune/num.h"
#include "attune/params.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

/// Where things lie in shared memory.
template <KernelSpec S>
struct Sm90Memory {
  static constexpr GradKeyValueSm90Shared kShared{S};
  using KeyRing = Ring<1, 2 * kShared.key_bytes>;             // keys, then values
  using QueryRing = Ring<S.stages, 2 * kShared.query_bytes>;  // queries, then output gradients
  using BiasRing = Ring<1, kShared.bias_bytes>;
  using QueryCursor = typename QueryRing::Cursor;
  using AddedCursor = Cursor<GradKeyValueSm90Shared::added_barriers(S)>;

  u32 base;

  ATTUNE_DEVICE KeyRing keys() const { return {base, base + kShared.barrier_offset}; }
  ATTUNE_DEVICE QueryRing queries() const {
    return {base + kShared.query_offset, base + kShared.barrier_offset + KeyRing::kBarrierBytes};
  }
  ATTUNE_DEVICE BiasRing biases() const {
    return {base + kShared.bias_offset,
            base + kShared.barrier_offset + KeyRing::kBarrierBytes + QueryRing::kBarrierBytes};
  }
  /// The work item that comes with a tile of keys, the part of them, and its window.
  ATTUNE_DEVICE u32 work() const { return base + kShared.work_offset; }
  ATTUNE_DEVICE u32 part() const { return work() + 16; }
  ATTUNE_DEVICE u32 window() const { return work() + 32; }
  /// What a stage holds.
  ATTUNE_DEVICE u32 step(const QueryCursor& at) const { return base + kShared.step_offset + at.stage * 16; }
  /// The LSE of a stage's queries, then their delta.
  ATTUNE_DEVICE u32 numbers(const QueryCursor& at) const {
    return base + kShared.number_offset + at.stage * (2 * S.block_m * 4);
  }
  ATTUNE_DEVICE u32 scores(u32 buffer) const {
    return base + kShared.score_offset + buffer * kShared.score_bytes;
  }
  /// When that may be added to the sums.
  ATTUNE_DEVICE u32 turn(const QueryCursor& at) const { return base + kShared.turn_offset + at.stage * 16; }
  /// How many steps may be.
  ATTUNE_DEVICE u32 allowed() const { return base + kShared.allowed_offset; }
  /// Sums on their way to memory; where they go, and how many rows there are and when.
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
  /// Completes when all warps have added their sums of a step to memory.
  ATTUNE_DEVICE u32 added(const AddedCursor& at) const { return base + kShared.added_offset + at.stage * 8; }
  /// What two neighbouring warps of consumers tell each other about dropout.
  ATTUNE_DEVICE u32 drawn(u32 pair) const {
    return base + kShared.drawn_offset + pair * KeptKeyRows<S>::kPairBytes;
  }
};

/// Named barriers: of both warpgroups; of each; of each for the other; of each with its adder, for two
/// buffers; and of each two warps. 0 is __syncthreads.
enum Sm90Barrier : u32 { kExchange = 1, kGroup = 2, kShown = 4, kTaken = 6, kDrawn = 10 };
inline constexpr u32 kAdderThreads = kWarpgroup + 32;

/// Who fills a stage of queries: the copy engine, and the warp that reads their numbers.
inline constexpr u32 kQueryFills = 2;
/// Who reads a stage besides the consumers: warps that see to turns.
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

/// A tile of queries: its first and their head over all groups.
struct Sm90Step {
  i32 begin;
  i32 head;
  i32 masked;  // is any of its pairs invisible?
  i32 rows;    // queries that the block has from the first on
};

/// When a tile of keys adds to the sums of a tile of queries: tiles of keys are counted from 1.
struct Sm90Turn {
  i32 number;  // of the first part's turn (backward.h)
  i32 before;  // who adds before; 0: nobody
  i32 mine;    // who adds; 0: nobody, there are no more steps
};

template <KernelSpec S>
ATTUNE_DEVICE Sm90Turn turn_at(Sm90Memory<S> memory, const typename Sm90Memory<S>::QueryCursor& at) {
  const ptx::Word4 w = ptx::ld_shared_word4(memory.turn(at));
  return {w.x, w.y, w.z};
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
/// Where tiles take turns to add to the sums, whoever is free takes each, the first too: a tile then waits
/// for none that has not begun, whatever else the GPU does. They walk over queries from the last one on, at
/// which all tiles of a head may begin: those before end later, or at the same query.
template <KernelSpec S>
struct Sm90Schedule {
  static constexpr bool kWindow = S.window_left == Edge::bounded || S.window_right == Edge::bounded;
  static constexpr bool kVarlen = S.blocks == Blocks::varlen;
  static constexpr bool kUneven = kWindow || kVarlen;
  static constexpr bool kOrdered = S.query_gradient == QueryGradient::ordered;
  /// Tiles of one head that start at different queries do not wait for each other's sums. At head dim 128
  /// that cost more than it saved: they no longer share what is in the L2 cache.
  static constexpr bool kStaggered = !kWindow && !kOrdered && (wider_dim(S) <= 64 || shares_columns(S));

  // Both of a whole warp.
  static ATTUNE_DEVICE i32 first(const GradKeyValueSm90Params& p) {
    return kOrdered ? take(p.counter, p.tiles + p.blocks) : static_cast<i32>(blockIdx.x);
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
    return {key_block * S.block_n, pair % p.heads, pair / p.heads, 0};
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
    // Queries past the end have probability 0 without a mask, keys past it have not.
    steps.clear_last = clear.end == len_q ? steps.last : clear.end / S.block_m;
    if (keys.end - keys.begin < S.block_n) steps.clear_last = 0;
    return steps;
  }

  /// The tile of queries that a tile of keys begins with, and the one after m.
  static ATTUNE_DEVICE i32 first_step(const Sm90StepRange& range, i32 key_block, i32 key_blocks) {
    if (kOrdered) return range.last - 1;
    if (!kStaggered) return range.first;
    const i32 count = range.last - range.first;
    if (kVarlen) return range.first + (count == 0 ? 0 : key_block % count);
    return range.first + static_cast<i32>(i64{key_block} * count / key_blocks);
  }
  static ATTUNE_DEVICE i32 next_step(const Sm90StepRange& range, i32 m) {
    if (kOrdered) return m == range.first ? range.last - 1 : m - 1;
    return m + 1 == range.last ? range.first : m + 1;
  }

 private:
  /// What nobody else takes of a counter, which ends at 0 when that has been done so many times.
  static ATTUNE_DEVICE i32 take(u32* counter, i32 times) {
    u32 taken = 0;
    if (threadIdx.x % 32 == 0) taken = ptx::atom_inc(counter, static_cast<u32>(times - 1));
    return static_cast<i32>(__shfl_sync(0xffffffffu, taken, 0));
  }
};

// ---- The producer: a warp, whose first lane talks to the copy engine ----

template <KernelSpec S>
class Sm90Producer {
  using Memory = Sm90Memory<S>;
  using Schedule = Sm90Schedule<S>;
  static constexpr i32 kPanels = Memory::kShared.panels;
  static constexpr i32 kKeys = S.block_n;
  static constexpr i32 kQueries = S.block_m;

 public:
  ATTUNE_DEVICE Sm90Producer(const GradKeyValueSm90Params& params, Memory memory)
      : p_(params),
        memory_(memory),
        keys_(memory.keys()),
        queries_(memory.queries()),
        biases_(memory.biases()) {}

  ATTUNE_DEVICE void run() {
#pragma unroll 1
    for (i32 tile = Schedule::first(p_); tile < p_.tiles; tile = Schedule::next(tile, p_)) {
      produce(Schedule::work(tile, p_));
    }
    keys_.acquire(key_at_);
    if (first_lane()) {
      ptx::st_shared_word4(memory_.work(), {0, 0, 0, -1});
      ptx::mbarrier_arrive(keys_.full(key_at_));
    }
    if constexpr (Schedule::kOrdered) end_turns();
  }

 private:
  static ATTUNE_DEVICE i32 lane() {
    return static_cast<i32>(threadIdx.x % 32);
  }
  static ATTUNE_DEVICE bool first_lane() {
    return lane() == 0;
  }

  /// One part after the other of a tile of keys; a tile that is no block's has one without queries.
  ATTUNE_DEVICE void produce(const Sm90Work& work) {
    const ForwardParams& p = p_.backward.forward;
    const i32 end = min(work.begin + kKeys, p.len_k);
    if constexpr (!Schedule::kVarlen) {
      produce_part(work, segment_at<S>(p, work.batch, work.begin, end, 0), 0, true);
    } else {
      const i32 count = p.sequences.count;
      i32 place = next_place<S>(p, work.begin, end, 0);
#pragma unroll 1
      do {
        const i32 next = next_place<S>(p, work.begin, end, place + 1);
        produce_part(work, place < count ? segment_at<S>(p, 0, work.begin, end, place) : KeySegment{}, place,
                     next == count);
        place = next;
      } while (place < count);
    }
  }

  /// The first queries do not wait until the keys before have been multiplied.
  ATTUNE_DEVICE void produce_part(Sm90Work work, const KeySegment& segment, i32 place, bool ends) {
    const Block& block = segment.block;
    const Window window = window_of_block<S>(p_.backward.forward, block);
    const KeySegment keys = seen_part<S>(segment, window);
    const Sm90StepRange range = Schedule::steps(keys, window);
    const i32 count = range.last - range.first;
    work.steps = count * p_.sharing;
    const auto load_keys = [&] {
      keys_.acquire(key_at_);
      if (first_lane()) {
        if constexpr (Schedule::kUneven) {
          const i32 sums_row = first_sum_row(p_.backward, block) - block.q_begin;
          ptx::st_shared_word4(memory_.part(), {keys.begin, keys.end, ends, sums_row});
        }
        if constexpr (Schedule::kVarlen) {
          const i32 shift = block.k_begin - block.q_begin;
          ptx::st_shared_word4(memory_.window(), {window.lower + shift, window.upper + shift, 0, 0});
        }
        load_keys_of(work);
      }
      key_at_.advance();
    };
    if (work.steps == 0) load_keys();
    const i32 key_block = work.begin / kKeys;
    i32 m = Schedule::first_step(range, key_block, p_.key_blocks);
    // The tile of keys before has no later first step, so that its last says where it adds.
    i32 end_before = 0;
    if (Schedule::kOrdered && key_block > 0) {
      const i32 begin = work.begin - kKeys;
      const KeySegment tile = segment_at<S>(p_.backward.forward, work.batch, begin, work.begin, place);
      end_before = Schedule::steps(seen_part<S>(tile, window), window).last;
    }
    const i32 first_head = work.head * p_.sharing;
    Sm90Step step{0, first_head, 0, 0};
#pragma unroll 1
    for (i32 number = 0; number < work.steps; ++number) {
      step.begin = block.q_begin + m * kQueries;
      step.masked = m < range.clear_first || m >= range.clear_last;
      step.rows = block.len_q - m * kQueries;
      queries_.acquire(query_at_);
      if constexpr (Schedule::kOrdered) {
        const i32 tile = first_turn_tile(p_.backward.forward, block) + m;
        announce_turn(
            {turn_number(work.batch, step.head, tile), m < end_before ? key_block : 0, key_block + 1});
      }
      load_queries(step, work.batch);
      if (number == 0) load_keys();
      if constexpr (S.bias != Bias::none) load_bias(work, step);
      load_numbers(step, work.batch);
      query_at_.advance();
      if (++step.head == first_head + p_.sharing) {
        step.head = first_head;
        m = Schedule::next_step(range, m);
      }
    }
  }

  ATTUNE_DEVICE i32 turn_number(i32 batch, i32 head, i32 tile) const {
    return ((batch * p_.heads * p_.sharing + head) * turn_tiles(p_.backward.forward) + tile) * kTurnParts;
  }
  ATTUNE_DEVICE void announce_turn(const Sm90Turn& turn) const {
    if (!first_lane()) return;
    ptx::st_shared_word4(memory_.turn(query_at_), {turn.number, turn.before, turn.mine, 0});
  }
  /// A stage without queries.
  ATTUNE_DEVICE void end_turns() const {
    queries_.acquire(query_at_);
    announce_turn({});
    if (!first_lane()) return;
    for (i32 fill = 0; fill < kQueryFills; ++fill) ptx::mbarrier_arrive(queries_.full(query_at_));
  }

  /// By the first lane.
  ATTUNE_DEVICE void load_keys_of(const Sm90Work& work) const {
    const u32 tile = keys_.tile(key_at_);
    const u32 full = keys_.full(key_at_);
    const ptx::BoxOrigin origin{0, work.begin, work.head / p_.heads_per_key_head, work.batch};
    ptx::st_shared_word4(memory_.work(), {work.begin, work.head, work.batch, work.steps});
    ptx::mbarrier_arrive_expect_tx(full, Memory::KeyRing::kBytes);
    load_panels<kPanels, kKeys>(tile, p_.key, full, origin, ptx::kEvictFirst);
    load_panels<kPanels, kKeys>(tile + Memory::kShared.key_bytes, p_.value, full, origin, ptx::kEvictFirst);
  }

  ATTUNE_DEVICE void load_queries(const Sm90Step& step, i32 batch) const {
    if (!first_lane()) return;
    const u32 tile = queries_.tile(query_at_);
    const u32 full = queries_.full(query_at_);
    const ptx::BoxOrigin origin{0, step.begin, step.head, batch};
    ptx::st_shared_word4(memory_.step(query_at_), {step.begin, step.head, step.masked, step.rows});
    ptx::mbarrier_arrive_expect_tx(full, 2 * Memory::kShared.query_bytes);
    load_panels<kPanels, kQueries>(tile, p_.query, full, origin, ptx::kEvictLast);
    load_panels<kPanels, kQueries>(tile + Memory::kShared.query_bytes, p_.grad_output, full, origin,
                                   ptx::kEvictLast);
  }

  ATTUNE_DEVICE void load_bias(const Sm90Work& work, const Sm90Step& step) {
    using Tile = KeyRowBiasTile<S>;
    biases_.acquire(bias_at_);
    if (first_lane()) {
      const u32 full = biases_.full(bias_at_);
      ptx::BoxOrigin origin{work.begin, p_.bias_rows == 1 ? 0 : step.begin,
                            step.head / p_.heads_per_bias_head, work.batch * p_.bias_batches};
      ptx::mbarrier_arrive_expect_tx(full, Tile::kPanels * p_.bias_rows * Tile::kRowBytes);
#pragma unroll 1
      for (i32 panel = 0; panel < Tile::kPanels; ++panel) {
        ptx::cp_async_bulk_tensor_load(biases_.tile(bias_at_) + panel * Tile::kPanelBytes, p_.bias, full,
                                       origin, ptx::kEvictFirst);
        origin.column += Tile::kPanelKeys;
      }
    }
    bias_at_.advance();
  }

  /// The numbers of a tile's queries. Past the end their LSE is +inf, which makes every probability 0.
  ATTUNE_DEVICE void load_numbers(const Sm90Step& step, i32 batch) const {
    constexpr i32 kRounds = kQueries / 32;
    const i64 len_q = p_.backward.forward.len_q;
    const i64 row = (i64{batch} * p_.heads * p_.sharing + step.head) * len_q + step.begin;
    float lse2[kRounds];
    float delta[kRounds];
#pragma unroll
    for (i32 i = 0; i < kRounds; ++i) {
      const i32 query = i * 32 + lane();
      const bool inside = query < step.rows;
      lse2[i] = inside ? p_.backward.lse2[row + query] : -neg_inf();
      delta[i] = inside ? p_.backward.delta[row + query] : 0.0f;
    }
    const u32 numbers = memory_.numbers(query_at_) + static_cast<u32>(lane() * 4);
#pragma unroll
    for (i32 i = 0; i < kRounds; ++i) {
      ptx::st_shared_float(numbers + i * 128, lse2[i]);
      ptx::st_shared_float(numbers + kQueries * 4 + i * 128, delta[i]);
    }
    __syncwarp();
    if (first_lane()) ptx::mbarrier_arrive(queries_.full(query_at_));
  }

  const GradKeyValueSm90Params& p_;
  const Memory memory_;
  const typename Memory::KeyRing keys_;
  const typename Memory::QueryRing queries_;
  const typename Memory::BiasRing biases_;
  typename Memory::KeyRing::Cursor key_at_{1};
  typename Memory::QueryCursor query_at_{1};
  typename Memory::BiasRing::Cursor bias_at_{1};
};

// ---- Turns: warps that wait for other blocks, so that nobody else does ----

/// The last tile of keys that has added to a part of a tile's sums.
ATTUNE_DEVICE u32* turn_of(const GradKeyValueSm90Params& p, i32 number) {
  return p.backward.turns + 1 + static_cast<u32>(number);
}

/// Sees to it that the tile of keys before has added before this one does: ahead of the step where it can.
template <KernelSpec S>
class Sm90Watcher {
 public:
  ATTUNE_DEVICE Sm90Watcher(const GradKeyValueSm90Params& params, Sm90Memory<S> memory)
      : p_(params), memory_(memory) {}

  ATTUNE_DEVICE void run() {
    const auto queries = memory_.queries();
    typename Sm90Memory<S>::QueryCursor at(0);
    for (u32 steps = 1;; ++steps) {
      queries.wait(at);
      const Sm90Turn turn = turn_at<S>(memory_, at);
      __syncwarp();
      if (lane() == 0) queries.release(at);
      at.advance();
      if (turn.mine == 0) return;
      const u32* last = turn_of(p_, turn.number) + (shares_columns(S) ? 0 : lane() % kTurnParts);
      while (!__all_sync(0xffffffffu, ptx::ld_acquire(last) == static_cast<u32>(turn.before))) {}
      __syncwarp();
      if (lane() == 0) ptx::st_shared_release(memory_.allowed(), steps);
    }
  }

 private:
  static ATTUNE_DEVICE u32 lane() { return threadIdx.x % 32; }

  const GradKeyValueSm90Params& p_;
  const Sm90Memory<S> memory_;
};

/// Until so many steps may be added to the sums.
template <KernelSpec S>
ATTUNE_DEVICE void await_turn(Sm90Memory<S> memory, u32 steps) {
  while (static_cast<i32>(ptx::ld_shared_acquire(memory.allowed()) - steps) < 0) {}
}

// ---- An adder: a warp that spares a warpgroup the wait for the copy engine ----

template <KernelSpec S>
class Sm90Adder {
  static constexpr i32 kRows = GradKeyValueSm90Shared::kGroupRows;
  static constexpr u32 kBuffers = Sm90Memory<S>::kShared.sum_buffers;
  static constexpr bool kOrdered = S.query_gradient == QueryGradient::ordered;

 public:
  ATTUNE_DEVICE Sm90Adder(const GradKeyValueSm90Params& params, Sm90Memory<S> memory, u32 group)
      : p_(params), memory_(memory), group_(group) {}

  ATTUNE_DEVICE void run() {
    for (u32 buffer = 0; buffer < kBuffers; ++buffer) let_go(buffer);
    for (u32 step = 0;; ++step) {
      const u32 buffer = step % kBuffers;
      ptx::mbarrier_wait(memory_.staged(group_, buffer), step / kBuffers % 2);
      const ptx::Word4 target = ptx::ld_shared_word4(memory_.target(group_, buffer));
      const ptx::Word4 more = ptx::ld_shared_word4(memory_.target(group_, buffer) + 16);
      if (target.w < 0) return;  // no more work
      if constexpr (kOrdered) {
        await_turn(memory_, step + 1);
        ptx::fence_proxy_async_global();
      }
      add({target.x, target.y, target.z, target.w}, more.x, memory_.sums(group_, buffer));
      ptx::cp_async_bulk_wait_group_read<0>();
      __syncwarp();
      let_go(buffer);
      if constexpr (kOrdered) pass_on(more.y, more.z);
    }
  }

 private:
  static ATTUNE_DEVICE i32 lane() { return static_cast<i32>(threadIdx.x % 32); }

  ATTUNE_DEVICE void let_go(u32 buffer) const {
    ptx::bar_arrive(kTaken + group_ * 2 + buffer, kAdderThreads);
  }

  /// A lane for each warp's fragments, of which whole ones past the end are left out.
  ATTUNE_DEVICE void add(const ptx::BoxOrigin& origin, i32 rows, u32 staged) const {
    const i32 row = origin.row + lane() * kFragmentRows;
    const u32 bytes = static_cast<u32>(Sm90Sums<S>::fragments(group_) * kFragmentBytes);
    if (lane() < kRows / kFragmentRows && lane() * kFragmentRows < rows && bytes > 0) {
      const i64 head = i64{origin.batch} * p_.heads * p_.sharing + origin.head;
      float* sums = p_.backward.query_sums + (head * sum_rows(p_.backward) + row) * S.head_dim;
      ptx::cp_reduce_async_bulk_add(sums + origin.column * kFragmentRows,
                                    staged + static_cast<u32>(lane()) * kStagedBytes, bytes);
    }
    ptx::cp_async_bulk_commit_group();  // by every lane, so that all count alike
  }

  /// Lets the next tile of keys add, once what this one has is there for all to see.
  ATTUNE_DEVICE void pass_on(i32 turn, i32 mine) const {
    ptx::cp_async_bulk_wait_group<0>();
    __syncwarp();
    if (lane() == 0) ptx::st_release(turn_of(p_, turn) + group_, static_cast<u32>(mine));
  }

  const GradKeyValueSm90Params& p_;
  const Sm90Memory<S> memory_;
  const u32 group_;
};

// ---- A consumer warpgroup ----

/// All rows but [first, last) of two tiles, one behind the other, become 0. By all consumers.
template <KernelSpec S, i32 Rows>
ATTUNE_DEVICE void clear_rows(u32 tiles, i32 first, i32 last) {
  constexpr i32 kThreads = GradKeyValueSm90Shared::kWarpgroups * kWarpgroup;
  constexpr i32 kRowChunks = Sm90Shared::kPanelRowBytes / 16;
  constexpr i32 kChunks = 2 * Sm90Memory<S>::kShared.panels * Rows * kRowChunks;
#pragma unroll 1
  for (i32 i = static_cast<i32>(threadIdx.x) - kWarpgroup; i < kChunks; i += kThreads) {
    const i32 row = i / kRowChunks % Rows;
    if (row < first || row >= last) ptx::st_shared_word4(tiles + static_cast<u32>(i * 16), {0, 0, 0, 0});
  }
  ptx::fence_proxy_async();
  ptx::bar_sync(kExchange, kThreads);
}

/// Keys that no query of the block sees, and their values, may be NaN, which times a gradient of 0 would be
/// NaN in dQ: they become 0.
template <KernelSpec S>
ATTUNE_DEVICE void clear_unseen_keys(const ForwardParams& p, Sm90Memory<S> memory, i32 begin) {
  const Sm90Part keys = part_of(memory);
  if (keys.first <= begin && min(begin + S.block_n, p.len_k) <= keys.last) return;
  clear_rows<S, S.block_n>(memory.base, keys.first - begin, keys.last - begin);
}

/// Queries of the next sequence, and their outputs' gradients, become zeros likewise.
template <KernelSpec S>
ATTUNE_DEVICE void clear_foreign_queries(u32 tiles, i32 rows) {
  if (rows < S.block_m) clear_rows<S, S.block_m>(tiles, 0, rows);
}

/// Of rows: query i sees key j iff i + lower <= j <= i + upper.
template <KernelSpec S>
ATTUNE_DEVICE Window window_of_rows(const ForwardParams& p, Sm90Memory<S> memory) {
  if constexpr (S.blocks != Blocks::varlen) return p.window;
  const ptx::Word4 w = ptx::ld_shared_word4(memory.window());
  return {w.x, w.y};
}

/// Scores S^T of pairs that do not see each other become -inf. `key` is this thread's first, its second is 8
/// further down; `query` is the tile's first.
template <KernelSpec S>
ATTUNE_DEVICE void hide_invisible(float (&score)[S.block_m / 2], const ForwardParams& p, Sm90Memory<S> memory,
                                  i32 first_key, i32 query) {
  const Window rows = window_of_rows<S>(p, memory);
  const Sm90Part keys = S.blocks == Blocks::varlen ? part_of<S>(memory) : Sm90Part{0, p.len_k, 1, 0};
  query += static_cast<i32>(threadIdx.x % 4 * 2);
#pragma unroll
  for (i32 half = 0; half < 2; ++half) {
    const i32 key = first_key + half * 8;
    const QueryRange seeing = visiting_queries<S>(rows, p.len_q, key, key + 1);
    const i32 begin = seeing.begin - query;
    const i32 end = keys.first <= key && key < keys.last ? seeing.end - query : 0;
#pragma unroll
    for (i32 e = 0; e < S.block_m / 4; ++e) {
      const i32 i = e / 2 * 8 + e % 2;
      if (i < begin || i >= end) score[e / 2 * 4 + half * 2 + e % 2] = neg_inf();
    }
  }
}

template <KernelSpec S>
class Sm90Consumer {
  using Memory = Sm90Memory<S>;
  using Schedule = Sm90Schedule<S>;
  using Shared = GradKeyValueSm90Shared;
  static constexpr i32 kKeys = S.block_n;
  static constexpr i32 kQueries = S.block_m;
  static constexpr i32 kGroupRows = Shared::kGroupRows;
  static constexpr i32 kThreads = Shared::kWarpgroups * kWarpgroup;
  static constexpr i32 kDimSteps = ceil_div(wider_dim(S), 16);  // k16 steps of K Q^T
  static constexpr i32 kDim = round_up(wider_dim(S), 16);       // columns of dK and dV
  static constexpr bool kSplitColumns = Sm90Sums<S>::kSplitColumns;
  static constexpr i32 kSumDim = Sm90Sums<S>::kDim;
  static constexpr bool kDropout = S.dropout == Dropout::on;

  using Scores = float[kQueries / 2];  // element e: key half e / 2 % 2, queries e / 4 * 8 + e % 2
  using Operand = u32[kQueries / 16][4];
  using Gradient = float[kDim / 2];
  using Sums = float[kSumDim / 2];

 public:
  ATTUNE_DEVICE Sm90Consumer(const GradKeyValueSm90Params& params, Memory memory, u32 group)
      : p_(params),
        memory_(memory),
        keys_(memory.keys()),
        queries_(memory.queries()),
        biases_(memory.biases()),
        group_(group) {}

  ATTUNE_DEVICE void run() {
    clear();
#pragma unroll 1
    while (true) {
      keys_.wait(key_at_);
      const i32 steps = work().steps;
      if (steps < 0) break;
      if constexpr (Schedule::kUneven) clear_unseen_keys(p_.backward.forward, memory_, work().begin);
#pragma unroll 1
      for (i32 left = steps; left > 0; --left) step();
      if (!Schedule::kVarlen || part().ends) {
        finish();
        clear();
      } else {
        keys_.release(key_at_);
      }
      key_at_.advance();
    }
    await_stored_gradients();
    await_adder();
    if (elected()) ptx::st_shared_word4(memory_.target(group_, buffer_), {0, 0, 0, -1});
    announce_sums();
  }

 private:
  static ATTUNE_DEVICE u32 thread() {
    return threadIdx.x % kWarpgroup;
  }
  static ATTUNE_DEVICE u32 lane() {
    return threadIdx.x % 32;
  }
  static ATTUNE_DEVICE bool elected() {
    return thread() == 0;
  }

  // Read again where they are needed: registers are for accumulators.
  ATTUNE_DEVICE Sm90Work work() const {
    const ptx::Word4 w = ptx::ld_shared_word4(memory_.work());
    return {w.x, w.y, w.z, w.w};
  }
  ATTUNE_DEVICE Sm90Step this_step() const {
    const ptx::Word4 w = ptx::ld_shared_word4(memory_.step(query_at_));
    return {w.x, w.y, w.z, w.w};
  }
  ATTUNE_DEVICE Sm90Part part() const {
    return part_of(memory_);
  }

  /// This thread's first; the second is 8 further down.
  ATTUNE_DEVICE i32 first_key(const Sm90Work& work) const {
    return work.begin + static_cast<i32>(group_ * kGroupRows + thread() / 32 * 16 + lane() / 4);
  }

  ATTUNE_DEVICE u32 key_tile() const {
    return memory_.base;
  }
  ATTUNE_DEVICE u32 value_tile() const {
    return memory_.base + Memory::kShared.key_bytes;
  }
  ATTUNE_DEVICE u32 query_tile() const {
    return queries_.tile(query_at_);
  }
  ATTUNE_DEVICE u32 grad_output_tile() const {
    return queries_.tile(query_at_) + Memory::kShared.query_bytes;
  }

  ATTUNE_DEVICE void clear() {
#pragma unroll
    for (i32 e = 0; e < kDim / 2; ++e) grad_key_[e] = grad_value_[e] = 0.0f;
  }

  // ---- One tile of queries ----

  ATTUNE_DEVICE void step() {
    Scores score;
    Scores gradient;
    queries_.wait(query_at_);
    if constexpr (Schedule::kVarlen) clear_foreign_queries<S>(query_tile(), this_step().rows);
    multiply_rows(score, key_tile(), query_tile());
    multiply_rows(gradient, value_tile(), grad_output_tile());
    const KeptKeyRows<S> kept = kept_pairs();
    ptx::wgmma_wait_group<1>();
    ptx::pin(score);
    make_probabilities(score);
    ptx::wgmma_wait_group<0>();
    ptx::pin(gradient);
    make_gradients(gradient, score, kept);
    if constexpr (kDropout) drop(score, kept);
    Operand grad_score;
    Operand probability;
    pack_operand(grad_score, gradient);
    pack_operand(probability, score);
    publish(grad_score);
    multiply_columns(grad_value_, probability, grad_output_tile());
    await_stored_gradients();
    ptx::fence_proxy_async();
    ptx::bar_sync(kExchange, kThreads);
    store_gradients();
    Sums sums;
    multiply_sums(sums);
    ptx::wgmma_wait_group<1>();
    ptx::pin(grad_value_);
    multiply_columns(grad_key_, grad_score, query_tile());
    ptx::wgmma_wait_group<1>();
    ptx::pin(sums);
    send(sums);
    ptx::wgmma_wait_group<0>();
    ptx::pin(grad_key_);
    if (elected()) queries_.release(query_at_);
    query_at_.advance();
    buffer_ ^= 1;
  }

  /// This warpgroup's rows of K Q^T or V dO^T; asynchronous.
  ATTUNE_DEVICE void multiply_rows(Scores& d, u32 rows, u32 columns) const {
    const u64 row = ptx::wgmma_descriptor(rows + group_ * kPanelBytes<kGroupRows>);
    const u64 column = ptx::wgmma_descriptor(columns);
    ptx::pin(d);
    ptx::wgmma_fence();
#pragma unroll
    for (i32 k = 0; k < kDimSteps; ++k) {
      const u64 row_k = row + static_cast<u64>(k / 4 * (kPanelBytes<kKeys> >> 4) + k % 4 * 2);
      const u64 column_k = column + static_cast<u64>(k / 4 * (kPanelBytes<kQueries> >> 4) + k % 4 * 2);
      ptx::Wgmma<kQueries>::template multiply<S.dtype>(d, row_k, column_k, k > 0);
    }
    ptx::wgmma_commit_group();
  }

  /// dV += P^T dO or dK += dS^T Q; asynchronous.
  ATTUNE_DEVICE void multiply_columns(Gradient& d, const Operand& operand, u32 tile) const {
    const u64 columns = ptx::wgmma_descriptor(tile, kPanelBytes<kQueries>);
    ptx::pin(d);
    ptx::wgmma_fence();
#pragma unroll
    for (i32 k = 0; k < kQueries / 16; ++k) {
      ptx::Wgmma<kDim>::template multiply<S.dtype, ptx::Major::mn>(
          d, operand[k], columns + static_cast<u64>(k * (kPanelBytes<16> >> 4)), true);
    }
    ptx::wgmma_commit_group();
  }

  /// This warpgroup's part of dQ = dS K; asynchronous.
  ATTUNE_DEVICE void multiply_sums(Sums& d) const {
    const u32 first_row = kSplitColumns ? 0 : group_ * kPanelBytes<kGroupRows>;
    const u32 first_column = kSplitColumns ? group_ * kPanelBytes<kKeys> : 0;
    const u64 score = ptx::wgmma_descriptor(memory_.scores(buffer_) + first_row);
    const u64 key = ptx::wgmma_descriptor(key_tile() + first_column, kPanelBytes<kKeys>);
    ptx::pin(d);
    ptx::wgmma_fence();
#pragma unroll
    for (i32 k = 0; k < kKeys / 16; ++k) {
      const u64 score_k = score + static_cast<u64>(k / 4 * (kPanelBytes<kQueries> >> 4) + k % 4 * 2);
      ptx::Wgmma<kSumDim>::template multiply<S.dtype, ptx::Major::mn>(
          d, score_k, key + static_cast<u64>(k * (kPanelBytes<16> >> 4)), k > 0);
    }
    ptx::wgmma_commit_group();
  }

  // ---- Scores ----

  /// P^T of S^T.
  ATTUNE_DEVICE void make_probabilities(Scores& score) {
    const float scale2 = p_.backward.forward.scale * kLog2e;
    if constexpr (S.bias != Bias::none) add_bias(score, scale2);
    const u32 numbers = memory_.numbers(query_at_) + lane() % 4 * 8;
#pragma unroll
    for (i32 e = 0; e < kQueries / 2; e += 4) {
      const float2 lse2 = ptx::ld_shared_float2(numbers + e * 8);
#pragma unroll
      for (i32 i = e; i < e + 4; ++i) {
        const float less = i % 2 == 0 ? lse2.x : lse2.y;
        score[i] = S.bias == Bias::none ? fmaf(score[i], scale2, -less) : score[i] - less;
      }
    }
    const Sm90Step step = this_step();
    if (step.masked) hide_invisible<S>(score, p_.backward.forward, memory_, first_key(work()), step.begin);
#pragma unroll
    for (i32 e = 0; e < kQueries / 2; ++e) score[e] = ptx::ex2_approx_ftz(score[e]);
  }

  /// Scores in base 2, with their bias.
  ATTUNE_DEVICE void add_bias(Scores& score, float scale2) {
    biases_.wait(bias_at_);
    const i32 key = static_cast<i32>(group_ * kGroupRows + thread() / 32 * 16);
    const KeyRowBiasTile<S> bias(biases_.tile(bias_at_), key, p_.bias_rows == 1, static_cast<i32>(lane()));
#pragma unroll
    for (i32 k = 0; k < kQueries / 16; ++k) {
      float element[8];
      bias.load(element, k);
#pragma unroll
      for (i32 e = 0; e < 8; ++e) score[k * 8 + e] = with_bias<S.bias>(score[k * 8 + e] * scale2, element[e]);
    }
    biases_.release(bias_at_);
    bias_at_.advance();
  }

  /// dS^T of dP^T.
  ATTUNE_DEVICE void make_gradients(Scores& gradient, const Scores& probability,
                                    const KeptKeyRows<S>& kept) const {
    const u32 numbers = memory_.numbers(query_at_) + kQueries * 4 + lane() % 4 * 8;
#pragma unroll
    for (i32 e = 0; e < kQueries / 2; e += 4) {
      const float2 delta = ptx::ld_shared_float2(numbers + e * 8);
#pragma unroll
      for (i32 i = e; i < e + 4; ++i) {
        gradient[i] = probability[i] * less_delta(gradient[i], i % 2 == 0 ? delta.x : delta.y, kept.kept(i));
      }
    }
  }

  ATTUNE_DEVICE float less_delta(float gradient, float delta, bool kept) const {
    if constexpr (!kDropout) return gradient - delta;
    return kept ? fmaf(gradient, p_.backward.forward.dropout.rescale, -delta) : -delta;
  }

  // ---- Dropout ----

  /// Drawn while the first products run.
  ATTUNE_DEVICE KeptKeyRows<S> kept_pairs() const {
    if constexpr (!kDropout) return {};
    const Sm90Step step = this_step();
    const Sm90Work tile = work();
    const u32 pair = threadIdx.x / 64 - kWarpgroup / 64;
    return {p_.backward.forward.dropout, tile.batch,   step.head, step.begin, first_key(tile),
            memory_.drawn(pair),         kDrawn + pair};
  }

  /// Survivors are scaled up in finish().
  static ATTUNE_DEVICE void drop(Scores& probability, const KeptKeyRows<S>& kept) {
#pragma unroll
    for (i32 e = 0; e < kQueries / 2; ++e) {
      if (!kept.kept(e)) probability[e] = 0.0f;
    }
  }

  static ATTUNE_DEVICE void pack_operand(Operand& operand, const Scores& values) {
#pragma unroll
    for (i32 e = 0; e < kQueries / 4; ++e)
      operand[e / 4][e % 4] = pack<S.dtype>(values[2 * e], values[2 * e + 1]);
  }

  /// dS, with queries as rows, to this warpgroup's panel of the exchange. There are two, so that one barrier
  /// for each tile is enough: who writes a tile has seen everyone past the one before.
  ATTUNE_DEVICE void publish(const Operand& grad_score) const {
    const u32 panel = memory_.scores(buffer_) + group_ * kPanelBytes<kQueries>;
    const u32 row = lane() / 16 * 8 + lane() % 8;
    const u32 origin =
        panel + panel_offset<kQueries>(row, static_cast<i32>(thread() / 32 * 2 + lane() / 8 % 2));
#pragma unroll
    for (i32 k = 0; k < kQueries / 16; ++k) {
      const u32(&d)[4] = grad_score[k];
      ptx::stmatrix_x4_trans(origin + k * kPanelBytes<16>, d[0], d[1], d[2], d[3]);
    }
  }

  /// Leaves this warpgroup's part of dQ to its adder, with the place where it goes.
  ATTUNE_DEVICE void send(const Sums& sums) const {
    await_adder();
    if (elected()) address_sums();
    const u32 staged = memory_.sums(group_, buffer_) + thread() / 32 * kStagedBytes + lane() * 16;
#pragma unroll
    for (i32 f = 0; f < kSumDim / kFragmentColumns; ++f) {
      ptx::st_shared_float4(staged + f * kFragmentBytes, sums + 4 * f);
    }
    ptx::fence_proxy_async();
    announce_sums();
  }

  ATTUNE_DEVICE void announce_sums() const {
    __syncwarp();
    if (lane() == 0) ptx::mbarrier_arrive(memory_.staged(group_, buffer_));
  }

  /// Until what was staged before has been read.
  ATTUNE_DEVICE void await_adder() const {
    ptx::bar_sync(kTaken + group_ * 2 + (Memory::kShared.sum_buffers == 1 ? 0 : buffer_), kAdderThreads);
  }

  /// Where this part goes: column, row, head and batch entry; how many rows there are; and when: the number
  /// of its turn, and as whom.
  ATTUNE_DEVICE void address_sums() const {
    const Sm90Step step = this_step();
    const Sm90Work tile = work();
    const i32 column = kSplitColumns ? static_cast<i32>(group_) * kSumDim : 0;
    const i32 row = kSplitColumns ? 0 : static_cast<i32>(group_) * kGroupRows;
    const i32 shift = Schedule::kVarlen ? part().sums_row : 0;
    const Sm90Turn turn = Schedule::kOrdered ? turn_at<S>(memory_, query_at_) : Sm90Turn{};
    const u32 target = memory_.target(group_, buffer_);
    ptx::st_shared_word4(target, {column, step.begin + shift + row, step.head, tile.batch});
    ptx::st_shared_word4(target + 16, {step.rows - row, turn.number, turn.mine, 0});
  }

  // ---- The gradient of a bias tensor: the tiles of dS as they are exchanged ----

  ATTUNE_DEVICE bool stores_gradients() const {
    return stores_bias_gradient(S) && p_.backward.grad_bias != nullptr && elected();
  }

  /// This warpgroup's panel of the tile.
  ATTUNE_DEVICE void store_gradients() const {
    if (!stores_gradients()) return;
    const Sm90Step step = this_step();
    const Sm90Work tile = work();
    ptx::cp_async_bulk_tensor_store(
        p_.grad_bias, memory_.scores(buffer_) + group_ * kPanelBytes<kQueries>,
        {tile.begin + static_cast<i32>(group_) * kGroupRows, step.begin, step.head, tile.batch});
    ptx::cp_async_bulk_commit_group();
  }

  /// Before others may write to the tile that was stored last.
  ATTUNE_DEVICE void await_stored_gradients() const {
    if (stores_gradients()) ptx::cp_async_bulk_wait_group_read<0>();
  }

  // ---- The end of a tile of keys ----

  /// The gradients leave through the tiles of the exchange, one after the other, as the next keys are on
  /// their way.
  ATTUNE_DEVICE void finish() {
    await_stored_gradients();
    const Sm90Work tile = work();
    keys_.release(key_at_);              // by every thread: each has read what comes with them
    ptx::bar_sync(kExchange, kThreads);  // both warpgroups have read what they exchanged
#pragma unroll
    for (i32 e = 0; e < kDim / 2; ++e) {
      grad_key_[e] *= p_.backward.forward.scale;
      if constexpr (kDropout) grad_value_[e] *= p_.backward.forward.dropout.rescale;
    }
    const BackwardParams& p = p_.backward;
    write_rows(grad_key_);
    ptx::bar_sync(kGroup + group_, kWarpgroup);
    store_rows<S.head_dim>(tile, p.grad_key, p.grad_key_strides);
    ptx::bar_sync(kGroup + group_, kWarpgroup);
    write_rows(grad_value_);
    ptx::bar_sync(kGroup + group_, kWarpgroup);
    store_rows<S.head_dim_v>(tile, p.grad_value, p.grad_value_strides);
    ptx::bar_sync(kExchange, kThreads);  // they are free again
  }

  ATTUNE_DEVICE void write_rows(const Gradient& gradient) const {
    const u32 row = group_ * kGroupRows + thread() / 32 * 16 + lane() % 16;
#pragma unroll
    for (i32 k = 0; k < kDim / 16; ++k) {
      const float* g = gradient + k * 8;
      ptx::stmatrix_x4(memory_.scores(0) + panel_offset<kKeys>(row, k * 2 + static_cast<i32>(lane() / 16)),
                       pack<S.dtype>(g[0], g[1]), pack<S.dtype>(g[2], g[3]), pack<S.dtype>(g[4], g[5]),
                       pack<S.dtype>(g[6], g[7]));
    }
  }

  template <i32 Dim>
  ATTUNE_DEVICE void store_rows(const Sm90Work& work, void* gradient, const Strides& strides) const {
    if (gradient == nullptr) return;
    constexpr i32 kChunks = Dim / 8;
    const i32 first_row = static_cast<i32>(group_) * kGroupRows;
    const i32 heads = p_.backward.key_heads;
    u16* rows = static_cast<u16*>(gradient) + work.batch * strides.batch + work.head / heads * strides.group +
                work.head % heads * strides.head + (work.begin + first_row) * strides.seq;
    const i32 rest = p_.backward.forward.len_k - work.begin - first_row;
    const i32 count = min(rest, kGroupRows) * kChunks;
#pragma unroll 4
    for (i32 i = static_cast<i32>(thread()); i < count; i += kWarpgroup) {
      const i32 row = i / kChunks;
      const i32 chunk = i % kChunks;
      const ptx::Word4 w = ptx::ld_shared_word4(
          memory_.scores(0) + panel_offset<kKeys>(static_cast<u32>(first_row + row), chunk));
      *reinterpret_cast<int4*>(rows + row * strides.seq + chunk * 8) = make_int4(w.x, w.y, w.z, w.w);
    }
  }

  const GradKeyValueSm90Params& p_;
  const Memory memory_;
  const typename Memory::KeyRing keys_;
  const typename Memory::QueryRing queries_;
  const typename Memory::BiasRing biases_;
  const u32 group_;
  typename Memory::KeyRing::Cursor key_at_{0};
  typename Memory::QueryCursor query_at_{0};
  typename Memory::BiasRing::Cursor bias_at_{0};
  u32 buffer_ = 0;  // of the exchange

  Gradient grad_key_;
  Gradient grad_value_;
};

/// Before anything else, by all threads of a block.
template <KernelSpec S>
ATTUNE_DEVICE Sm90Memory<S> set_up_memory(const GradKeyValueSm90Params& params) {
  extern __shared__ __align__(1024) u8 shared[];
  const Sm90Memory<S> memory{ptx::shared_address(shared)};
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {&params.query, &params.key, &params.value, &params.grad_output}) {
      ptx::prefetch_tensormap(*map);
    }
    memory.keys().init(GradKeyValueSm90Shared::kWarpgroups * kWarpgroup);
    memory.queries().init(GradKeyValueSm90Shared::kWarpgroups + kTurnWarps<S>, kQueryFills);
    for (u32 group = 0; group < GradKeyValueSm90Shared::kWarpgroups; ++group) {
      for (u32 buffer = 0; buffer < Sm90Memory<S>::kShared.sum_buffers; ++buffer) {
        ptx::mbarrier_init(memory.staged(group, buffer), kWarpgroup / 32);
      }
    }
    for (typename Sm90Memory<S>::AddedCursor at(0); at.parity == 0; at.advance()) {
      ptx::mbarrier_init(memory.added(at), GradKeyValueSm90Shared::kWarpgroups * kWarpgroup / 32);
    }
    ptx::st_shared_release(memory.allowed(), 0);
    if constexpr (S.bias != Bias::none) {
      ptx::prefetch_tensormap(params.bias);
      memory.biases().init(GradKeyValueSm90Shared::kWarpgroups * kWarpgroup);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  return memory;
}

template <KernelSpec S>
ATTUNE_DEVICE void grad_key_value_sm90(const GradKeyValueSm90Params& params) {
  static_assert(S.family == Family::sm90 && S.dtype != DType::f32);
  static_assert(S.query_gradient != QueryGradient::apart && S.keys == Keys::contiguous);
  static_assert(S.blocks == Blocks::dense || (S.dropout == Dropout::off && S.bias == Bias::none));
  static_assert(S.head_dim % 8 == 0 && S.head_dim_v % 8 == 0);
  static_assert(S.block_n == GradKeyValueSm90Shared::kWarpgroups * GradKeyValueSm90Shared::kGroupRows);
  static_assert((S.block_m == 64 && wider_dim(S) <= 128) || (S.block_m == 128 && wider_dim(S) <= 64));
  static_assert(S.warps == 12);

  const Sm90Memory<S> memory = set_up_memory<S>(params);
  const u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // uniform, and known to be
  if (warp < 4) {
    ptx::setmaxnreg_dec<24>();
    if (warp == 0) {
      Sm90Producer<S>(params, memory).run();
    } else if (warp < 3) {
      Sm90Adder<S>(params, memory, warp - 1).run();
    } else if (Sm90Schedule<S>::kOrdered) {
      Sm90Watcher<S>(params, memory).run();
    }
  } else {
    ptx::setmaxnreg_inc<240>();
    Sm90Consumer<S>(params, memory, warp / 4 - 1).run();
  }
}

}  // namespace attune::kernel
