#include "codegen/candidates.h"

#include "attune/cuda/shared.h"

namespace attune::codegen {
namespace {

using kernel::DType;
using kernel::Family;

constexpr unsigned bit(DType dtype) {
  return 1u << static_cast<int>(dtype);
}
constexpr unsigned kAll = bit(DType::f32) | bit(DType::f16) | bit(DType::bf16);
constexpr unsigned kF32 = bit(DType::f32);
constexpr unsigned kHalf = bit(DType::f16) | bit(DType::bf16);
constexpr int kNewest = 999;

// The first row that fits wins, so rows go from the most specific to the most general. Why a row has its
// tiles is measured in bench/results/.
// clang-format off
constexpr Candidate kCandidates[] = {
    // name              family        sm_min sm_max   isa           dtypes  head_dim  block_m block_n tile_m tile_n warps stages lanes
    {"mma_128x64x4_d64",    Family::mma,   80, kNewest,   Isa::none,    kHalf, 64,        128,    64,    2,     0,     4,    2,    0},
    {"mma_128x48x4_d128",   Family::mma,   80, 89,        Isa::none,    kHalf, 128,       128,    48,    2,     0,     4,    1,    0},
    {"mma_64x96x4_d128",    Family::mma,   90, 119,       Isa::none,    kHalf, 128,       64,     96,    1,     0,     4,    1,    0},
    {"mma_128x48x4_d128b",  Family::mma,  120, kNewest,   Isa::none,    kHalf, 128,       128,    48,    2,     0,     4,    1,    0},
    {"mma_64x64x4_d256",    Family::mma,   80, kNewest,   Isa::none,    kHalf, 256,       64,     64,    1,     0,     4,    1,    0},
    {"simt_128x64x4_d64",   Family::simt,  60, kNewest,   Isa::none,    kAll,  64,        128,    64,    8,     8,     4,    1,    0},
    {"simt_64x64x4_d64",    Family::simt,  60, kNewest,   Isa::none,    kAll,  64,        64,     64,    8,     4,     4,    1,    0},
    {"simt_64x32x4_d64",    Family::simt,  60, kNewest,   Isa::none,    kAll,  64,        64,     32,    4,     4,     4,    1,    0},
    {"simt_128x64x8_d128",  Family::simt,  60, kNewest,   Isa::none,    kAll,  128,       128,    64,    8,     4,     8,    1,    0},
    {"simt_64x64x4_d128",   Family::simt,  60, kNewest,   Isa::none,    kAll,  128,       64,     64,    8,     4,     4,    1,    0},
    {"simt_64x32x4_d128",   Family::simt,  60, kNewest,   Isa::none,    kAll,  128,       64,     32,    4,     4,     4,    1,    0},
    {"simt_32x32x4_d128",   Family::simt,  60, kNewest,   Isa::none,    kAll,  128,       32,     32,    4,     2,     4,    1,    0},
    {"simt_64x64x4_d256",   Family::simt,  60, kNewest,   Isa::none,    kAll,  256,       64,     64,    8,     4,     4,    1,    0},
    {"simt_32x32x4_d256",   Family::simt,  60, kNewest,   Isa::none,    kAll,  256,       32,     32,    4,     2,     4,    1,    0},
    {"simt_16x32x4_d256",   Family::simt,  60, kNewest,   Isa::none,    kAll,  256,       16,     32,    2,     2,     4,    1,    0},
    {"simt_16x16x4_d256",   Family::simt,  60, kNewest,   Isa::none,    kAll,  256,       16,     16,    2,     1,     4,    1,    0},
    {"cpu_avx512_f32",    Family::cpu,   0, 0,         Isa::avx512,  kF32,   256,       48,     128,   3,     8,     0,    0,    16},
    {"cpu_avx512",        Family::cpu,   0, 0,         Isa::avx512,  kHalf,  256,       96,     64,    3,     8,     0,    0,    16},
    {"cpu_avx2_f32",      Family::cpu,   0, 0,         Isa::avx2,    kF32,   256,       32,     96,    2,     6,     0,    0,     8},
    {"cpu_avx2",          Family::cpu,   0, 0,         Isa::avx2,    kHalf,  256,       64,     96,    2,     6,     0,    0,     8},
};
// clang-format on

}  // namespace

std::span<const Candidate> candidates() {
  return kCandidates;
}

int shared_bytes(const kernel::KernelSpec& spec) {
  return spec.family == Family::cpu ? 0 : kernel::shared_bytes(spec);
}

}  // namespace attune::codegen
