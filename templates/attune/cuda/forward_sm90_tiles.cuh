// What the warps of forward_sm90.cuh have in common: shared memory, what they tell each other there of tiles,
// and the order of the tiles.
#pragma once

#include "attune/blocks.h"
#include "attune/cuda/panels.cuh"
#include "attune/cuda/pipeline.cuh"
#include "attune/cuda/ptx_sm90.cuh"
#include "attune/cuda/shared.h"
#include "attune/cuda/tile.cuh"
#include "attune/hd.h"
#include "attune/params.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

inline constexpr i32 kGroupRows = Sm90Shared::kGroupRows;

/// Where things lie in shared memory.
template <KernelSpec S>
struct Sm90Memory {
  static constexpr Sm90Shared kShared{S};
  using KeyRing = Ring<S.stages, kShared.key_bytes + kShared.bias_bytes>;
  using ValueRing = Ring<S.stages, kShared.value_bytes>;
  using QueryRing = Ring<S.query_stages, kShared.query_bytes>;

  u32 base;

  ATTUNE_DEVICE ValueRing values() const { return {base, base + kShared.barrier_offset}; }
  ATTUNE_DEVICE KeyRing keys() const {
    return {base + kShared.key_offset, base + kShared.barrier_offset + ValueRing::kBarrierBytes};
  }
  ATTUNE_DEVICE QueryRing queries(u32 group) const {
    return {base + kShared.query_offset + group * QueryRing::kBytes,
            base + kShared.barrier_offset + 2 * KeyRing::kBarrierBytes + group * QueryRing::kBarrierBytes};
  }
  /// The work item that comes with the queries of a stage.
  ATTUNE_DEVICE u32 work(u32 group, u32 stage) const {
    return base + kShared.work_offset + (group * S.query_stages + stage) * 16;
  }
};

/// What a tile of queries needs: its first query and its head, counted over all groups; its block; and the
/// end of its tiles of keys.
struct Sm90Work {
  i32 begin;
  i32 head;
  i32 block;
  i32 last;  // negative: no more work
};

/// Tiles in the order in which blocks take them. Dense ones without a window are all alike, and each block
/// takes every gridDim.x-th. The others are uneven: blocks take the next one when they are free, by a counter
/// that wraps to 0 with the last tile. Under a window the longest come first, within sections of heads whose
/// keys and values fit the L2 cache. A launch without a counter strides, and every other section runs from
/// the short tiles to the long ones, so that nobody gets the long ones only.
template <KernelSpec S>
struct Sm90Schedule {
  static constexpr bool kWindow = S.window_left == Edge::bounded || S.window_right == Edge::bounded;
  static constexpr bool kUneven = kWindow || S.blocks == Blocks::varlen;

  static ATTUNE_DEVICE i32 next(i32 tile, const ForwardSm90Params& p) {
    const i32 blocks = static_cast<i32>(gridDim.x);
    if (!kUneven || p.counter == nullptr) return tile + blocks;
    return blocks + static_cast<i32>(ptx::atom_inc(p.counter, static_cast<u32>(p.tiles - 1)));
  }

  /// The queries [begin, end) of the tile, one head and block.
  static ATTUNE_DEVICE Slot slot(i32 tile, const ForwardSm90Params& p) {
    if constexpr (!kWindow || S.blocks == Blocks::varlen) {
      return slot_of<S>(p.forward, static_cast<u32>(tile));
    } else {
      const i32 section = tile / (p.section * p.row_blocks);
      const i32 first = section * p.section;
      const i32 width = min(p.section, p.pairs - first);
      const i32 rest = tile - first * p.row_blocks;
      const i32 pair = first + rest % width;
      const bool rising = p.counter == nullptr && section % 2 == 1;
      const i32 row_block = rising ? rest / width : p.row_blocks - 1 - rest / width;
      Slot found;
      found.block = block_of<S>(p.forward, pair / p.heads);
      found.head = pair % p.heads;  // of all groups, and group 0
      found.begin = row_block * S.block_m;
      found.end = min(found.begin + S.block_m, p.forward.len_q);
      return found;
    }
  }

  /// The keys that some query of the tile sees.
  static ATTUNE_DEVICE KeyRange visited(const ForwardSm90Params& p, const Block& block, i32 begin) {
    return visited_keys<S>(window_of_block<S>(p.forward, block), block.len_k, begin,
                           min(begin + S.block_m, block.len_q));
  }
  /// Their first tile; `last` where there is none.
  static ATTUNE_DEVICE i32 first_of(const ForwardSm90Params& p, const Block& block, const Sm90Work& work) {
    if constexpr (S.window_left == Edge::open) return 0;
    return min(visited(p, block, work.begin).begin / S.block_n, work.last);
  }
};

}  // namespace attune::kernel
