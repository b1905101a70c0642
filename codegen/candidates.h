// Candidates: tuning as data. A row says for which architectures, dtypes and head dims a family is meant and
// with which tiles; choose.h takes the first row that fits, or one that was measured. Budgets are computed
// here and asserted by the compile tier.
#pragma once

#include "attune/spec.h"
#include "codegen/arch.h"
#include "codegen/problem.h"

#include <span>
#include <string>

namespace attune::codegen {

// What a problem may have beyond plain attention: each costs registers, so a row says which it can take.
inline constexpr unsigned kVarlen = 1;
inline constexpr unsigned kPaged = 2;
inline constexpr unsigned kBias = 4;
inline constexpr unsigned kDropout = 8;
inline constexpr unsigned kWindow = 16;
inline constexpr unsigned kEveryFeature = 31;
// grad_key_value: adds to sums of the query's gradient (QueryGradient).
inline constexpr unsigned kAtomic = 32;
inline constexpr unsigned kOrdered = 64;
// forward: shares keys out over blocks (Split).
inline constexpr unsigned kSplit = 128;
/// The features of a problem, as a set of these bits.
unsigned features_of(const Problem& problem);

inline constexpr unsigned kEveryExtent = 7;

struct Candidate {
  const char* name;  // "mma_128x64x4", unique; shown by explain
  kernel::Operation operation;
  kernel::Family family;
  int sm_min, sm_max;  // CUDA: compute capabilities, inclusive
  Isa isa;             // CPU
  unsigned dtypes;     // bit set of 1 << DType
  unsigned features;   // set of those features: a problem with others does not fit
  int head_dim_max;    // of max(head_dim, head_dim_v), inclusive
  int block_m, block_n;
  int block_v;  // columns of the result that one block computes; 0: all
  int tile_m, tile_n, warps, stages, lanes;
  int query_stages = 0, query_registers = 0, ping_pong = 0;  // sm90
  unsigned extents = kEveryExtent;                           // set of 1 << Extent
  int cluster = 0;                                           // sm90
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
