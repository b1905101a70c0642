// The producer of forward_sm90.cuh: one thread, which talks to the copy engine, or a warp where keys are
// pages.
#pragma once

#include "attune/blocks.h"
#include "attune/cuda/forward_sm90_tiles.cuh"
#include "attune/cuda/panels.cuh"
#include "attune/cuda/score_bias.cuh"

namespace attune::kernel {

template <KernelSpec S>
class Sm90Producer {
  using Memory = Sm90Memory<S>;
  using Schedule = Sm90Schedule<S>;
  static constexpr i32 kGroups = S.block_m / kGroupRows;
  static constexpr i32 kBiasRowBytes = S.block_n * size_of(S.bias);

 public:
  static constexpr i32 kLanes = S.keys == Keys::paged ? 32 : 1;  // one thread, or a warp

  ATTUNE_DEVICE Sm90Producer(const ForwardSm90Params& params, Memory memory)
      : p_(params), memory_(memory), keys_(memory.keys()), values_(memory.values()) {}

  ATTUNE_DEVICE void run() {
#pragma unroll 1
    for (i32 tile = static_cast<i32>(blockIdx.x); tile < p_.tiles;) {
      const Slot slot = Schedule::slot(tile, p_);
      if (leads()) tile = Schedule::next(tile, p_);
      if constexpr (kLanes > 1) tile = __shfl_sync(0xffffffffu, tile, 0);
      if (slot.begin < slot.end) produce(slot);  // a varlen problem has more slots than tiles
    }
#pragma unroll 1
    for (u32 group = 0; group < kGroups; ++group) {
      const auto queries = memory_.queries(group);
      queries.acquire(query_at_);
      if (!leads()) continue;
      ptx::st_shared_word4(memory_.work(group, query_at_.stage), {0, 0, 0, -1});
      ptx::mbarrier_arrive(queries.full(query_at_));
    }
  }

 private:
  /// The others of a producer that is a whole warp look up pages and copy their boxes, and nothing else.
  static ATTUNE_DEVICE bool leads() {
    return kLanes == 1 || threadIdx.x == 0;
  }

  /// Keys run one tile ahead of values, as they are needed.
  ATTUNE_DEVICE void produce(const Slot& slot) {
    const Block& block = slot.block;
    const i32 end = Schedule::visited(p_, block, slot.begin).end;
    const Sm90Work work{slot.begin, slot.group * p_.forward.heads + slot.head, block.index,
                        ceil_div(max(end, 0), S.block_n)};
    const i32 first = Schedule::first_of(p_, block, work);
    const i32 key_head = work.head / p_.heads_per_key_head;
    const auto load_key = [&](i32 n, i32 row) {
      load_rows<Memory::kShared.panels>(keys_, key_at_, p_.key, block, n, row, key_head,
                                        p_.bias_rows * kBiasRowBytes);
      if constexpr (S.bias != Bias::none) load_bias(work, block, block.k_begin + n * S.block_n);
      key_at_.advance();
    };
    const auto load_value = [&](i32 n, i32 row) {
      load_rows<Memory::kShared.panels_v>(values_, value_at_, p_.value, block, n, row, key_head, 0);
      value_at_.advance();
    };
    if (first >= work.last) {
      load_queries(work, block);
      return;
    }
    i32 row = row_of(block, work.last - 1);
    load_key(work.last - 1, row);
    load_queries(work, block);
#pragma unroll 1
    for (i32 n = work.last - 1; n > first; --n) {
      const i32 next = row_of(block, n - 1);
      load_key(n - 1, next);
      load_value(n, row);
      row = next;
    }
    load_value(first, row);
  }

  /// The row of keys where this lane's copies of tile n begin: the tile, or a box of a page.
  ATTUNE_DEVICE i32 row_of(const Block& block, i32 n) const {
    if constexpr (S.keys == Keys::contiguous) return block.k_begin + n * S.block_n;
    const i32 key = n * S.block_n + static_cast<i32>(threadIdx.x) * p_.key_box_rows;
    return key_row<S>(p_.forward, block, min(key, block.len_k - 1));
  }

  /// Tile n of a block's keys or values, as soon as there is room. `more` bytes of other copies complete with
  /// it. Of pages as far as there are keys: the table may say nothing of those after.
  template <i32 Panels, typename Ring>
  ATTUNE_DEVICE void load_rows(const Ring& ring, const typename Ring::Cursor& at, const TensorMap& map,
                               const Block& block, i32 n, i32 row, i32 head, u32 more) const {
    ring.acquire(at);
    if constexpr (S.keys == Keys::contiguous) {
      ptx::mbarrier_arrive_expect_tx(ring.full(at), Panels * kPanelBytes<S.block_n> + more);
      load_panels<Panels, S.block_n>(ring.tile(at), map, ring.full(at), {0, row, head, block.batch},
                                     ptx::kEvictLast);
    } else {
      const i32 boxes = ceil_div(min(block.len_k - n * S.block_n, S.block_n), p_.key_box_rows);
      const i32 box = static_cast<i32>(threadIdx.x);
      if (box == 0) {
        ptx::mbarrier_arrive_expect_tx(ring.full(at), boxes * p_.key_box_rows * kPanelBytes<Panels>);
      }
      if (box < boxes) {
        const u32 tile = ring.tile(at) + box * p_.key_box_rows * Sm90Shared::kPanelRowBytes;
        load_panels<Panels, S.block_n>(tile, map, ring.full(at), {0, row, head, block.batch},
                                       ptx::kEvictLast);
      }
      __syncwarp();
    }
  }

  ATTUNE_DEVICE void load_queries(const Sm90Work& work, const Block& block) {
#pragma unroll 1
    for (u32 group = 0; group < kGroups; ++group) {
      const auto queries = memory_.queries(group);
      queries.acquire(query_at_);
      if (!leads()) continue;
      ptx::st_shared_word4(memory_.work(group, query_at_.stage),
                           {work.begin, work.head, work.block, work.last});
      const i32 row = block.q_begin + work.begin + static_cast<i32>(group) * kGroupRows;
      const u32 full = queries.full(query_at_);
      ptx::mbarrier_arrive_expect_tx(full, Memory::kShared.panels * kPanelBytes<kGroupRows>);
      load_panels<Memory::kShared.panels, kGroupRows>(queries.tile(query_at_), p_.query, full,
                                                      {0, row, work.head, block.batch}, ptx::kEvictFirst);
    }
    query_at_.advance();
  }

  /// The bias of all warpgroups' queries and the keys from this one on.
  ATTUNE_DEVICE void load_bias(const Sm90Work& work, const Block& block, i32 key) const {
    using Tile = BiasTile<S>;
    const u32 tile = keys_.tile(key_at_) + Memory::kShared.key_bytes;
    const i32 row = p_.bias_rows == 1 ? 0 : work.begin;
#pragma unroll
    for (i32 panel = 0; panel < Tile::kPanels; ++panel) {
      ptx::cp_async_bulk_tensor_load(tile + panel * Tile::kPanelBytes, p_.bias, keys_.full(key_at_),
                                     {key + panel * Tile::kPanelKeys, row, work.head / p_.heads_per_bias_head,
                                      block.batch * p_.bias_batches},
                                     ptx::kEvictFirst);
    }
  }

  const ForwardSm90Params& p_;
  const Memory memory_;
  const typename Memory::KeyRing keys_;
  const typename Memory::ValueRing values_;
  typename Memory::KeyRing::Cursor key_at_{1}, value_at_{1};
  typename Memory::QueryRing::Cursor query_at_{1};
};

}  // namespace attune::kernel
