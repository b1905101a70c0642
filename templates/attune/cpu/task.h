// A task whose lanes are queries: a tile of queries of one head (forward_cpu.h, grad_query_cpu.h).
#pragma once

#include "attune/blocks.h"
#include "attune/cpu/rows.h"
#include "attune/cpu/simd.h"
#include "attune/params.h"
#include "attune/philox.h"
#include "attune/semantics.h"

namespace attune::kernel {

/// A slot with what follows from it.
template <KernelSpec S>
struct Task {
  static_assert(S.head_dim >= 1 && S.head_dim <= kMaxHeadDim && S.head_dim_v >= 1 &&
                    S.head_dim_v <= kMaxHeadDim,
                "head dims are 1 to 512");
  static_assert(S.block_v == result_columns(S.operation, S.head_dim, S.head_dim_v),
                "a task computes whole rows of the result");
  static_assert(S.block_m % (S.lanes * S.tile_m) == 0, "a block holds whole register tiles of queries");
  static_assert(S.block_n % S.tile_n == 0, "a block holds whole register tiles of keys");
  static_assert(S.dropout == Dropout::off || S.block_n % kDropoutGroup == 0,
                "a block holds whole groups of keys that share random bits");
  static constexpr i32 kTileQueries = S.lanes * S.tile_m;
  /// Neighbouring rows of float32 are read where they lie, but for grad_query, which reads keys once more.
  static constexpr bool kCopied =
      S.dtype != DType::f32 || S.keys == Keys::paged || S.operation == Operation::grad_query;
  static constexpr i32 kCopiedRows = kCopied ? S.block_n : 1;

  const ForwardParams& params;
  const Slot slot;
  const Window window;
};

/// One number of each pair of a key, which counts in its block of keys, and a query of a register tile.
template <KernelSpec S>
using PairNumbers = float[S.block_n][Task<S>::kTileQueries];

/// The queries [begin, begin + count) of the task's block: columns m onwards of the scratch, at most
/// kTileQueries of them.
struct Queries {
  i32 begin;
  i32 count;
  i32 m;
};

/// Rows of keys or values of the task's block as float32: in place, or copied into `buffer`.
template <KernelSpec S, i32 kDim>
ATTUNE_HD Rows fetch_keys(const Task<S>& task, const Element<S.dtype>* data, i64 stride, KeyRange keys,
                          float (*buffer)[kDim]) {
  const auto row_of = [&](i32 n) {
    return data + key_row<S>(task.params, task.slot.block, keys.begin + n) * stride;
  };
  return fetch<S.dtype, S.lanes, Task<S>::kCopied>(row_of, stride, keys.end - keys.begin, buffer);
}

/// Calls visit(block) for blocks of keys that hold all that some query of the task sees. They end at
/// multiples of block_n, wherever the first begins: so the bits of a query's result do not depend on which
/// other queries its task has.
template <KernelSpec S, typename Visit>
ATTUNE_HD void for_each_key_block(const Task<S>& task, Visit&& visit) {
  const KeyRange keys = visited_keys<S>(task.window, task.slot.block.len_k, task.slot.begin, task.slot.end);
  KeyRange block{keys.begin, keys.begin};
#pragma clang loop unroll(disable)
  while (block.begin < keys.end) {
    block.end = min((block.begin / S.block_n + 1) * S.block_n, keys.end);
    visit(block);
    block.begin = block.end;
  }
}

/// Calls visit.template operator()<V>(queries) for all queries of the task, tile_m vectors at a time; what is
/// left, at most tile_m - 1 vectors, goes one by one.
template <KernelSpec S, typename Visit>
ATTUNE_HD void for_each_register_tile(const Task<S>& task, Visit&& visit) {
  constexpr i32 kTile = Task<S>::kTileQueries;
  const i32 begin = task.slot.begin, count = task.slot.end - begin;
  i32 m = 0;
#pragma clang loop unroll(disable)
  for (; m + kTile - S.lanes < count; m += kTile) {
    visit.template operator()<S.tile_m>({begin + m, min(kTile, count - m), m});
  }
#pragma clang loop unroll(disable)
  for (; m < count; m += S.lanes) visit.template operator()<1>({begin + m, min(S.lanes, count - m), m});
}

}  // namespace attune::kernel
