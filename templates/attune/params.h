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
  i32 page_run = 0;            // divides it and every k_start: so many keys, from a multiple on, are together
};

/// Philox key and threshold of one call (philox.h); used when the spec has dropout.
struct DropoutParams {
  u32 key[2] = {0, 0};
  u32 threshold = 0;     // a pair is dropped iff its 16 random bits are below it: 0 none, 65536 all
  float rescale = 1.0f;  // 1 / (1 - threshold / 65536); 0 when all are dropped
};

inline constexpr i32 kPhiloxRounds = 10;

/// The threshold for both 16-bit halves of a word at once (drop_bounds() of philox.h). It is at most 2^15, so
/// that a half's distance from it has 16 bits with its sign: above that threshold bits are complemented, and
/// those below the bound kept.
struct DropBounds {
  u32 flip = 0;  // ~0: complemented
  u32 bound = 0, negative_bound = 0;
};

/// All of it for a kernel that has no instructions to spare: what ready() of philox.h makes of it.
struct ReadyDropout {
  u32 key[kPhiloxRounds][2] = {};  // of each round
  DropBounds bounds;
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
  i32 splits = 1;  // blocks that share the keys of a tile; 1 unless the spec says so. Then output and lse
                   // hold their results one after the other, float32 and contiguous
  Sequences sequences;
};

/// A float32 number of every query, to be read: [batch, groups, heads, len_q], any strides.
struct QueryNumbers {
  const float* data = nullptr;
  Strides strides;
  i32 length = 0;        // extent of its last axis: at least what is asked for, unless a table is wrong
  i32 per_sequence = 0;  // varlen: 1 has sequences in place of `batch`, whose queries count from 0
                         // ("padded"); 0 packs them like the query's rows
};

/// What every kernel of the backward pass is told (backward.h).
struct BackwardParams {
  ForwardParams forward;              // as the forward pass was told; its output is read, its lse is not used
  const void* grad_output = nullptr;  // [batch, len_q, groups, heads, head_dim_v]: of output_dtype for delta,
                                      // of dtype with column stride 1 for the others
  Strides grad_output_strides;
  i64 grad_output_column = 1;  // stride of its last axis, any; for delta alone
  QueryNumbers lse;
  QueryNumbers grad_lse;  // data null: 0

  // What delta writes and the others read; contiguous.
  float* lse2 = nullptr;   // [batch, groups, heads, len_q]: in base 2, +inf where a query sees no key
  float* delta = nullptr;  // likewise: sum of grad_output * output over the row, less grad_lse
  void* grad_output_copy = nullptr;  // [batch, len_q, groups, heads, head_dim_v] of dtype; null: no copy

  // Results, of dtype (grad_bias: of the bias's). Null: not wanted.
  void* grad_query = nullptr;  // [batch, len_q, groups, heads, head_dim]
  void* grad_key = nullptr;    // [batch, len_k, key_groups, key_heads, head_dim]
  void* grad_value = nullptr;  // [batch, len_k, key_groups, key_heads, head_dim_v]
  void* grad_bias = nullptr;   // [bias_batch, bias_groups, bias_heads, bias_rows, len_k]
  Strides grad_query_strides;
  Strides grad_key_strides;
  Strides grad_value_strides;
  BiasStrides grad_bias_strides;
  float* query_sums = nullptr;  // [batch, groups, heads, len_q, head_dim], contiguous: grad_query before its
                                // rounding and without the scale; zero before. Null: not added up
  i32 sum_fragments = 0;        // 1: [batch, groups, heads, len_q / 16, head_dim / 8, 32, 4] (backward.h)
  u32* turns = nullptr;         // [query_turns()]: who has added to the sums; zero before. Null: any order
  // Each of these extents is the query's, or 1 where the tensor serves all.
  i32 key_groups = 0, key_heads = 0;
  i32 bias_batch = 0, bias_groups = 0, bias_heads = 0, bias_rows = 0;
};
static_assert(sizeof(BackwardParams) <= 4096, "kernel parameters of every GPU fit 4 KiB");

/// What cuTensorMapEncodeTiled writes: shape, strides and box of a tensor for Hopper's copy engine.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

