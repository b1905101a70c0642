// Forward on Hopper: products of warpgroups (wgmma), tiles by the tensor copy engine, warp-specialised.
//
// A block stays on its SM and takes one tile of queries after the other. One warp of it, the producer, copies
// queries, keys and values into rings in shared memory; 2, 3 or 4 warpgroups of 128 threads compute 64 query
// rows each and share the keys and values:
//
//                 keys  | K n-1 | K n |      ring of `stages`         from right to left: the masked
//   queries       values| V n   | V n-1 |    ring of `stages`         tiles of a causal window come first
//   +--------+
//   | 64 x D |    warpgroup 0:  S_n = Q K_n^T   softmax(S_n) -> P_n   O += P_n V_n
//   | 64 x D |    warpgroup 1
//   +--------+    ring of `query_stages` for each; its output leaves through the same bytes
//
// The loop issues S_n = Q K_n^T and O += P_n+1 V_n+1 together and does the softmax of S_n under the latter
// (Shah et al., FlashAttention-3, arXiv 2407.08608).
//
// The softmax is blind: softmax(s) is the same relative to any reference, not only to the maximum, until
// something overflows. So only masked tiles and the first look for a maximum; later ones are exponentiated
// relative to the reference as it stands, and what overflows shows in the sums, which exist anyway. A
// warpgroup that sees its bet lost (a sum beyond kSumLimit) multiplies the tile again, which is still there,
// and takes it, and the next kWary, the exact way.
//
// A tile of a bias tensor comes with its tile of keys, on the same barrier, and is let go with it.
//
// What dropout drops depends on no score: of two warpgroups each draws before it issues products, and keeps
// masks for its packed probabilities. Of three it would keep the others waiting: they draw after the softmax.
//
// Registers of one thread, by warpgroups:    producer  consumer    S + P + O of the widest tile
//   2 (block_m 128)                            24        240       head dim 128 x 128 keys: 64 + 32 + 64
//   2, uneven tiles or a bias                  40        232       head dim 256 x  64 keys: 32 + 16 + 128
//   3 (block_m 192)                            32        160       head dim  64 x 128 keys: 64 + 32 + 32
//   3, a bias, dropout of uneven tiles         56        152       head dim 128 x  64 keys: 32 + 16 + 64
//   4 (block_m 256)                            24        112       head dim  64 x  64 keys: 32 + 16 + 32
#pragma once

#include "attune/blocks.h"
#include "attune/cuda/dropout.cuh"
#include "attune/cuda/panels.cuh"
#include "attune/cuda/pipeline.cuh"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/ptx_sm90.cuh"
#include "attune/cuda/ptx_wgmma.cuh"
#include "attune/cuda/score_bias.cuh"
#include "attune/cuda/shared.h"
#include "attune/cuda/tile.cuh"
#include "attune/cuda/warpgroup.cuh"
#include "attune/num.h"
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

// ---- The producer ----

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

// ---- A consumer warpgroup ----

template <KernelSpec S>
class Sm90Consumer : WarpgroupThread {
  using Memory = Sm90Memory<S>;
  using Schedule = Sm90Schedule<S>;
  static constexpr i32 kGroups = S.block_m / kGroupRows;
  static constexpr i32 kDimSteps = ceil_div(S.head_dim, 16);  // k16 steps of Q K^T
  static constexpr i32 kDimV = round_up(S.head_dim_v, 16);    // columns of O
  static constexpr i32 kKeys = S.block_n;
  static constexpr i32 kCalls = S.dropout == Dropout::on ? kKeys / kDropoutGroup : 1;  // of Philox for a row
  static constexpr bool kDrawsFirst = S.dropout == Dropout::on && kGroups == 2;
  static constexpr bool kVarlen = S.blocks == Blocks::varlen;
  static constexpr bool kPingPong = S.ping_pong != 0 && kGroups > 1;
  static constexpr bool kQueryRegisters = S.query_registers != 0;
  static constexpr bool kStaged = S.output_dtype == S.dtype;
  static constexpr bool kAdditive = S.bias != Bias::none && S.bias != Bias::boolean;
  static constexpr float kSumLimit = 1024.0f;            // of a thread's share of a row in one tile
  static constexpr i32 kWary = 16;                       // tiles taken the exact way after a lost bet
  enum NamedBarrier : u32 { kTurn = 1, kEpilogue = 5 };  // of each warpgroup; 0 is __syncthreads

