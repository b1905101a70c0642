// Candidates: tuning as data. A row says for which architectures, dtypes and head dims a family is meant and
// with which tiles; choose.h takes the first row that fits. Budgets are computed here and asserted by the
// compile tier.
#pragma once

#include "attune/spec.h"
#include "codegen/arch.h"

#include <span>
#include <string>

namespace attune::codegen {

struct Candidate {
  const char* name;  // "mma_128x64x4", unique; shown by explain
  kernel::Family family;
  int sm_min, sm_max;  // CUDA: compute capabilities, inclusive
  Isa isa;             // CPU
  unsigned dtypes;     // bit set of 1 << DType
  int head_dim_max;    // of max(head_dim, head_dim_v), inclusive
  int block_m, block_n, tile_m, tile_n, warps, stages, lanes;
};

std::span<const Candidate> candidates();

/// Dynamic shared memory in bytes that the kernel of this spec needs. Kernels carve up the same numbers: the
/// formula stands beside the kernel's shared-memory layout in its template.
int shared_bytes(const kernel::KernelSpec& spec);

/// Threads of a GPU block.
inline int threads(const kernel::KernelSpec& spec) {
  return spec.warps * 32;
}

}  // namespace attune::codegen
