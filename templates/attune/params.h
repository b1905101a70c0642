// What a kernel is told at launch. Plain data, passed by value to GPU kernels and by pointer to CPU kernels;
// host and kernels must agree on every byte, so a change here changes the kernels' key (the text is hashed).
//
// Heads have two axes, [groups, heads]: query head g * heads + h shares the keys of group g. Plain attention
// is groups = H, heads = 1 or the other way round; GQA gives key and value the head stride 0.
#pragma once

#include "attune/hd.h"
#include "attune/semantics.h"

namespace attune::kernel {

/// Strides in elements; the stride of the last axis is 1.
struct Strides {
  i64 batch = 0;
  i64 seq = 0;
  i64 group = 0;
  i64 head = 0;
};

/// Of a bias tensor [batch, group, head, query, key], in elements; any of them may be 0.
struct BiasStrides {
  i64 batch = 0;
  i64 group = 0;
  i64 head = 0;
  i64 query = 0;
  i64 key = 0;
};

/// Exact division of n < 2^31 by a constant of the launch: a multiplication and a shift.
struct Divider {
  i32 divisor = 1;
  u32 multiplier = 1;  // floor(2^32 * (2^shift - divisor) / divisor) + 1
  u32 shift = 0;       // ceil(log2(divisor))
};

/// The blocks of a varlen problem. Tables lie in the kernel's memory; the host may never have seen them, so
/// blocks.h clamps whatever it reads from them.
struct Sequences {
  i32 count = 0;
  const i32* q_start = nullptr;  // [count + 1]: first query row of each sequence
  const i32* k_start =
      nullptr;  // [count + 1], or [count] with k_len: first key row; first logical key if paged
  const i32* k_len = nullptr;  // [count]: keys of each sequence; null: k_start[b + 1] - k_start[b]
  const i32* pages = nullptr;  // paged: [count, table_width], pages of each sequence's logical keys
  i32 table_width = 0;         // columns of `pages`, contiguous
  Divider page_size;           // keys of a page
};

/// Philox key and threshold of one call (philox.h); used when the spec has dropout.
struct DropoutParams {
  u32 key[2] = {0, 0};
  u32 threshold = 0;     // a pair is dropped iff its 16 random bits are below it: 0 none, 65536 all
  float rescale = 1.0f;  // 1 / (1 - threshold / 65536); 0 when all are dropped
};

struct ForwardParams {
  const void* query = nullptr;  // [batch, len_q, groups, heads, head_dim]
  const void* key = nullptr;    // [batch, len_k, groups, heads, head_dim]
  const void* value = nullptr;  // [batch, len_k, groups, heads, head_dim_v]
  const void* bias = nullptr;   // [batch, groups, heads, len_q, len_k]; null unless the spec has one
  void* output = nullptr;       // [batch, len_q, groups, heads, head_dim_v]
  float* lse = nullptr;         // [batch, groups, heads, len_q], contiguous; null unless the spec writes it
  Strides query_strides;
  Strides key_strides;
  Strides value_strides;
  Strides output_strides;
  BiasStrides bias_strides;
  i32 batch = 0;  // 1 for varlen
  i32 groups = 0;
  i32 heads = 0;  // of each group
  i32 len_q = 0;  // rows of query: of a batch entry, or of all sequences together
  i32 len_k = 0;  // rows of key: likewise, with padding, gaps and every page
  Reach reach;
  Window window;       // dense: window_of(reach, len_q, len_k)
  float scale = 1.0f;  // finite, of any sign; scores are scale * q.k + bias
  DropoutParams dropout;
  Sequences sequences;
};

/// What cuTensorMapEncodeTiled writes: shape, strides and box of a tensor for Hopper's copy engine.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

/// What the sm90 family is told. Maps have the axes [head_dim, rows, heads, batch]; a box is 64 elements of
/// a tile's rows of one head.
struct ForwardSm90Params {
  TensorMap query, key, value, output;
  ForwardParams forward;
  u32* counter = nullptr;      // of tiles handed out; 0 before and after. Null: tiles are strided
  i32 heads = 0;               // of queries, over all groups
  i32 heads_per_key_head = 1;  // query heads that share one head of the key's map
  i32 row_blocks = 0;          // tiles of one head, over all of its blocks
  i32 pairs = 0;               // batch * heads
  i32 tiles = 0;               // row_blocks * pairs
  i32 section = 1;             // windows: neighbouring pairs whose keys and values fit the L2 cache
};

/// Most chunks that one merge takes; more are merged in rounds.
inline constexpr i32 kMaxChunks = 48;

/// Attention over some of the keys.
struct Chunk {
  const void* output = nullptr;  // [batch, len, groups, heads, head_dim_v]
  const float* lse = nullptr;    // [batch, groups, heads, len], any strides
  Strides output_strides;
  Strides lse_strides;
};

struct MergeParams {
  void* output = nullptr;  // [batch, len, groups, heads, head_dim_v]
  float* lse = nullptr;    // [batch, groups, heads, len], contiguous; null unless the spec writes it
  Strides output_strides;
  i32 batch = 0;
  i32 groups = 0;
  i32 heads = 0;
  i32 len = 0;
  i32 chunks = 0;
  Chunk chunk[kMaxChunks];
};
static_assert(sizeof(MergeParams) <= 4096, "kernel parameters of every GPU fit 4 KiB");

}  // namespace attune::kernel