  using Scores = float[kKeys / 2];  // element e: row half e / 2 % 2, columns e / 4 * 8 + e % 2

 public:
  ATTUNE_DEVICE Sm90Consumer(const ForwardSm90Params& params, Memory memory, u32 group)
      : p_(params),
        memory_(memory),
        keys_(memory.keys()),
        values_(memory.values()),
        queries_(memory.queries(group)),
        group_(group) {}

  ATTUNE_DEVICE void run() {
    if (kPingPong && group_ == kGroups - 1) pass_turn();
#pragma unroll 1
    while (true) {
      queries_.wait(query_at_);
      const Sm90Work work = current_work();
      if (work.last < 0) break;
      attend(work);
      finish(current_work());  // read anew: kept through the loop it would occupy registers
      query_at_.advance();
    }
  }

 private:
  ATTUNE_DEVICE Sm90Work current_work() const {
    const ptx::Word4 word = ptx::ld_shared_word4(memory_.work(group_, query_at_.stage));
    return {word.x, word.y, word.z, word.w};
  }

  // Of the block: a launch parameter where all blocks are alike.
  ATTUNE_DEVICE Window window() const {
    if constexpr (kVarlen) return window_;
    return p_.forward.window;
  }
  ATTUNE_DEVICE i32 len_k() const {
    if constexpr (kVarlen) return len_k_;
    return p_.forward.len_k;
  }

  // ---- Turns: one warpgroup issues its products while the others do their softmax ----

  ATTUNE_DEVICE void await_turn() const {
    if constexpr (kPingPong) ptx::bar_sync(kTurn + group_, 2 * kWarpgroup);
  }
  ATTUNE_DEVICE void pass_turn() const {
    if constexpr (kPingPong)
      ptx::bar_arrive(kTurn + (group_ + 1 == kGroups ? 0 : group_ + 1), 2 * kWarpgroup);
  }

  // ---- One tile of queries ----

  ATTUNE_DEVICE void attend(const Sm90Work& work) {
    const Block block = block_of<S>(p_.forward, work.block);
    const i32 first_row = work.begin + static_cast<i32>(group_) * kGroupRows;
    const i32 end_row = min(first_row + kGroupRows, block.len_q);
    row_ = first_row + static_cast<i32>(thread() / 32 * 16 + lane() / 4);
    if constexpr (kVarlen) {
      len_k_ = block.len_k;
      window_ = window_of_block<S>(p_.forward, block);
    }
    // The block's tiles [first, last), this warpgroup's own [own_first, own_last), and those that need no
    // mask.
    const i32 first = Schedule::first_of(p_, block, work);
    const KeyRange own = visited_keys<S>(window(), len_k(), first_row, end_row);
    const KeyRange clear = unmasked_keys<S>(window(), len_k(), first_row, end_row);
    const bool sees = first_row < end_row && own.begin < own.end;
    const i32 own_first = S.window_left == Edge::open || !sees ? first : max(first, own.begin / kKeys);
    const i32 own_last = sees ? min(work.last, ceil_div(own.end, kKeys)) : first;
    const i32 clear_last = max(clear.end, 0) / kKeys;
    const i32 clear_first = S.window_left == Edge::open ? 0 : ceil_div(max(clear.begin, 0), kKeys);

    clear_rows();
    if constexpr (kQueryRegisters) load_query();
    i32 n = work.last - 1;
#pragma unroll 1
    for (; n >= own_last; --n) skip(n > first);
    if (own_first < own_last) {
      if constexpr (kVarlen) foreign_keys_ = max((n + 1) * kKeys - len_k(), 0);
      if constexpr (kDrawsFirst) draw(n * kKeys);
      keys_.wait(key_at_);
      multiply_query_key();
      ptx::wgmma_wait_group<0>();
      ptx::pin(scores_);
      probabilities(n, n < clear_first || n >= clear_last, true);
      pack_probabilities();
      i32 trust = clear_last;  // tiles from here on are taken the exact way
#pragma unroll 1
      for (--n; n >= own_first; --n) {
        const bool masked = n < clear_first || n >= clear_last;
        const bool exact = masked || n >= trust;
        if (step(n, masked, exact) && !exact) trust = n - kWary;
      }
      await_value();
      multiply_probability_value();
      finish_value();
    }
    if constexpr (S.window_left == Edge::bounded) {
#pragma unroll 1
      for (; n >= first; --n) skip(true);
    }
  }

