// The producer of grad_key_value_sm90.cuh: a warp, whose first lane talks to the copy engine.
#pragma once

#include "attune/cuda/grad_key_value_sm90_tiles.cuh"
#include "attune/cuda/panels.cuh"
#include "attune/cuda/score_bias.cuh"
#include "attune/num.h"

namespace attune::kernel {

template <KernelSpec S>
class Sm90Producer {
  using Memory = Sm90Memory<S>;
  using Schedule = Sm90Schedule<S>;
  static constexpr i32 kPanels = Memory::kShared.panels;
  static constexpr i32 kKeys = S.block_n;
  static constexpr i32 kQueries = S.block_m;
  /// What loads of keys need is then not kept from one tile of queries to the next: registers are few, too.
  static constexpr bool kKeysFirst = saves_code(S) && Schedule::kOrdered;

 public:
  ATTUNE_DEVICE Sm90Producer(const GradKeyValueSm90Params& params, Memory memory)
      : p_(params),
        memory_(memory),
        keys_(memory.keys()),
        queries_(memory.queries()),
        biases_(memory.biases()),
        last_panels_(memory.last_panels()) {}

  ATTUNE_DEVICE void run() {
#pragma unroll 1
    for (i32 tile = first(); tile < p_.tiles; tile = next(tile)) {
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

  ATTUNE_DEVICE i32 first() const {
    if constexpr (S.cluster != 0 && Schedule::kOrdered) return next(0);
    return Schedule::first(p_);
  }
  /// The tile after this one. In a cluster the first block takes it and tells the other.
  ATTUNE_DEVICE i32 next(i32 tile) const {
    if constexpr (S.cluster == 0 || (!Schedule::kUneven && !Schedule::kOrdered)) {
      return Schedule::next(tile, p_);
    } else {
      const u32 parity = key_at_.parity ^ (Schedule::kOrdered ? 1 : 0);  // not told of the first, else
      const u32 came = memory_.exchange(kTileCame);
      const u32 seen = memory_.exchange(kTileSeen);
      if (cluster_rank<S>() == 0) {
        tile = Schedule::next(tile, p_);
        ptx::mbarrier_wait_cluster(seen, parity ^ 1);
        if (first_lane()) {
          ptx::st_async_cluster(ptx::mapa(memory_.next_tile(), 1), static_cast<u32>(tile),
                                ptx::mapa(came, 1));
        }
      } else {
        if (first_lane()) ptx::mbarrier_arrive_expect_tx(came, 4);
        ptx::mbarrier_wait(came, parity);
        tile = static_cast<i32>(ptx::ld_shared_u32(memory_.next_tile()));
        __syncwarp();
        if (first_lane()) ptx::mbarrier_arrive_cluster(ptx::mapa(seen, 0));
      }
      return tile;
    }
  }

  /// A tile of keys, one part after the other. Where it has keys of no block, it is one part without queries.
  ATTUNE_DEVICE void produce(const Sm90Work& work) {
    const ForwardParams& p = p_.backward.forward;
    const i32 end = min(work.begin + cluster_keys(S), p.len_k);
    if constexpr (!Schedule::kVarlen) {
      produce_part(work, segment_at<S>(p, work.batch, work.begin, end, 0), 0, true);
    } else {
      const auto count = static_cast<i32>(places<S>(p));
      i32 place = -1;  // none yet
#pragma unroll 1
      do {
        const i32 next = next_place<S>(p, work.begin, end, place + 1);
        const bool ends = next == count;
        if (place >= 0 || ends) {
          produce_part(work, place >= 0 ? segment_at<S>(p, 0, work.begin, end, place) : KeySegment{}, place,
                       ends);
        }
        place = next;
      } while (place < count);
    }
  }

  /// The first queries are loaded before the keys, where these may come later, as they have to wait until the
  /// keys before are done with.
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
        announce_part(block, keys, window, ends);
        load_keys_of(work);
      }
      key_at_.advance();
    };
    if (kKeysFirst || work.steps == 0) load_keys();
    const i32 key_block = work.begin / cluster_keys(S);
    const i32 first = Schedule::first_step(range, key_block, p_.key_blocks);
    i32 m = first;
    // A part without steps may be no block's, of which the tables say nothing. Of pages the watcher looks.
    i32 end_before = 0;
    if (Schedule::kOrdered && S.keys == Keys::contiguous && key_block > 0 && work.steps > 0) {
      end_before = end_of_tile_before(work, place, window);
    }
    const i32 first_head = work.head * p_.sharing;
    Sm90Step step{0, first_head + Schedule::first_sharing_head(key_block, p_.sharing), 0, 0};
    i32 heads_met = 0;
#pragma unroll 1
    for (i32 number = 0; number < work.steps; ++number) {
      step.begin = block.q_begin + m * kQueries;
      step.masked = m < range.clear_first || m >= range.clear_last;
      step.rows = block.len_q - m * kQueries;
      queries_.acquire(query_at_);
      if constexpr (Schedule::kOrdered) {
        const i32 tile = (Schedule::kVarlen ? first_turn_tile(block) : 0) + m;
        const i32 turn = turn_number(work.batch, step.head, tile);
        const i32 before = S.keys == Keys::paged ? place : m < end_before ? key_block : 0;
        announce_turn({turn, before, key_block + 1, number + 1 == work.steps});
      }
      load_queries(step, work.batch);
      if (!kKeysFirst && number == 0) load_keys();
      if constexpr (S.bias != Bias::none && !shares_columns(S)) {
        load_bias(work, step, bias_at_);
        bias_at_.advance();
      }
      load_numbers(step, work.batch);
      // Here last, as room for it comes last: in the places of P and dS, of which each stage has one.
      if constexpr (S.bias != Bias::none && shares_columns(S)) load_bias(work, step, query_at_);
      if constexpr (S.cluster != 0) load_last_panel(step, work.batch);
      query_at_.advance();
      if constexpr (Schedule::kFromLast) {  // all heads at one tile, then at the next (ADR 9)
        if (++step.head == first_head + p_.sharing) step.head = first_head;
        if (++heads_met < p_.sharing) continue;
        heads_met = 0;
        m = Schedule::next_step(range, m);
      } else {
        m = Schedule::next_step(range, m);
        if (m == first) ++step.head;
      }
    }
  }

