// KernelSpec: everything that one kernel is specialised on, by name. The generator prints it, the key hashes
// it and `attune explain` shows it, all through for_each_field. No run-time extent stands here: lengths,
// strides, the window's width and the scale are launch parameters (params.h).
#pragma once

#include "attune/hd.h"

namespace attune::kernel {

enum class Operation : i32 { forward };
enum class Family : i32 { cpu, simt, mma };
enum class DType : i32 { f32, f16, bf16 };
enum class Edge : i32 { open, bounded };  // does the window have a bound on this side?
enum class Lse : i32 { skip, write };

struct KernelSpec {
  Operation operation = Operation::forward;
  Family family = Family::cpu;
  DType dtype = DType::f32;        // of query, key, value and output; scores and sums are float32
  i32 head_dim = 0;                // elements of one query or key row
  i32 head_dim_v = 0;              // elements of one value or output row
  Edge window_left = Edge::open;   // keys too far to the left are invisible
  Edge window_right = Edge::open;  // keys too far to the right are invisible (causal)
  Lse lse = Lse::skip;
  i32 block_m = 0;     // queries of one tile
  i32 block_n = 0;     // keys of one tile
  i32 tile_m = 0;      // register tile: query rows (simt), query vectors (cpu), m16 fragments (mma)
  i32 tile_n = 0;      // register tile: key columns or value columns (simt, cpu)
  i32 warps = 0;       // GPU: warps of a block
  i32 stages = 0;      // GPU: key/value tiles in flight
  i32 copy_bytes = 0;  // GPU: widest access that every row of query, key, value and output is aligned for
  i32 lanes = 0;       // CPU: float32 lanes of a vector
  constexpr bool operator==(const KernelSpec&) const = default;
};

inline constexpr i32 kKernelSpecFields = 16;

/// Calls visit(name, field) for every field in order. Refuses to compile when a field is forgotten.
template <typename Spec, typename Visit>
constexpr void for_each_field(Spec& spec, Visit&& visit) {
  static_assert(sizeof(KernelSpec) == kKernelSpecFields * sizeof(i32),
                "KernelSpec grew: add the field here, to the goldens and to docs/adding_a_kernel.md");
  visit("operation", spec.operation);
  visit("family", spec.family);
  visit("dtype", spec.dtype);
  visit("head_dim", spec.head_dim);
  visit("head_dim_v", spec.head_dim_v);
  visit("window_left", spec.window_left);
  visit("window_right", spec.window_right);
  visit("lse", spec.lse);
  visit("block_m", spec.block_m);
  visit("block_n", spec.block_n);
  visit("tile_m", spec.tile_m);
  visit("tile_n", spec.tile_n);
  visit("warps", spec.warps);
  visit("stages", spec.stages);
  visit("copy_bytes", spec.copy_bytes);
  visit("lanes", spec.lanes);
}

constexpr i32 size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

}  // namespace attune::kernel
