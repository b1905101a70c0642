// Warps of grad_key_value_sm90.cuh that wait for memory and for other blocks, so that those that multiply do
// not: they add the sums of the query's gradient, and see to it that tiles of keys do that in turn.
#pragma once

#include "attune/cuda/grad_key_value_sm90_tiles.cuh"

namespace attune::kernel {

/// The number in memory that says who has added to a part of a tile's sums (query_turns() in backward.h).
ATTUNE_DEVICE u32* turn_of(const GradKeyValueSm90Params& p, i32 number) {
  return p.backward.turns + 1 + static_cast<u32>(number);
}

/// Lets the next tile of keys add. Where a table is wrong other sequences may add here, too: a turn never
/// goes back, so that nobody waits for ever.
template <KernelSpec S>
ATTUNE_DEVICE void pass_turn_on(u32* turn, i32 mine) {
  if constexpr (S.keys == Keys::paged) {
    ptx::red_release_add(turn, 1);
  } else {
    ptx::red_release_max(turn, static_cast<u32>(mine));
  }
}

/// Have all who are to add before this one? More is as good.
ATTUNE_DEVICE bool allows(u32 turn, i32 before) {
  return static_cast<i32>(turn) >= before;
}

/// The parts that a block adds: each block of a cluster has one.
template <KernelSpec S>
inline constexpr u32 kOwnParts = kTurnParts / cluster_blocks(S);
template <KernelSpec S>
ATTUNE_DEVICE u32 first_part() {
  return static_cast<u32>(cluster_rank<S>());
}

/// Waits for the turn of the next step, and lets its stage go. By a whole warp.
template <KernelSpec S>
ATTUNE_DEVICE Sm90Turn next_turn(Sm90Memory<S> memory, typename Sm90Memory<S>::QueryCursor& at) {
  const auto queries = memory.queries();
  queries.wait(at);
  const Sm90Turn turn = turn_at<S>(memory, at);
  __syncwarp();
  if (threadIdx.x % 32 == 0) queries.release(at);
  at.advance();
  return turn;
}

/// Sees to it that the tile of keys before has added before this one does: ahead of the step where it can.
template <KernelSpec S>
class Sm90Watcher {
 public:
  ATTUNE_DEVICE Sm90Watcher(const GradKeyValueSm90Params& params, Sm90Memory<S> memory)
      : p_(params), memory_(memory) {}

  ATTUNE_DEVICE void run() {
    typename Sm90Memory<S>::QueryCursor at(0);
    u32 allowed = 0;
    while (true) {
      const Sm90Turn turn = next_turn<S>(memory_, at);
      if (turn.mine == 0) return;
      const i32 before = S.keys == Keys::paged ? count_before(turn) : turn.before;
      // Halves of wide heads' columns are added one after the other, else both parts at once.
      for (u32 part = 0; part < (shares_columns(S) ? kOwnParts<S> : 1); ++part) {
        const u32* last =
            turn_of(p_, turn.number) + (shares_columns(S) ? first_part<S>() + part : lane() % kTurnParts);
        while (!__all_sync(0xffffffffu, allows(ptx::ld_acquire(last), before))) {}
        __syncwarp();
        if (lane() == 0) ptx::st_shared_release(memory_.allowed(), ++allowed);
      }
    }
  }

 private:
  static ATTUNE_DEVICE u32 lane() { return threadIdx.x % 32; }

  /// Of paged keys: the parts that add before, over all places of the sequence.
  ATTUNE_DEVICE i32 count_before(const Sm90Turn& turn) const {
    const ForwardParams& p = p_.backward.forward;
    const Sequences& s = p.sequences;
    const i32 sequence = turn.before / s.table_width;
    const KeyRange seen = keys_seen_by_tile<S>(p, sequence, turn.row);
    const i32 own_column = turn.before - sequence * s.table_width;
    const i32 last_column = divide(seen.end - 1, s.page_size);  // there are keys: some of the part's are seen
    i32 count = 0;
#pragma unroll 1
    for (i32 column = divide(seen.begin, s.page_size) + static_cast<i32>(lane()); column <= last_column;
         column += 32) {
      const i32 tiles = column < own_column ? turn.mine : turn.mine - 1;
      const i32 end = min(tiles * S.block_n, p.len_k);
      count += parts_before<S>(p, seen, turn.before + column - own_column, column, end);
    }
    return __reduce_add_sync(0xffffffffu, count);
  }

  const GradKeyValueSm90Params& p_;
  const Sm90Memory<S> memory_;
};

/// Waits until so many steps, or parts of theirs, may be added to the sums.
template <KernelSpec S>
ATTUNE_DEVICE void await_turn(Sm90Memory<S> memory, u32 count) {
  while (static_cast<i32>(ptx::ld_shared_acquire(memory.allowed()) - count) < 0) {}
}

/// A warp that lets the next tile of keys add, once all that this one has is there for all to see.
template <KernelSpec S>
class Sm90TurnPasser {
 public:
  ATTUNE_DEVICE Sm90TurnPasser(const GradKeyValueSm90Params& params, Sm90Memory<S> memory)
      : p_(params), memory_(memory) {}

  ATTUNE_DEVICE void run() {
    typename Sm90Memory<S>::QueryCursor at(0);
    u32 parts = 0;
    Sm90Turn turn = next_turn<S>(memory_, at);
    while (turn.mine != 0) {
      Sm90Turn next{};
      for (u32 part = 0; part < kOwnParts<S>; ++part, ++parts) {
        ptx::mbarrier_wait(memory_.added(parts), parts / GradKeyValueSm90Shared::added_barriers(S) % 2);
        // Consumers have come to the next step: its stage is not to wait until memory has these sums.
        if (part == 0 && turn.ends == 0) next = next_turn<S>(memory_, at);
        if (lane() == 0) pass_turn_on<S>(turn_of(p_, turn.number) + first_part<S>() + part, turn.mine);
      }
      turn = turn.ends == 0 ? next : next_turn<S>(memory_, at);
    }
  }

 private:
  static ATTUNE_DEVICE u32 lane() { return threadIdx.x % 32; }

  const GradKeyValueSm90Params& p_;
  const Sm90Memory<S> memory_;
};

/// Has the copy engine add the sums that a warpgroup has staged.
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
    if (lane() == 0) pass_turn_on<S>(turn_of(p_, turn) + group_, mine);
  }

  const GradKeyValueSm90Params& p_;
  const Sm90Memory<S> memory_;
  const u32 group_;
};

}  // namespace attune::kernel
