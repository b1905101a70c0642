// KernelSpec: everything that one kernel is specialised on, by name. The generator prints it, the key hashes
// it and `attune explain` shows it, all through for_each_field. No run-time extent stands here: lengths,
// strides, the window's width and the scale are launch parameters (params.h).
#pragma once

#include "attune/hd.h"

namespace attune::kernel {

enum class Operation : i32 {
  forward,
  merge,
  delta,           // backward.h: what the gradients need of every query
  grad_query,      // the query's gradient
  grad_key_value,  // those of key and value
  grad_bias,       // that of an additive bias tensor
  round_query,     // the query's gradient, from float32 sums
  grad_merge       // merge.h: of the chunks
};
enum class Family : i32 { cpu, simt, mma, sm90, merge, rows };
enum class DType : i32 { f32, f16, bf16 };
enum class Edge : i32 { open, bounded };      // does the window have a bound on this side?
enum class Blocks : i32 { dense, varlen };    // a block per batch entry, or sequences packed on one axis
enum class Keys : i32 { contiguous, paged };  // a block's keys are neighbours, or behind a table of pages
/// A tensor added to the scores, or one that hides keys.
enum class Bias : i32 { none, f32, f16, bf16, boolean };
enum class Dropout : i32 { off, on };
enum class Lse : i32 { skip, write };
/// Does grad_key_value add to float32 sums of it, and in the same order in every run?
enum class QueryGradient : i32 { apart, atomic, ordered };
/// Forward: do several blocks share the keys of a tile of queries? Each writes partial results, to be merged.
enum class Split : i32 { off, on };

struct KernelSpec {
  Operation operation = Operation::forward;
  Family family = Family::cpu;
  DType dtype = DType::f32;         // of query, key and value, or of what is merged; sums are float32
  DType output_dtype = DType::f32;  // of the output; delta, grad_merge: of it and its gradient
  i32 head_dim = 0;                 // elements of one query or key row; 0 for merge
  i32 head_dim_v = 0;               // elements of one value or output row
  Edge window_left = Edge::open;    // keys too far to the left are invisible
  Edge window_right = Edge::open;   // keys too far to the right are invisible (causal)
  Blocks blocks = Blocks::dense;
  Keys keys = Keys::contiguous;  // paged only with varlen
  Bias bias = Bias::none;
  Dropout dropout = Dropout::off;
  Lse lse = Lse::skip;
  QueryGradient query_gradient = QueryGradient::apart;
  Split split = Split::off;
  i32 block_m = 0;  // queries of one tile; merge and other operations by row: rows of one block
  i32 block_n = 0;  // keys of one tile
  i32 block_v = 0;  // columns of the result that one block computes: all, or less where those are too many
  i32 tile_m = 0;   // register tile: query rows (simt), query vectors (cpu), m16 fragments (mma)
  i32 tile_n = 0;   // register tile: key columns or value columns (simt, cpu), n8 fragments (mma's gradients)
  i32 warps = 0;    // GPU: warps of a block
  i32 stages = 0;   // GPU: tiles in flight, of what a block walks over; merge: chunks
  i32 query_stages = 0;     // sm90: query tiles in flight of each warpgroup
  i32 query_registers = 0;  // sm90: 1 keeps the queries in registers
  i32 ping_pong = 0;        // sm90: 1 has warpgroups take turns to issue products
  i32 cluster = 0;          // sm90: 1 has two blocks, with a tile of keys each, share their sums
  i32 copy_bytes = 0;  // GPU: widest access that every row of query, key, value and output is aligned for
  i32 lanes = 0;       // CPU: float32 lanes of a vector
  constexpr bool operator==(const KernelSpec&) const = default;
};

inline constexpr i32 kKernelSpecFields = 28;
inline constexpr i32 kMaxHeadDim = 512;

/// Calls visit(name, field) for every field in order. Refuses to compile when a field is forgotten.
template <typename Spec, typename Visit>
constexpr void for_each_field(Spec& spec, Visit&& visit) {
  static_assert(sizeof(KernelSpec) == kKernelSpecFields * sizeof(i32),
                "KernelSpec grew: add the field here, to the goldens and to docs/adding_a_kernel.md");
  visit("operation", spec.operation);
  visit("family", spec.family);
  visit("dtype", spec.dtype);
  visit("output_dtype", spec.output_dtype);
  visit("head_dim", spec.head_dim);
  visit("head_dim_v", spec.head_dim_v);
  visit("window_left", spec.window_left);
  visit("window_right", spec.window_right);
  visit("blocks", spec.blocks);
  visit("keys", spec.keys);
  visit("bias", spec.bias);
  visit("dropout", spec.dropout);
  visit("lse", spec.lse);
  visit("query_gradient", spec.query_gradient);
  visit("split", spec.split);
  visit("block_m", spec.block_m);
  visit("block_n", spec.block_n);
  visit("block_v", spec.block_v);
  visit("tile_m", spec.tile_m);
  visit("tile_n", spec.tile_n);
  visit("warps", spec.warps);
  visit("stages", spec.stages);
  visit("query_stages", spec.query_stages);
  visit("query_registers", spec.query_registers);
  visit("ping_pong", spec.ping_pong);
  visit("cluster", spec.cluster);
  visit("copy_bytes", spec.copy_bytes);
  visit("lanes", spec.lanes);
}

ATTUNE_HD constexpr i32 size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

/// Bytes of one element of a bias tensor; 0 of none.
ATTUNE_HD constexpr i32 size_of(Bias bias) {
  switch (bias) {
    case Bias::none: return 0;
    case Bias::f32: return 4;
    case Bias::f16:
    case Bias::bf16: return 2;
    case Bias::boolean: return 1;
  }
  return 0;
}

/// Can the kernel store the gradient of a bias tensor beside its own results? It has the gradients of a
/// tile's scores in the bias's type; each pair of a dense problem must have an element of its own. Where a
/// window leaves tiles out, delta clears all elements before.
ATTUNE_HD constexpr bool stores_bias_gradient(const KernelSpec& spec) {
  const bool same_type = (spec.bias == Bias::f16 && spec.dtype == DType::f16) ||
                         (spec.bias == Bias::bf16 && spec.dtype == DType::bf16);
  return spec.operation == Operation::grad_key_value && spec.family == Family::sm90 && same_type &&
         spec.blocks == Blocks::dense;
}

/// Programmatic dependent launch, on GPUs of compute capability 9.0 and up: may the kernel begin before the
/// launch ahead of it ends? In itself every block then waits for that end (griddepcontrol_wait) before it
/// reads or writes global memory, so that its own end, too, means that all launches ahead have ended.
ATTUNE_HD constexpr bool begins_early(const KernelSpec& spec) {
  return (spec.operation == Operation::merge && spec.split == Split::on) ||
         (spec.operation == Operation::grad_key_value && spec.family == Family::sm90) ||
         spec.operation == Operation::round_query;
}

/// Columns of a row of the operation's result; of two results, of the wider one. 0 where its rows are not
/// cut.
ATTUNE_HD constexpr i32 result_columns(Operation operation, i32 head_dim, i32 head_dim_v) {
  switch (operation) {
    case Operation::forward:
    case Operation::merge:
    case Operation::grad_merge: return head_dim_v;
    case Operation::grad_query:
    case Operation::round_query: return head_dim;
    case Operation::grad_key_value: return max(head_dim, head_dim_v);
    case Operation::delta:
    case Operation::grad_bias: return 0;
  }
  return 0;
}

/// Parts that the columns of a row of the result are cut into: each is computed by a block of its own.
ATTUNE_HD constexpr i32 column_parts(const KernelSpec& spec) {
  const i32 columns = result_columns(spec.operation, spec.head_dim, spec.head_dim_v);
  return columns == 0 ? 1 : ceil_div(columns, spec.block_v);
}

}  // namespace attune::kernel