  /// A tile that this warpgroup has no use for. Every warpgroup takes as many turns as there are tiles, less
  /// one.
  ATTUNE_DEVICE void skip(bool takes_turn) {
    keys_.wait(key_at_);
    release_key();
    values_.wait(value_at_);
    release_value();
    if (takes_turn) {
      await_turn();
      pass_turn();
    }
  }

  /// S_n = Q K_n^T and O += P_n+1 V_n+1, the softmax of S_n under the latter. Was O rescaled?
  ATTUNE_DEVICE bool step(i32 n, bool masked, bool exact) {
    if constexpr (kDrawsFirst) draw(n * kKeys);
    keys_.wait(key_at_);
    await_turn();
    multiply_query_key();
    await_value();
    multiply_probability_value();
    pass_turn();
    ptx::wgmma_wait_group<1>();
    ptx::pin(scores_);
    const bool moved = probabilities(n, masked, exact);
    finish_value();
    pack_probabilities();
    if (moved) rescale_output();
    return moved;
  }

  /// The last keys of a tile may belong to another sequence. Their weights are 0, but 0 times NaN is not:
  /// their values become 0.
  ATTUNE_DEVICE void await_value() {
    values_.wait(value_at_);
    if constexpr (kVarlen) {
      if (foreign_keys_ > 0) clear_foreign_values();
      foreign_keys_ = 0;
    }
  }

  ATTUNE_DEVICE void clear_foreign_values() const {
    constexpr i32 kRowChunks = Sm90Shared::kPanelRowBytes / 16;
    const i32 chunks = foreign_keys_ * kRowChunks;
#pragma unroll 1
    for (i32 panel = 0; panel < Memory::kShared.panels_v; ++panel) {
      const u32 end = values_.tile(value_at_) + (panel + 1) * kKeys * Sm90Shared::kPanelRowBytes;
#pragma unroll 1
      for (i32 chunk = static_cast<i32>(thread()); chunk < chunks; chunk += kWarpgroup) {
        ptx::st_shared_word4(end - (chunk + 1) * 16, {0, 0, 0, 0});
      }
    }
    ptx::fence_proxy_async();
    ptx::bar_sync(kEpilogue + group_, kWarpgroup);
  }

  ATTUNE_DEVICE void release_key() {
    if (elected()) keys_.release(key_at_);
    key_at_.advance();
  }
  ATTUNE_DEVICE void release_value() {
    if (elected()) values_.release(value_at_);
    value_at_.advance();
  }
  /// Waits for O += P V and lets the values go.
  ATTUNE_DEVICE void finish_value() {
    ptx::wgmma_wait_group<0>();
    ptx::pin(output_);
    release_value();
  }

