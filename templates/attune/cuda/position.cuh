// Which queries a block of a GPU kernel computes.
#pragma once

#include "attune/cuda/ptx.cuh"
#include "attune/params.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
struct Position {
  i32 batch, head;
  i32 begin, end;  // queries

  /// Blocks are numbered linearly, so that batch and heads may be large; the blocks of one head are
  /// neighbours and share its keys in the L2 cache. The longest rows of a causal mask start first.
  ATTUNE_DEVICE Position(const ForwardParams& p, u32 block) {
    const i32 tiles = ceil_div(p.len_q, S.block_m);
    const i32 tile = static_cast<i32>(block % static_cast<u32>(tiles));
    const i32 batch_head = static_cast<i32>(block / static_cast<u32>(tiles));
    batch = batch_head / p.heads;
    head = batch_head % p.heads;
    begin = (S.window_right == Edge::bounded ? tiles - 1 - tile : tile) * S.block_m;
    end = min(begin + S.block_m, p.len_q);
  }

  /// Elements from a tensor's start to a row of this batch entry and head.
  ATTUNE_DEVICE i64 offset(const Strides& strides, i32 row) const {
    return batch * strides.batch + head * strides.head + row * strides.seq;
  }

  /// Where the LSE of a query goes.
  ATTUNE_DEVICE float* lse(const ForwardParams& p, i32 query) const {
    return p.lse + (i64{batch} * p.heads + head) * p.len_q + query;
  }
};

}  // namespace attune::kernel