/// What the sm90 family is told for forward. Maps have the axes [head_dim, rows, heads, batch]; a box is 64
/// elements of a tile's rows of one head, or, of paged keys, of some of them. The bias's has [key, query,
/// heads, batch], each of extent 1 where all share.
struct ForwardSm90Params {
  TensorMap query, key, value;
  TensorMap output;  // unless it is float32
  TensorMap bias;    // unless there is none
  ForwardParams forward;
  u32* counter = nullptr;      // of tiles handed out; 0 before and after. Null: tiles are strided
  i32 heads = 0;               // of queries, over all groups
  i32 heads_per_key_head = 1;  // query heads that share one head of the key's map
  i32 key_box_rows = 0;        // of key and value: block_n, or paged what a run of keys and a tile have
  i32 heads_per_bias_head = 1;
  i32 bias_rows = 0;     // of a box: block_m, or 1 where all queries share it
  i32 bias_batches = 0;  // 1: each batch entry has its own
  i32 row_blocks = 0;    // tiles of one head, over all of its blocks
  i32 pairs = 0;         // batch * heads
  i32 tiles = 0;         // row_blocks * pairs
  i32 section = 1;       // windows: neighbouring pairs whose keys and values fit the L2 cache
  ReadyDropout dropout;  // unless there is none
};

/// What the sm90 family is told for grad_key_value. Maps as above.
struct GradKeyValueSm90Params {
  TensorMap query, key, value, grad_output;
  TensorMap bias;       // unless there is none
  TensorMap grad_bias;  // where it is stored here (stores_bias_gradient() in spec.h)
  BackwardParams backward;
  u32* counter = nullptr;      // as in ForwardSm90Params
  i32 heads = 0;               // that gradients of key and value have, over all groups
  i32 sharing = 1;             // query heads that share one of these
  i32 heads_per_key_head = 1;  // of these, those that share one head of the key's map
  i32 heads_per_bias_head = 1;
  i32 bias_rows = 0;  // as in ForwardSm90Params
  i32 bias_batches = 0;
  i32 key_blocks = 0;  // tiles of one head
  i32 pairs = 0;       // batch * heads
  i32 tiles = 0;       // key_blocks * pairs
  i32 blocks = 0;      // of threads
  i32 section = 1;     // windows: neighbouring pairs whose queries and sums fit the L2 cache
};
static_assert(sizeof(GradKeyValueSm90Params) <= 4096, "kernel parameters of every GPU fit 4 KiB");

/// What the sm90 family is told for grad_bias. Maps as above.
struct GradBiasSm90Params {
  TensorMap query, key, value, grad_output, bias;
  BackwardParams backward;
  i32 heads = 0;               // of queries, over all groups
  i32 heads_per_key_head = 1;  // of these, those that share one head of the key's map
  i32 heads_per_bias_head = 1;
  i32 bias_rows = 0;  // as in ForwardSm90Params
  i32 bias_batches = 0;
  i32 slots = 0;
  i32 slot_blocks = 1;  // of a cluster, which share out the queries of a slot: of a bias of one row
};
static_assert(sizeof(GradBiasSm90Params) <= 4096, "kernel parameters of every GPU fit 4 KiB");

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
  // Of parts of the keys (Split::on) the first is told, and how many elements lie from one to the next.
  i64 output_step = 0;
  i64 lse_step = 0;
  // And if they are of packed sequences: rows outside [*row_begin, *row_end), which belong to none, are not
  // written.
  const i32* row_begin = nullptr;
  const i32* row_end = nullptr;
};
static_assert(sizeof(MergeParams) <= 4096, "kernel parameters of every GPU fit 4 KiB");

/// Most chunks that one grad_merge takes: each is on its own, so any number of launches may share them out.
inline constexpr i32 kMaxGradChunks = 20;

/// What a chunk of a merge is given back.
struct GradChunk {
  Chunk chunk;
  void* grad_output = nullptr;  // [batch, len, groups, heads, head_dim_v] of dtype
  float* grad_lse = nullptr;    // [batch, groups, heads, len], contiguous
  Strides grad_output_strides;
};

struct GradMergeParams {
  const void* output = nullptr;       // merged, [batch, len, groups, heads, head_dim_v] of output_dtype
  const void* grad_output = nullptr;  // likewise
  Strides output_strides;
  Strides grad_output_strides;
  i64 grad_output_column = 1;       // stride of its last axis, any
  const float* lse = nullptr;       // merged, [batch, groups, heads, len], any strides
  const float* grad_lse = nullptr;  // likewise; null: 0
  Strides lse_strides;
  Strides grad_lse_strides;
  i32 batch = 0;
  i32 groups = 0;
  i32 heads = 0;
  i32 len = 0;
  i32 chunks = 0;
  GradChunk chunk[kMaxGradChunks];
};
static_assert(sizeof(GradMergeParams) <= 4096, "kernel parameters of every GPU fit 4 KiB");

}  // namespace attune::kernel