  ATTUNE_DEVICE void clear_rows() {
#pragma unroll
    for (i32 e = 0; e < kDimV / 2; ++e) output_[e] = 0.0f;
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
      reference_[half] = neg_inf();
      sum_[half] = 0.0f;
      factor_[half] = 1.0f;
    }
  }

  /// This warpgroup's queries as operands in registers.
  ATTUNE_DEVICE void load_query() {
    const u32 row = thread() / 32 * 16 + lane() % 16;
#pragma unroll
    for (i32 k = 0; k < kDimSteps; ++k) {
      u32(&fragment)[4] = query_[k];
      ptx::ldmatrix_x4(fragment, queries_.tile(query_at_) +
                                     panel_offset<kGroupRows>(row, k * 2 + static_cast<i32>(lane() / 16)));
    }
  }

  /// S = Q K^T; asynchronous.
  ATTUNE_DEVICE void multiply_query_key() {
    const u64 key = ptx::wgmma_descriptor(keys_.tile(key_at_));
    const u64 query = ptx::wgmma_descriptor(queries_.tile(query_at_));
    ptx::pin(scores_);
    ptx::wgmma_fence();
#pragma unroll
    for (i32 k = 0; k < kDimSteps; ++k) {
      const u64 key_k = key + static_cast<u64>(k / 4 * (kKeys * 128 >> 4) + k % 4 * 2);
      if constexpr (kQueryRegisters) {
        ptx::Wgmma<kKeys>::template multiply<S.dtype, ptx::Major::k>(scores_, query_[k], key_k, k > 0);
      } else {
        const u64 query_k = query + static_cast<u64>(k / 4 * (kGroupRows * 128 >> 4) + k % 4 * 2);
        ptx::Wgmma<kKeys>::template multiply<S.dtype>(scores_, query_k, key_k, k > 0);
      }
    }
    ptx::wgmma_commit_group();
  }

  /// O += P V; asynchronous.
  ATTUNE_DEVICE void multiply_probability_value() {
    const u64 value = ptx::wgmma_descriptor(values_.tile(value_at_), kKeys * 128);
    ptx::pin(output_);
    ptx::wgmma_fence();
#pragma unroll
    for (i32 k = 0; k < kKeys / 16; ++k) {
      ptx::Wgmma<kDimV>::template multiply<S.dtype, ptx::Major::mn>(
          output_, probability_[k], value + static_cast<u64>(k * (16 * 128 >> 4)), true);
    }
    ptx::wgmma_commit_group();
  }

  // ---- Softmax ----

  /// Scores of tile n become probabilities; the key tile is let go where both ways have met: in between it
  /// would cost registers. Does O owe a rescale?
  ATTUNE_DEVICE bool probabilities(i32 n, bool masked, bool exact) {
    complete_scores();
    if (!exact && bet_is_lost()) {
      exact = true;
      multiply_query_key();
      ptx::wgmma_wait_group<0>();
      ptx::pin(scores_);
      complete_scores();
    }
    if (exact) {
      // As the bet's vote does: every warp has read the bias, which goes with the keys.
      if constexpr (S.bias != Bias::none) ptx::bar_sync(kEpilogue + group_, kWarpgroup);
      if (masked) hide_invisible(n * kKeys);
      exponentiate();
    }
    release_key();
    if constexpr (S.dropout == Dropout::on && !kDrawsFirst) draw(n * kKeys);
    return exact;
  }

  /// Products become what the softmax takes: its factor is positive_scale2().
  ATTUNE_DEVICE void complete_scores() {
    if (!kAdditive && !(p_.forward.scale > 0.0f)) fold_sign();
    if constexpr (S.bias != Bias::none) add_bias();
  }

  /// Numbers are added to scaled scores, both in base e.
  ATTUNE_DEVICE void add_bias() {
    const i32 thread = static_cast<i32>(ptx::opaque(threadIdx.x)) - kWarpgroup;  // of all consumers
    const BiasTile<S> bias(keys_.tile(key_at_) + Memory::kShared.key_bytes, thread / 32 * 16,
                           p_.bias_rows == 1, thread % 32);
#pragma unroll
    for (i32 k = 0; k < kKeys / 16; ++k) {
      float element[8];
      bias.load(element, k);
#pragma unroll
      for (i32 e = 0; e < 8; ++e) {
        float& score = scores_[k * 8 + e];
        score = kAdditive ? fmaf(score, p_.forward.scale, element[e]) : with_bias<S.bias>(score, element[e]);
      }
    }
  }

  /// The softmax takes maxima before it scales, which needs a positive factor: a negative scale becomes its
  /// absolute value and negated scores, scale 0 becomes 1 and scores times 0.
  ATTUNE_DEVICE void fold_sign() {
    const float sign = p_.forward.scale < 0.0f ? -1.0f : 0.0f;
#pragma unroll
    for (i32 e = 0; e < kKeys / 2; ++e) scores_[e] *= sign;
  }
  ATTUNE_DEVICE float positive_scale2() const {
    if constexpr (kAdditive) return kLog2e;
    return p_.forward.scale == 0.0f ? 1.0f : fabsf(p_.forward.scale) * kLog2e;
  }

  ATTUNE_DEVICE void hide_invisible(i32 key) {
    const i32 column = key + static_cast<i32>(lane() % 4 * 2);
#pragma unroll
    for (i32 e = 0; e < kKeys / 2; ++e) {
      if (!visible<S>(window(), len_k(), row_ + e / 2 % 2 * 8, column + e / 4 * 8 + e % 2)) {
        scores_[e] = neg_inf();
      }
    }
  }

  /// The exact way: relative to the running maximum. O and the sums then owe `factor_`.
  ATTUNE_DEVICE void exponentiate() {
    const float scale2 = positive_scale2();
    float largest[2][2] = {{scores_[0], scores_[1]}, {scores_[2], scores_[3]}};
#pragma unroll
    for (i32 e = 4; e < kKeys / 2; ++e)
      largest[e / 2 % 2][e % 2] = fmaxf(largest[e / 2 % 2][e % 2], scores_[e]);
    float shift[2];
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
      const float top = quad_max(fmaxf(largest[half][0], largest[half][1])) * scale2;
      const float before = reference_[half];
      reference_[half] = fmaxf(top, before);
      shift[half] = safe_max(reference_[half]);
      factor_[half] = ptx::ex2_approx_ftz(before - shift[half]);
      sum_[half] *= factor_[half];
    }
