// The gradients of key and value on a CPU: lanes over keys (key_lanes.h).
//
// One task computes block_n rows of both, one head of theirs. It walks over the queries that see them, of
// every head and sequence: dV^T += dO^T (P Z) and dK^T += Q^T dS.
#pragma once

#include "attune/backward.h"
#include "attune/cpu/gradients.h"
#include "attune/cpu/key_lanes.h"
#include "attune/cpu/rows.h"
#include "attune/params.h"
#include "attune/semantics.h"

namespace attune::kernel {

/// The gradients before the scale, transposed.
template <KernelSpec S>
struct KeyValueSums {
  using Scratch = KeyScratch<S>;
  float key[S.head_dim][Scratch::kColumns];
  float value[S.head_dim_v][Scratch::kColumns];

  template <i32 V>
  ATTUNE_HD void add(const KeyTask<S>& task, const TilePairs& pairs) {
    constexpr bool kSomeLanes = S.blocks == Blocks::varlen;  // the next may be another sequence's keys
    const i32 column = task.column + pairs.keys.offset;
    if (task.params.grad_value != nullptr) {
      accumulate<S.lanes, S.tile_m, V, kSomeLanes>(pairs.grad_output, column, pairs.keys.count,
                                                   task.scratch.weights, value);
    }
    if (task.params.grad_key != nullptr) {
      accumulate<S.lanes, S.tile_m, V, kSomeLanes>(pairs.query, column, pairs.keys.count,
                                                   task.scratch.grad_scores, key);
    }
  }
};

template <KernelSpec S>
struct alignas(64) GradKeyValueScratch {
  KeyScratch<S> pairs;
  KeyValueSums<S> sums;
};

template <KernelSpec S>
constexpr i32 grad_key_value_cpu_scratch_bytes() {
  return sizeof(GradKeyValueScratch<S>);
}

/// Computes one slot: a tile of rows of key and value, one head of theirs.
template <KernelSpec S>
ATTUNE_HD void grad_key_value_cpu(const BackwardParams& params, i64 number, void* memory) {
  constexpr i32 L = S.lanes;
  auto& scratch = *static_cast<GradKeyValueScratch<S>*>(memory);
  KeyValueSums<S>& sums = scratch.sums;
  const KeySlot slot = key_slot_of<S>(params, number);
  clear<L>(slot.end - slot.begin, sums.key);
  clear<L>(slot.end - slot.begin, sums.value);
#pragma clang loop unroll(disable)
  for (i32 n = 0; n < sharing_heads(params); ++n) {
    add_head<S>(params, slot.batch, sharing_head(params, slot, n), slot.begin, slot.end, scratch.pairs, sums,
                [](const Block& block) {
                  return QueryRange{0, block.len_q};
                });
  }
  const auto store_rows = [&](const auto& columns, void* data, const Strides& strides, float factor) {
    if (data == nullptr) return;
    auto* rows = static_cast<Element<S.dtype>*>(data) + slot.batch * strides.batch +
                 slot.group * strides.group + slot.head * strides.head + slot.begin * strides.seq;
    store_transposed<S.dtype, L>(columns, rows, strides.seq, slot.end - slot.begin,
                                 [&](i32) { return Floats<L>(factor); });
  };
  store_rows(sums.key, params.grad_key, params.grad_key_strides, params.forward.scale);
  store_rows(sums.value, params.grad_value, params.grad_value_strides, 1.0f);
}

}  // namespace attune::kernel
