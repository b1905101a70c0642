// A task of forward_cpu.h: one tile of queries of one head, and what is kept in memory for it.
#pragma once

#include "attune/blocks.h"
#include "attune/cpu/simd.h"
#include "attune/params.h"
#include "attune/philox.h"
#include "attune/semantics.h"

namespace attune::kernel {

/// Small enough for the level-1 or, with a large head_dim, the level-2 cache.
template <KernelSpec S>
struct alignas(64) ForwardScratch {
  static_assert(S.head_dim >= 1 && S.head_dim <= kMaxHeadDim && S.head_dim_v >= 1 &&
                    S.head_dim_v <= kMaxHeadDim,
                "head dims are 1 to 512");
  static_assert(S.block_v == S.head_dim_v, "a task computes whole rows of the output");
  static_assert(S.block_m % (S.lanes * S.tile_m) == 0, "a block holds whole register tiles of queries");
  static_assert(S.block_n % S.tile_n == 0, "a block holds whole register tiles of keys");
  static_assert(S.dropout == Dropout::off || S.block_n % kDropoutGroup == 0,
                "a block holds whole groups of keys that share random bits");
  static constexpr i32 kTileQueries = S.lanes * S.tile_m;
  /// Neighbouring rows of float32 are read where they lie.
  static constexpr bool kCopied = S.dtype != DType::f32 || S.keys == Keys::paged;
  static constexpr i32 kCopiedRows = kCopied ? S.block_n : 1;

  float query[S.head_dim][S.block_m];
  float scores[S.block_n][kTileQueries];  // of one register tile of queries; then probabilities
  float output[S.head_dim_v][S.block_m];
  float row_max[S.block_m];
  float row_sum[S.block_m];
  float rescale[kTileQueries];
  float key[kCopiedRows][S.head_dim];
  float value[kCopiedRows][S.head_dim_v];
};

/// A slot with what follows from it.
template <KernelSpec S>
struct ForwardTask {
  const ForwardParams& params;
  const Slot slot;
  const Window window;
  ForwardScratch<S>& scratch;
};

/// The queries [begin, begin + count) of the task's block: columns m onwards of the scratch, at most
/// kTileQueries of them.
struct Queries {
  i32 begin;
  i32 count;
  i32 m;
};

}  // namespace attune::kernel