  /// By the first lane.
  ATTUNE_DEVICE void announce_part(const Block& block, const KeySegment& keys, const Window& window,
                                   bool ends) const {
    if constexpr (Schedule::kUneven) {
      const i32 sums_row = first_sum_row(p_.backward, block) - block.q_begin;
      ptx::st_shared_word4(memory_.part(), {keys.begin, keys.end, ends, sums_row});
    }
    if constexpr (Schedule::kVarlen) {
      const i32 first_key = keys.begin - keys.key;
      const i32 shift = first_key - block.q_begin;
      ptx::st_shared_word4(memory_.window(), {window.lower + shift, window.upper + shift, 0, 0});
      if constexpr (S.dropout == Dropout::on) {
        ptx::st_shared_word4(memory_.sequence(), {block.index, block.q_begin, first_key, 0});
      }
    }
  }

  /// The tile of keys before adds to tiles of queries below this one; to all of them that this tile of keys
  /// meets, too, as it begins no later.
  ATTUNE_DEVICE i32 end_of_tile_before(const Sm90Work& work, i32 place, const Window& window) const {
    const i32 begin = work.begin - cluster_keys(S);
    const KeySegment tile = segment_at<S>(p_.backward.forward, work.batch, begin, work.begin, place);
    return Schedule::steps(seen_part<S>(tile, window), window).last;
  }

  ATTUNE_DEVICE i32 turn_number(i32 batch, i32 head, i32 tile) const {
    return ((batch * p_.heads * p_.sharing + head) * turn_tiles(p_.backward.forward) + tile) * kTurnParts;
  }
  ATTUNE_DEVICE void announce_turn(const Sm90Turn& turn) const {
    if (!first_lane()) return;
    ptx::st_shared_word4(memory_.turn(query_at_), {turn.number, turn.before, turn.mine, turn.ends});
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
    const u32 full = keys_.full(key_at_);
    const i32 rank = cluster_rank<S>();
    ptx::BoxOrigin origin{0, work.begin + rank * kKeys, work.head / p_.heads_per_key_head, work.batch};
    ptx::st_shared_word4(memory_.work(), {origin.row, work.head, work.batch, work.steps});
    ptx::mbarrier_arrive_expect_tx(full, Memory::KeyRing::kBytes);
    load_panels<kPanels, kKeys>(memory_.key_tile(), p_.key, full, origin, ptx::kEvictFirst);
    load_panels<kPanels, kKeys>(memory_.value_tile(), p_.value, full, origin, ptx::kEvictFirst);
    if constexpr (S.cluster != 0) {  // half of the columns of the other block's keys
      origin.row = work.begin + (1 - rank) * kKeys;
#pragma unroll
      for (i32 panel = 0; panel < kPanels / 2; ++panel) {
        origin.column = (rank * kPanels / 2 + panel) * Sm90Shared::kPanelElements;
        ptx::cp_async_bulk_tensor_load(memory_.other_key_tile() + panel * kPanelBytes<kKeys>, p_.key, full,
                                       origin, ptx::kEvictFirst);
      }
    }
  }

