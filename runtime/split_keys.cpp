#include "runtime/split_keys.h"

#include "attune/blocks.h"
#include "codegen/choose.h"
#include "runtime/pack_heads.h"

#include <algorithm>

namespace attune::runtime {
namespace {

using kernel::ForwardParams;
using kernel::i32;
using kernel::i64;

i64 ceil_of(i64 n, i64 parts) {
  return parts == 0 ? 0 : (n + parts - 1) / parts;
}

/// Row-major [batch, len_q, groups, heads, columns].
kernel::Strides rows_of_part(const ForwardParams& p, i64 columns) {
  const i64 group = p.heads * columns;
  const i64 row = p.groups * group;
  return {.batch = p.len_q * row, .seq = row, .group = group, .head = columns};
}

/// Row-major [batch, groups, heads, len_q].
kernel::Strides lses_of_part(const ForwardParams& p) {
  const i64 head = p.len_q;
  const i64 group = p.heads * head;
  return {.batch = p.groups * group, .seq = 1, .group = group, .head = head};
}

// What bench/results/decode.md found: parts that two blocks a multiprocessor share have enough copies under
// way; one of fewer keys than its warps have in a tile each gains nothing, and more parts than a thread of
// the merge reads at once pay for more rounds with many keys alone.
constexpr i64 kTileQueries = 16;
constexpr i64 kMostQueries = 64;  // of a block: each tile of them reads the keys
constexpr i64 kBlocksOfMultiprocessor = 2;
constexpr i64 kFewKeys = 128;
constexpr i64 kManyKeys = 1024;
constexpr i64 kMergedAtOnce = 16;

/// The longest block of a call, as far as the host knows lengths.
struct LongestBlock {
  i64 count = 0;        // of blocks
  i64 queries = 0;      // of one head, or where heads are packed of all that share keys
  i64 keys = 0;         // that these may see
  bool packed = false;  // heads (pack_heads.h)
};

LongestBlock longest_block(const codegen::Problem& problem, const ForwardParams& p) {
  LongestBlock block{
      .count = p.batch, .queries = p.len_q, .keys = p.len_k, .packed = packs_heads(problem, p)};
  if (problem.blocks == kernel::Blocks::varlen) {
    const kernel::Sequences& s = p.sequences;
    block.count = s.count;
    block.queries = ceil_of(p.len_q, s.count);
    block.keys = problem.keys == kernel::Keys::paged ? i64{s.table_width} * s.page_size.divisor
                                                     : ceil_of(p.len_k, s.count);
  }
  const kernel::Window window =
      kernel::window_of(p.reach, static_cast<i32>(block.queries), static_cast<i32>(block.keys));
  if (problem.window_right == kernel::Edge::bounded)
    block.keys = std::min(block.keys, block.queries + window.upper);
  if (problem.window_left == kernel::Edge::bounded) block.keys -= std::max(window.lower, 0);
  if (block.packed) block.queries = p.heads;
  return block;
}

}  // namespace

codegen::Problem problem_of_parts(const codegen::Problem& whole) {
  codegen::Problem parts = whole;
  parts.output_dtype = kernel::DType::f32;
  parts.lse = kernel::Lse::write;
  parts.split = kernel::Split::on;
  parts.extent = codegen::Extent::large;
  return parts;
}

codegen::Problem problem_of_merge(const codegen::Problem& whole) {
  return {.operation = kernel::Operation::merge,
          .dtype = kernel::DType::f32,
          .output_dtype = whole.output_dtype,
          .head_dim_v = whole.head_dim_v,
          .blocks = whole.blocks,
          .lse = whole.lse,
          .split = kernel::Split::on,
          .align_bytes = whole.align_bytes};
}

bool splits_keys(const codegen::Arch& arch) {
  constexpr int kOldest = 80;  // compute capability, of mma
  return arch.backend == codegen::Backend::cuda && arch.sm >= kOldest;
}

int splits_of(const Call& call, const codegen::Arch& arch, int multiprocessors) {
  const ForwardParams& p = call.params;
  const LongestBlock block = longest_block(call.problem, p);
  if (!splits_keys(arch) || !codegen::may_split_keys(call.problem) || block.queries > kMostQueries) return 1;
  const i64 heads = i64{p.groups} * (block.packed ? 1 : p.heads);
  const i64 tiles = std::max(i64{1}, block.count * heads * ceil_of(block.queries, kTileQueries));
  const i64 fill = kBlocksOfMultiprocessor * multiprocessors / tiles;
  const i64 parts = std::min(fill, block.keys / kFewKeys);
  if (parts > kMergedAtOnce) {
    return static_cast<int>(
        std::max(kMergedAtOnce, std::min(multiprocessors / tiles, block.keys / kManyKeys)));
  }
  // Where there are tiles enough, a kernel that is made for few queries is still the faster one for them.
  const bool fills_by_itself = fill < 2 && block.queries <= kTileQueries && block.keys >= kManyKeys;
  return fills_by_itself ? 2 : static_cast<int>(std::max(parts, i64{1}));
}

std::size_t workspace_bytes(const Call& call) {
  if (call.params.splits == 1) return 0;
  const i64 row = call.problem.head_dim_v + 1;  // and its log-sum-exp
  return static_cast<std::size_t>(call.params.splits * kernel::output_rows(call.params) * row) *
         sizeof(float);
}

std::vector<codegen::Problem> problems_of(const Call& call) {
  if (call.params.splits == 1) return {call.problem};
  return {problem_of_parts(call.problem), problem_of_merge(call.problem)};
}

void split_keys(const Call& call, SplitCall& split) {
  const ForwardParams& whole = call.params;
  const i32 splits = whole.splits;
  const i64 rows = kernel::output_rows(whole);
  const i32 columns = call.problem.head_dim_v;
  auto* const outputs = static_cast<float*>(call.workspace);
  float* const lses = outputs + splits * rows * columns;

  split.attention = call;
  split.attention.problem = problem_of_parts(call.problem);
  ForwardParams& parts = split.attention.params;
  parts.output = outputs;
  parts.output_strides = rows_of_part(whole, columns);
  parts.lse = lses;

  split.merge.problem = problem_of_merge(call.problem);
  split.merge.device = call.device;
  split.merge.stream = call.stream;
  kernel::MergeParams& merge = split.merge.params;
  merge.output = whole.output;
  merge.lse = whole.lse;
  merge.output_strides = whole.output_strides;
  merge.batch = whole.batch;
  merge.groups = whole.groups;
  merge.heads = whole.heads;
  merge.len = whole.len_q;
  merge.chunks = splits;
  if (call.problem.blocks == kernel::Blocks::varlen) {
    merge.row_begin = whole.sequences.q_start;
    merge.row_end = whole.sequences.q_start + whole.sequences.count;
  }
  merge.chunk[0] = {.output = outputs,
                    .lse = lses,
                    .output_strides = parts.output_strides,
                    .lse_strides = lses_of_part(whole)};
  merge.output_step = rows * columns;
  merge.lse_step = rows;
}

}  // namespace attune::runtime