#pragma unroll
    for (i32 e = 0; e < kKeys / 2; ++e) {
      scores_[e] = ptx::ex2_approx_ftz(fmaf(scores_[e], scale2, -shift[e / 2 % 2]));
    }
#pragma unroll
    for (i32 e = 0; e < kKeys / 2; e += 2) sum_[e / 2 % 2] += scores_[e] + scores_[e + 1];
  }

  /// The blind way: relative to the reference as it stands. True: it does not serve, and the scores are gone.
  /// The warpgroup decides as one, since it multiplies again as one.
  ATTUNE_DEVICE bool bet_is_lost() {
    const float scale2 = positive_scale2();
    float part[2][2] = {};
#pragma unroll
    for (i32 e = 0; e < kKeys / 2; ++e) {
      scores_[e] = ptx::ex2_approx_ftz(fmaf(scores_[e], scale2, -reference_[e / 2 % 2]));
      part[e / 2 % 2][e % 2] += scores_[e];
    }
    const float sum[2] = {part[0][0] + part[0][1], part[1][0] + part[1][1]};
    const bool lost = ptx::bar_red_or(kEpilogue + group_, kWarpgroup,
                                      !(sum[0] <= kSumLimit && sum[1] <= kSumLimit));  // NaN loses too
    if (!lost) {
      sum_[0] += sum[0];
      sum_[1] += sum[1];
    }
    return lost;
  }

  ATTUNE_DEVICE void pack_probabilities() {
#pragma unroll
    for (i32 e = 0; e < kKeys / 4; ++e)
      probability_[e / 4][e % 4] = pack<S.dtype>(scores_[2 * e], scores_[2 * e + 1]);
    if constexpr (S.dropout == Dropout::on) drop();
  }

  // ---- Dropout ----

  /// What of the tile at `key` is dropped. Between products and their end it would be moved behind that:
  /// ptxas keeps only waits at barriers in their place.
  ATTUNE_DEVICE void draw(i32 key) {
    const DropoutParams& p = p_.forward.dropout;
    const Sm90Work work = current_work();
    const DropTest test(p);
    const i32 first_call = dropout_call(key) + static_cast<i32>(ptx::opaque(threadIdx.x) % 4);
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
      const DropoutWord query(static_cast<u32>(row_ + half * 8));
#pragma unroll
      for (i32 c = 0; c < kCalls; ++c) {
        const Philox<DropoutWord> bits = dropout_bits(p, work.block, work.head, query, first_call + c * 4);
#pragma unroll
        for (i32 n = 0; n < 4; ++n) dropped_[half][c][n] = test.dropped(bits.word[n]);
      }
    }
  }
  /// Of the packed probabilities, which the sums do not notice; the survivors are scaled up in finish().
  ATTUNE_DEVICE void drop() {
    const DropTest test(p_.forward.dropout);
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
#pragma unroll
      for (i32 c = 0; c < kCalls; ++c) {
#pragma unroll
        for (i32 n = 0; n < 4; ++n)
          test.drop(probability_[c * 2 + n / 2][half + n % 2 * 2], dropped_[half][c][n]);
      }
    }
  }

  ATTUNE_DEVICE void rescale_output() {
#pragma unroll
    for (i32 e = 0; e < kDimV / 2; ++e) output_[e] *= factor_[e / 2 % 2];
  }

  // ---- The end of a tile ----

  /// Normalises, writes the LSE and the output, and hands the query tile back.
  ATTUNE_DEVICE void finish(const Sm90Work& work) {
    const Block block = block_of<S>(p_.forward, work.block);
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
      const float sum = quad_sum(sum_[half]);
      factor_[half] = inverse_sum(sum) * (S.dropout == Dropout::on ? p_.forward.dropout.rescale : 1.0f);
      if constexpr (S.lse == Lse::write) write_lse(work, block, row_ + half * 8, reference_[half], sum);
    }
    rescale_output();
    if constexpr (kStaged) {
      store_staged(work, block);
    } else {
      store_directly(work, block);
    }
    queries_.release(query_at_);  // by every thread: each has read the work item, too
  }

  /// The output leaves through this warpgroup's query tile.
  ATTUNE_DEVICE void store_staged(const Sm90Work& work, const Block& block) const {
    ptx::bar_sync(kEpilogue + group_, kWarpgroup);  // every warp's products have read the queries
    const u32 tile = queries_.tile(query_at_);
    const u32 row = thread() / 32 * 16 + lane() % 16;
#pragma unroll
    for (i32 k = 0; k < kDimV / 16; ++k) {
      const float* o = output_ + k * 8;
      ptx::stmatrix_x4(tile + panel_offset<kGroupRows>(row, k * 2 + static_cast<i32>(lane() / 16)),
                       pack<S.dtype>(o[0], o[1]), pack<S.dtype>(o[2], o[3]), pack<S.dtype>(o[4], o[5]),
                       pack<S.dtype>(o[6], o[7]));
    }
    ptx::fence_proxy_async();
    ptx::bar_sync(kEpilogue + group_, kWarpgroup);
    const i32 first_row = work.begin + static_cast<i32>(group_) * kGroupRows;
    if (kVarlen && first_row + kGroupRows > block.len_q) {
      store_rows(work, block, first_row);
    } else if (elected()) {
      store_tile({0, block.q_begin + first_row, work.head, block.batch});
    }
  }

  /// Float32 needs twice the room of the query tile: it goes from registers.
  ATTUNE_DEVICE void store_directly(const Sm90Work& work, const Block& block) const {
#pragma unroll
    for (i32 half = 0; half < 2; ++half) {
      const i32 query = row_ + half * 8;
      if (query >= block.len_q) return;
      float* row =
          static_cast<float*>(p_.forward.output) + output_offset(work, block, query) + lane() % 4 * 2;
#pragma unroll
      for (i32 n = 0; n < S.head_dim_v / 8; ++n) {
        const float* pair = output_ + n * 4 + half * 2;
        *reinterpret_cast<float2*>(row + n * 8) = make_float2(pair[0], pair[1]);
      }
    }
  }

  /// Elements from the output's start to its row for a query of the block.
  ATTUNE_DEVICE i64 output_offset(const Sm90Work& work, const Block& block, i32 query) const {
    const Strides& strides = p_.forward.output_strides;
    return block.batch * strides.batch + work.head / p_.forward.heads * strides.group +
           work.head % p_.forward.heads * strides.head + (block.q_begin + query) * strides.seq;
  }

  /// The copy engine leaves out what is outside the tensor.
  ATTUNE_DEVICE void store_tile(ptx::BoxOrigin origin) const {
    const u32 tile = queries_.tile(query_at_);
#pragma unroll
    for (i32 panel = 0; panel < Memory::kShared.panels_v; ++panel) {
      origin.column = panel * Sm90Shared::kPanelElements;
      ptx::cp_async_bulk_tensor_store(p_.output, tile + panel * kGroupRows * Sm90Shared::kPanelRowBytes,
                                      origin);
    }
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read<0>();
  }

  /// But not the rows of the next sequence.
  ATTUNE_DEVICE void store_rows(const Sm90Work& work, const Block& block, i32 first_row) const {
    constexpr i32 kChunks = S.head_dim_v / 8;
    const i64 row_stride = p_.forward.output_strides.seq;
    u16* rows = static_cast<u16*>(p_.forward.output) + output_offset(work, block, first_row);
    const i32 count = min(block.len_q - first_row, kGroupRows) * kChunks;
#pragma unroll 1
    for (i32 i = static_cast<i32>(thread()); i < count; i += kWarpgroup) {
      const i32 row = i / kChunks;
      const i32 chunk = i % kChunks;
      const ptx::Word4 w = ptx::ld_shared_word4(queries_.tile(query_at_) +
                                                panel_offset<kGroupRows>(static_cast<u32>(row), chunk));
      *reinterpret_cast<int4*>(rows + row * row_stride + chunk * 8) = make_int4(w.x, w.y, w.z, w.w);
    }
  }

  ATTUNE_DEVICE void write_lse(const Sm90Work& work, const Block& block, i32 query, float reference,
                               float sum) const {
    if (lane() % 4 != 0 || query >= block.len_q) return;
    // A row that saw nothing: -inf + log2(0).
    p_.forward.lse[(i64{block.batch} * p_.heads + work.head) * p_.forward.len_q + block.q_begin + query] =
        (reference + ptx::lg2_approx_ftz(sum)) * kLn2;
  }

  const ForwardSm90Params& p_;
  const Memory memory_;
  const typename Memory::KeyRing keys_;
  const typename Memory::ValueRing values_;
  const typename Memory::QueryRing queries_;
  const u32 group_;
  typename Memory::KeyRing::Cursor key_at_{0}, value_at_{0};
  typename Memory::QueryRing::Cursor query_at_{0};
  i32 row_ = 0;  // this thread's first query; the second is 8 further down
  Window window_;
  i32 len_k_ = 0;
  i32 foreign_keys_ = 0;  // of the next tile of values: at its end, of other sequences

  Scores scores_;
  float output_[kDimV / 2];
  u32 probability_[kKeys / 16][4];
  u32 dropped_[2][kCalls][4];  // masks of pairs, by row halves
  u32 query_[kQueryRegisters ? kDimSteps : 1][4];
  float reference_[2];  // in base 2, scaled; -inf until a key was seen
  float sum_[2];        // of this thread's columns
  float factor_[2];
};