  ATTUNE_DEVICE void load_queries(const Sm90Step& step, i32 batch) const {
    if (!first_lane()) return;
    const u32 full = queries_.full(query_at_);
    const ptx::BoxOrigin origin{0, step.begin, step.head, batch};
    ptx::st_shared_word4(memory_.step(query_at_), {step.begin, step.head, step.masked, step.rows});
    ptx::mbarrier_arrive_expect_tx(full, Memory::kShared.stage_bytes);
    load_panels<kPanels, kQueries>(memory_.query_tile(query_at_), p_.query, full, origin, ptx::kEvictLast);
    load_panels<kPanels - S.cluster, kQueries>(memory_.grad_output_tile(query_at_), p_.grad_output, full,
                                               origin, ptx::kEvictLast);
  }

  /// Of output gradients, behind those of the tile before.
  ATTUNE_DEVICE void load_last_panel(const Sm90Step& step, i32 batch) {
    last_panels_.acquire(last_at_);
    if (first_lane()) {
      const u32 full = last_panels_.full(last_at_);
      ptx::mbarrier_arrive_expect_tx(full, Memory::LastPanelRing::kBytes);
      ptx::cp_async_bulk_tensor_load(
          last_panels_.tile(last_at_), p_.grad_output, full,
          {(kPanels - 1) * Sm90Shared::kPanelElements, step.begin, step.head, batch}, ptx::kEvictLast);
    }
    last_at_.advance();
  }

  ATTUNE_DEVICE void load_bias(const Sm90Work& work, const Sm90Step& step,
                               const typename Memory::BiasRing::Cursor& at) const {
    using Tile = KeyRowBiasTile<S>;
    biases_.acquire(at);
    if (first_lane()) {
      const u32 full = biases_.full(at);
      ptx::BoxOrigin origin{work.begin, p_.bias_rows == 1 ? 0 : step.begin,
                            step.head / p_.heads_per_bias_head, work.batch * p_.bias_batches};
      ptx::mbarrier_arrive_expect_tx(full, Tile::kPanels * p_.bias_rows * Tile::kRowBytes);
#pragma unroll 1
      for (i32 panel = 0; panel < Tile::kPanels; ++panel) {
        ptx::cp_async_bulk_tensor_load(biases_.tile(at) + panel * Tile::kPanelBytes, p_.bias, full, origin,
                                       ptx::kEvictFirst);
        origin.column += Tile::kPanelKeys;
      }
    }
  }

  /// The numbers of a tile's queries, for scaled probabilities. Past the end their LSE is +inf, which makes
  /// every probability 0.
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
      ptx::st_shared_float(numbers + i * 128, lse2[i] - kProbabilityBits<S>);
      ptx::st_shared_float(numbers + kQueries * 4 + i * 128, delta[i] / kProbabilityScale<S>);
    }
    if constexpr (Schedule::kVarlen) announce_void_queries(lse2, step.rows);
    __syncwarp();
    if (first_lane()) ptx::mbarrier_arrive(queries_.full(query_at_));
  }

  /// Of those that the block has. Last of all: else loads would wait for the comparisons.
  template <i32 Rounds>
  ATTUNE_DEVICE void announce_void_queries(const float (&lse2)[Rounds], i32 rows) const {
    bool has_void = false;
#pragma unroll
    for (i32 i = 0; i < Rounds; ++i) has_void |= i * 32 + lane() < rows && is_void(lse2[i]);
    if (__any_sync(0xffffffffu, has_void) && first_lane()) {
      ptx::st_shared_b32(memory_.step(query_at_) + Sm90Step::kMaskedOffset, kVoidQueries);
    }
  }

  const GradKeyValueSm90Params& p_;
  const Memory memory_;
  const typename Memory::KeyRing keys_;
  const typename Memory::QueryRing queries_;
  const typename Memory::BiasRing biases_;
  const typename Memory::LastPanelRing last_panels_;
  typename Memory::KeyRing::Cursor key_at_{1};
  typename Memory::QueryCursor query_at_{1};
  typename Memory::BiasRing::Cursor bias_at_{1};
  typename Memory::LastPanelRing::Cursor last_at_{1};
};

}  // namespace attune::kernel