template <KernelSpec S>
ATTUNE_DEVICE void forward_sm90(const ForwardSm90Params& params) {
  static_assert(S.family == Family::sm90 && S.dtype != DType::f32);
  static_assert(S.output_dtype == S.dtype || S.output_dtype == DType::f32);
  static_assert(S.dropout == Dropout::off || S.block_n % kDropoutGroup == 0);
  static_assert(S.bias == Bias::none || S.blocks == Blocks::dense,
                "boxes begin at 16 bytes' multiples of a row");
  static_assert(S.head_dim % 8 == 0 && S.head_dim_v % 8 == 0 && S.head_dim <= 256 && S.head_dim_v <= 256);
  static_assert(S.block_m % kGroupRows == 0 && S.block_n % 16 == 0);
  constexpr i32 kGroups = S.block_m / kGroupRows;
  static_assert(S.warps == 4 * (kGroups + 1));
  constexpr bool kBias = S.bias != Bias::none;
  constexpr bool kUneven = Sm90Schedule<S>::kUneven || kBias;
  constexpr bool kLaden = kBias || (S.blocks == Blocks::varlen && S.dropout == Dropout::on);
  constexpr i32 kProducerRegisters = kGroups == 2   ? (kUneven ? 40 : 24)
                                     : kGroups == 3 ? (kLaden ? 56 : 32)
                                                    : 24;
  constexpr i32 kConsumerRegisters = kGroups == 2   ? (kUneven ? 232 : 240)
                                     : kGroups == 3 ? (kLaden ? 152 : 160)
                                                    : 112;

  extern __shared__ __align__(1024) u8 shared[];
  const Sm90Memory<S> memory{ptx::shared_address(shared)};
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {&params.query, &params.key, &params.value}) ptx::prefetch_tensormap(*map);
    if constexpr (S.output_dtype == S.dtype) ptx::prefetch_tensormap(params.output);
    if constexpr (S.bias != Bias::none) ptx::prefetch_tensormap(params.bias);
    memory.keys().init(kGroups);
    memory.values().init(kGroups);
    for (u32 group = 0; group < kGroups; ++group) memory.queries(group).init(kWarpgroup);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // uniform, and known to be
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x < Sm90Producer<S>::kLanes) Sm90Producer<S>(params, memory).run();
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    Sm90Consumer<S>(params, memory, warp / 4 - 1).run();
  }
}

}  // namespace attune::kernel
