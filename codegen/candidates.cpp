#include "codegen/candidates.h"

#include "attune/cuda/shared.h"

namespace attune::codegen {
namespace {

using kernel::DType;
using kernel::Family;
using kernel::Operation;

constexpr unsigned bit(DType dtype) {
  return 1u << static_cast<int>(dtype);
}
constexpr unsigned kAll = bit(DType::f32) | bit(DType::f16) | bit(DType::bf16);
constexpr unsigned kF32 = bit(DType::f32);
constexpr unsigned kHalf = bit(DType::f16) | bit(DType::bf16);
constexpr int kNewest = 999;

constexpr auto kForward = Operation::forward;
constexpr auto kMerge = Operation::merge;
constexpr auto kDelta = Operation::delta;
constexpr auto kGradQuery = Operation::grad_query;
constexpr auto kGradKeyValue = Operation::grad_key_value;
constexpr auto kGradBias = Operation::grad_bias;
constexpr auto kRoundQuery = Operation::round_query;
constexpr auto kGradMerge = Operation::grad_merge;

constexpr unsigned kUnpaged = kEveryFeature & ~kPaged;
constexpr unsigned kUneven = kWindow | kVarlen;
constexpr unsigned kMasks = kUneven | kPaged;
constexpr unsigned kNoBias = kMasks | kDropout;
constexpr unsigned kNoDropout = kMasks | kBias;
constexpr unsigned kPlainDropout = kWindow | kDropout;
constexpr unsigned kPlainScores = kEveryFeature & ~(kBias | kDropout);
constexpr unsigned kShares = kMasks | kSplit;
constexpr unsigned kSums = kAtomic | kOrdered;

constexpr unsigned kFewTiles = 1u << static_cast<int>(Extent::few_tiles);
constexpr unsigned kFewQueries = 1u << static_cast<int>(Extent::few_queries);

// The first row that fits wins, so rows go from the most specific to the most general. Why a row has its
// tiles is measured in bench/results/.
// clang-format off
constexpr Candidate kCandidates[] = {
    // name                operation family         sm    sm_max    isa           dtypes  features     head_dim m   n    v    tm  tn warps stages lanes; sm90: query_stages query_registers ping_pong extents cluster
    {"sm90_128x64_d64",     kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kWindow,       64,   128,  64,   0,    0,  0,  12, 4,  0, 2, 0, 0, kFewTiles},
    {"sm90_256x64_d64",     kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, 0,             64,   256,  64,   0,    0,  0,  20, 4,  0, 2, 0, 1},
    {"sm90_256x64_d64w",    kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kWindow,       64,   256,  64,   0,    0,  0,  20, 4,  0, 2, 0, 0},
    {"sm90_192x128_d64",    kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kMasks,        64,   192,  128,  0,    0,  0,  16, 4,  0, 2, 0, 0},
    {"sm90_256x64_d64d",    kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kDropout,      64,   256,  64,   0,    0,  0,  20, 4,  0, 2, 0, 1},
    {"sm90_256x64_d64m",    kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kNoBias,       64,   256,  64,   0,    0,  0,  20, 4,  0, 2, 0, 0},
    {"sm90_192x64_d64",     kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kEveryFeature, 64,   192,  64,   0,    0,  0,  16, 4,  0, 2, 0, 1},
    {"sm90_192x64_d64b",    kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kEveryFeature, 64,   192,  64,   0,    0,  0,  16, 2,  0, 2, 0, 1},
    {"sm90_128x64_d128",    kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kWindow,       128,  128,  64,   0,    0,  0,  12, 4,  0, 2, 0, 0, kFewTiles},
    {"sm90_192x64_d96",     kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kWindow,       96,   192,  64,   0,    0,  0,  16, 4,  0, 2, 0, 1, kFewQueries},
    {"sm90_192x112_d96",    kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kWindow,       96,   192,  112,  0,    0,  0,  16, 2,  0, 2, 0, 0},
    {"sm90_128x128_d128",   kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, 0,             128,  128,  128,  0,    0,  0,  12, 2,  0, 2, 1, 0, kFewQueries},
    {"sm90_192x64_d128s",   kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kWindow,       128,  192,  64,   0,    0,  0,  16, 3,  0, 2, 0, 0, kFewQueries},
    {"sm90_192x80_d128",    kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, 0,             128,  192,  80,   0,    0,  0,  16, 2,  0, 2, 0, 1},
    {"sm90_192x80_d128w",   kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kWindow,       128,  192,  80,   0,    0,  0,  16, 2,  0, 2, 0, 0},
    {"sm90_192x64_d128",    kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kMasks,        128,  192,  64,   0,    0,  0,  16, 2,  0, 2, 0, 0},
    {"sm90_192x64_d128b",   kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kNoDropout,    128,  192,  64,   0,    0,  0,  16, 3,  0, 1, 0, 0},
    {"sm90_192x64_d128c",   kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kNoDropout,    128,  192,  64,   0,    0,  0,  16, 2,  0, 1, 0, 0},
    {"sm90_128x128_d128d",  kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kNoBias,       128,  128,  128,  0,    0,  0,  12, 2,  0, 2, 0, 0},
    {"sm90_128x64_d128d",   kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kEveryFeature, 128,  128,  64,   0,    0,  0,  12, 2,  0, 1, 0, 0},
    {"sm90_128x64_d192s",   kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kWindow,       192,  128,  64,   0,    0,  0,  12, 2,  0, 2, 0, 0, kFewTiles | kFewQueries},
    {"sm90_128x80_d192",    kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, 0,             192,  128,  80,   0,    0,  0,  12, 2,  0, 2, 0, 0},
    {"sm90_128x96_d192",    kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kMasks,        192,  128,  96,   0,    0,  0,  12, 2,  0, 1, 0, 0},
    {"sm90_128x64_d192",    kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kEveryFeature, 192,  128,  64,   0,    0,  0,  12, 2,  0, 1, 0, 0},
    {"sm90_128x64_d256",    kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kMasks,        256,  128,  64,   0,    0,  0,  12, 2,  0, 1, 0, 1},
    {"sm90_128x64_d256b",   kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kWindow | kBias,256, 128,  64,   0,    0,  0,  12, 2,  0, 1, 0, 0},
    {"sm90_128x64_d256d",   kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kDropout,      256,  128,  64,   0,    0,  0,  12, 2,  0, 1, 0, 1},
    {"sm90_128x32_d256",    kForward, Family::sm90,  90,  90,       Isa::none,    kHalf, kEveryFeature, 256,  128,  32,   0,    0,  0,  12, 2,  0, 1, 0, 0},
    {"mma_128x64x4_d64",    kForward, Family::mma,   80,  99,       Isa::none,    kHalf, kNoBias,       64,   128,  64,   0,    2,  0,  4,  2,  0},
    {"mma_128x64x4_d64b",   kForward, Family::mma,   100, kNewest,  Isa::none,    kHalf, kMasks,        64,   128,  64,   0,    2,  0,  4,  2,  0},
    {"mma_64x64x4_d64",     kForward, Family::mma,   80,  kNewest,  Isa::none,    kHalf, kEveryFeature, 64,   64,   64,   0,    1,  0,  4,  2,  0},
    {"mma_128x48x4_d128",   kForward, Family::mma,   80,  89,       Isa::none,    kHalf, kWindow,       128,  128,  48,   0,    2,  0,  4,  1,  0},
    {"mma_64x96x4_d128",    kForward, Family::mma,   90,  119,      Isa::none,    kHalf, kNoBias,       128,  64,   96,   0,    1,  0,  4,  1,  0},
    {"mma_128x48x4_d128b",  kForward, Family::mma,   120, kNewest,  Isa::none,    kHalf, kWindow,       128,  128,  48,   0,    2,  0,  4,  1,  0},
    {"mma_64x64x4_d128",    kForward, Family::mma,   80,  kNewest,  Isa::none,    kHalf, kNoBias,       128,  64,   64,   0,    1,  0,  4,  1,  0},
    {"mma_64x32x4_d128",    kForward, Family::mma,   80,  kNewest,  Isa::none,    kHalf, kEveryFeature, 128,  64,   32,   0,    1,  0,  4,  1,  0},
    {"mma_64x64x4_d256",    kForward, Family::mma,   80,  kNewest,  Isa::none,    kHalf, kNoBias,       256,  64,   64,   0,    1,  0,  4,  1,  0},
    {"mma_64x32x4_d256",    kForward, Family::mma,   80,  kNewest,  Isa::none,    kHalf, kEveryFeature, 256,  64,   32,   0,    1,  0,  4,  1,  0},
    {"mma_64x64x4_d512",    kForward, Family::mma,   80,  kNewest,  Isa::none,    kHalf, kNoBias,       512,  64,   64,   256,  1,  0,  4,  1,  0},
    {"mma_64x32x4_d512",    kForward, Family::mma,   80,  kNewest,  Isa::none,    kHalf, kNoDropout,    512,  64,   32,   256,  1,  0,  4,  1,  0},
    {"mma_32x32x2_d512",    kForward, Family::mma,   80,  kNewest,  Isa::none,    kHalf, kNoBias,       512,  32,   32,   256,  1,  0,  2,  1,  0},
    {"mma_32x32x2_d512b",   kForward, Family::mma,   80,  kNewest,  Isa::none,    kHalf, kNoDropout,    512,  32,   32,   256,  1,  0,  2,  1,  0},
    {"mma_16x32x4_d128s",   kForward, Family::mma,   80,  kNewest,  Isa::none,    kHalf, kShares,       128,  16,   32,   0,    1,  0,  4,  2,  0},
    {"mma_16x32x2_d128s",   kForward, Family::mma,   80,  kNewest,  Isa::none,    kHalf, kShares,       128,  16,   32,   0,    1,  0,  2,  2,  0},
    {"mma_16x32x4_d256s",   kForward, Family::mma,   80,  kNewest,  Isa::none,    kHalf, kShares,       256,  16,   32,   0,    1,  0,  4,  2,  0},
    {"mma_16x16x2_d256s",   kForward, Family::mma,   80,  kNewest,  Isa::none,    kHalf, kShares,       256,  16,   16,   0,    1,  0,  2,  2,  0},
    {"mma_grad_query_128x32x4_d64",         kGradQuery,   Family::mma,80, kNewest,Isa::none,kHalf,kUneven,                  64, 128,32, 64, 2, 0, 4, 1, 0},
    {"mma_grad_query_64x32x4_d64",          kGradQuery,   Family::mma,80, kNewest,Isa::none,kHalf,kEveryFeature,            64, 64, 32, 64, 1, 0, 4, 1, 0},
    {"mma_grad_query_64x64x4_d128",         kGradQuery,   Family::mma,80, kNewest,Isa::none,kHalf,kUneven,                  128,64, 64, 128,1, 0, 4, 1, 0},
    {"mma_grad_query_64x32x4_d128",         kGradQuery,   Family::mma,80, kNewest,Isa::none,kHalf,kEveryFeature,            128,64, 32, 128,1, 0, 4, 1, 0},
    {"mma_grad_query_64x32x4_d256",         kGradQuery,   Family::mma,80, kNewest,Isa::none,kHalf,kUneven,                  256,64, 32, 256,1, 0, 4, 1, 0},
    {"mma_grad_query_64x32x4_d256b",        kGradQuery,   Family::mma,80, kNewest,Isa::none,kHalf,kEveryFeature,            256,64, 32, 128,1, 0, 4, 0, 0},
    {"mma_grad_query_32x32x2_d512",         kGradQuery,   Family::mma,80, kNewest,Isa::none,kHalf,kEveryFeature,            512,32, 32, 128,1, 0, 2, 0, 0},
    {"sm90_grad_key_value_128x128_d64",     kGradKeyValue,Family::sm90,90,90,     Isa::none,kHalf,kUneven | kSums,          64, 128,128,0,  0, 0, 12,2, 0},
    {"sm90_grad_key_value_128x128_d64d",    kGradKeyValue,Family::sm90,90,90,     Isa::none,kHalf,kPlainDropout | kAtomic,  64, 128,128,0,  0, 0, 12,2, 0},
    {"sm90_grad_key_value_128x128_d64b",    kGradKeyValue,Family::sm90,90,90,     Isa::none,kHalf,kWindow | kBias | kSums,  64, 128,128,0,  0, 0, 12,2, 0},
    {"sm90_grad_key_value_64x128_d128",     kGradKeyValue,Family::sm90,90,90,     Isa::none,kHalf,kEveryFeature | kSums,    128,64, 128,0,  0, 0, 12,2, 0},
    {"sm90_grad_key_value_64x64x2_d256",    kGradKeyValue,Family::sm90,90,90,     Isa::none,kHalf,kWindow | kSums,          256,64, 64, 0,  0, 0, 12,2, 0, 0, 0, 0, kEveryExtent, 1},
    {"sm90_grad_key_value_64x64_d256",      kGradKeyValue,Family::sm90,90,90,     Isa::none,kHalf,kEveryFeature | kSums,    256,64, 64, 0,  0, 0, 12,2, 0},
    {"mma_grad_key_value_64x128x4_d64",     kGradKeyValue,Family::mma,80, kNewest,Isa::none,kHalf,kUneven | kAtomic,        64, 64, 128,64, 2, 2, 4, 1, 0},
    {"mma_grad_key_value_64x128x4_d64d",    kGradKeyValue,Family::mma,80, kNewest,Isa::none,kHalf,kPlainDropout | kAtomic,  64, 64, 128,64, 2, 2, 4, 1, 0},
    {"mma_grad_key_value_64x128x8_d64",     kGradKeyValue,Family::mma,80, kNewest,Isa::none,kHalf,kEveryFeature | kAtomic,  64, 64, 128,64, 2, 2, 8, 1, 0},
    {"mma_grad_key_value_64x128x8_d128",    kGradKeyValue,Family::mma,80, 99,     Isa::none,kHalf,kWindow | kAtomic,        128,64, 128,128,2, 4, 8, 1, 0},
    {"mma_grad_key_value_32x128x8_d128",    kGradKeyValue,Family::mma,80, kNewest,Isa::none,kHalf,kUneven | kAtomic,        128,32, 128,128,2, 2, 8, 1, 0},
    {"mma_grad_key_value_64x64x8_d128d",    kGradKeyValue,Family::mma,80, kNewest,Isa::none,kHalf,kPlainDropout | kAtomic,  128,64, 64, 128,2, 2, 8, 1, 0},
    {"mma_grad_key_value_64x64x8_d128",     kGradKeyValue,Family::mma,80, kNewest,Isa::none,kHalf,kNoDropout | kAtomic,     128,64, 64, 128,2, 2, 8, 1, 0},
    {"mma_grad_key_value_32x64x4_d128",     kGradKeyValue,Family::mma,80, kNewest,Isa::none,kHalf,kWindow | kAtomic,        128,32, 64, 128,2, 2, 4, 1, 0},
    {"mma_grad_key_value_64x64x8_d128p",    kGradKeyValue,Family::mma,80, kNewest,Isa::none,kHalf,kEveryFeature | kAtomic,  128,64, 64, 64, 2, 2, 8, 0, 0},
    {"mma_grad_key_value_64x64x8_d256",     kGradKeyValue,Family::mma,80, kNewest,Isa::none,kHalf,kWindow | kAtomic,        256,64, 64, 256,2, 2, 8, 1, 0},
    {"mma_grad_key_value_64x64x8_d256p",    kGradKeyValue,Family::mma,80, kNewest,Isa::none,kHalf,kEveryFeature | kAtomic,  256,64, 64, 128,2, 2, 8, 0, 0},
    {"mma_grad_key_value_32x32x2_d256",     kGradKeyValue,Family::mma,80, kNewest,Isa::none,kHalf,kUneven | kAtomic,        256,32, 32, 128,2, 2, 2, 0, 0},
    {"mma_grad_key_value_32x32x2_d256p",    kGradKeyValue,Family::mma,80, kNewest,Isa::none,kHalf,kEveryFeature | kAtomic,  256,32, 32, 64, 2, 2, 2, 0, 0},
    {"mma_grad_key_value_64x32x4_d512",     kGradKeyValue,Family::mma,80, kNewest,Isa::none,kHalf,kMasks | kAtomic,         512,64, 32, 128,2, 2, 4, 0, 0},
    {"mma_grad_key_value_32x32x2_d512",     kGradKeyValue,Family::mma,80, kNewest,Isa::none,kHalf,kUneven | kAtomic,        512,32, 32, 128,2, 2, 2, 0, 0},
    {"sm90_grad_bias_128x128_d64",          kGradBias,    Family::sm90,90,90,     Isa::none,kHalf,kEveryFeature,            64, 128,128,0,  0, 0, 12,5, 0},
    {"sm90_grad_bias_128x128_d128",         kGradBias,    Family::sm90,90,90,     Isa::none,kHalf,kEveryFeature,            128,128,128,0,  0, 0, 12,3, 0},
    {"sm90_grad_bias_128x128_d128b",        kGradBias,    Family::sm90,90,90,     Isa::none,kHalf,kEveryFeature,            128,128,128,0,  0, 0, 12,2, 0},
    {"sm90_grad_bias_128x64_d256",          kGradBias,    Family::sm90,90,90,     Isa::none,kHalf,kEveryFeature,            256,128,64, 0,  0, 0, 12,2, 0},
    {"mma_grad_bias_64x64x8_d128",          kGradBias,    Family::mma,80, kNewest,Isa::none,kHalf,kEveryFeature,            128,64, 64, 0,  2, 2, 8, 0, 0},
    {"mma_grad_bias_64x32x4_d256",          kGradBias,    Family::mma,80, kNewest,Isa::none,kHalf,kEveryFeature,            256,64, 32, 0,  2, 2, 4, 0, 0},
    {"mma_grad_bias_32x32x2_d512",          kGradBias,    Family::mma,80, kNewest,Isa::none,kHalf,kEveryFeature,            512,32, 32, 0,  2, 2, 2, 0, 0},
    {"simt_128x32x2_d32",   kForward, Family::simt,  80,  kNewest,  Isa::none,    kF32,  kEveryFeature, 32,   128,  32,   0,    8,  8,  2,  1,  0},
    {"simt_128x64x4_d64",   kForward, Family::simt,  60,  99,       Isa::none,    kAll,  kEveryFeature, 64,   128,  64,   0,    8,  8,  4,  1,  0},
    {"simt_128x64x4_d64b",  kForward, Family::simt,  100, kNewest,  Isa::none,    kAll,  kNoBias,       64,   128,  64,   0,    8,  8,  4,  1,  0},
    {"simt_64x64x4_d64",    kForward, Family::simt,  60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 64,   64,   64,   0,    8,  4,  4,  1,  0},
    {"simt_64x32x4_d64",    kForward, Family::simt,  60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 64,   64,   32,   0,    4,  4,  4,  1,  0},
    {"simt_128x64x8_d128",  kForward, Family::simt,  60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 128,  128,  64,   0,    8,  4,  8,  1,  0},
    {"simt_64x64x4_d128",   kForward, Family::simt,  60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 128,  64,   64,   0,    8,  4,  4,  1,  0},
    {"simt_64x32x4_d128",   kForward, Family::simt,  60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 128,  64,   32,   0,    4,  4,  4,  1,  0},
    {"simt_32x32x4_d128",   kForward, Family::simt,  60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 128,  32,   32,   0,    4,  2,  4,  1,  0},
    {"simt_64x64x4_d256",   kForward, Family::simt,  60,  kNewest,  Isa::none,    kAll,  kPlainScores,  256,  64,   64,   0,    8,  4,  4,  1,  0},
    {"simt_64x64x8_d256",   kForward, Family::simt,  60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 256,  64,   64,   0,    4,  4,  8,  1,  0},
    {"simt_32x32x4_d256",   kForward, Family::simt,  60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 256,  32,   32,   0,    4,  2,  4,  1,  0},
    {"simt_16x32x4_d256",   kForward, Family::simt,  60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 256,  16,   32,   0,    2,  2,  4,  1,  0},
    {"simt_16x16x4_d256",   kForward, Family::simt,  60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 256,  16,   16,   0,    2,  1,  4,  1,  0},
    {"simt_32x32x4_d512",   kForward, Family::simt,  60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 512,  32,   32,   0,    4,  2,  4,  1,  0},
    {"simt_16x16x4_d512",   kForward, Family::simt,  60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 512,  16,   16,   0,    2,  1,  4,  1,  0},
    {"simt_16x8x4_d512",    kForward, Family::simt,  60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 512,  16,   8,    0,    1,  1,  4,  1,  0},
    {"simt_8x8x2_d512",     kForward, Family::simt,  60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 512,  8,    8,    0,    1,  1,  2,  1,  0},
    {"merge_32x4_d32",      kMerge,   Family::merge, 60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 32,   32,   0,    0,    0,  0,  4,  4,  0},
    {"merge_16x4_d64",      kMerge,   Family::merge, 60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 64,   16,   0,    0,    0,  0,  4,  4,  0},
    {"merge_8x4_d128",      kMerge,   Family::merge, 60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 128,  8,    0,    0,    0,  0,  4,  4,  0},
    {"merge_4x4_d512",      kMerge,   Family::merge, 60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 512,  4,    0,    0,    0,  0,  4,  4,  0},
    {"merge_8x16_d64s",     kMerge,   Family::merge, 60,  kNewest,  Isa::none,    kF32,  kUneven | kSplit, 64, 8,    0,    0,    0,  0,  4,  16, 0},
    {"merge_4x16_d128s",    kMerge,   Family::merge, 60,  kNewest,  Isa::none,    kF32,  kUneven | kSplit, 128, 4,   0,    0,    0,  0,  4,  16, 0},
    {"merge_4x8_d256s",     kMerge,   Family::merge, 60,  kNewest,  Isa::none,    kF32,  kUneven | kSplit, 256, 4,   0,    0,    0,  0,  4,  8,  0},
    {"grad_merge_32x4_d32", kGradMerge,Family::merge,60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 32,   32,   0,    0,    0,  0,  4,  4,  0},
    {"grad_merge_16x4_d64", kGradMerge,Family::merge,60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 64,   16,   0,    0,    0,  0,  4,  4,  0},
    {"grad_merge_8x4_d128", kGradMerge,Family::merge,60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 128,  8,    0,    0,    0,  0,  4,  4,  0},
    {"grad_merge_4x4_d512", kGradMerge,Family::merge,60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 512,  4,    0,    0,    0,  0,  4,  4,  0},
    {"simt_grad_query_64x64x4_d32",        kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 32,  64,  64,  0,  4,  8,  4,  1, 0},
    {"simt_grad_query_64x64x4_d64",        kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 64,  64,  64,  0,  8,  4,  4,  1, 0},
    {"simt_grad_query_64x32x4_d64",        kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 64,  64,  32,  0,  4,  4,  4,  1, 0},
    {"simt_grad_query_32x32x4_d64",        kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 64,  32,  32,  0,  4,  2,  4,  1, 0},
    {"simt_grad_query_128x64x8_d128",      kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 128, 128, 64,  0,  8,  4,  8,  1, 0},
    {"simt_grad_query_64x64x4_d128",       kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 128, 64,  64,  0,  8,  4,  4,  1, 0},
    {"simt_grad_query_64x32x4_d128",       kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 128, 64,  32,  0,  4,  4,  4,  1, 0},
    {"simt_grad_query_32x32x4_d128",       kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 128, 32,  32,  0,  4,  2,  4,  1, 0},
    {"simt_grad_query_16x32x4_d128",       kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 128, 16,  32,  0,  2,  2,  4,  1, 0},
    {"simt_grad_query_64x64x8_d256",       kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 256, 64,  64,  0,  4,  4,  8,  1, 0},
    {"simt_grad_query_32x32x4_d256",       kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 256, 32,  32,  0,  4,  2,  4,  1, 0},
    {"simt_grad_query_32x16x4_d256",       kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 256, 32,  16,  0,  4,  1,  4,  1, 0},
    {"simt_grad_query_16x16x4_d256",       kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 256, 16,  16,  0,  2,  1,  4,  1, 0},
    {"simt_grad_query_16x8x4_d256",        kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 256, 16,  8,   0,  1,  1,  4,  1, 0},
    {"simt_grad_query_32x32x4_d512",       kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 512, 32,  32,  0,  4,  2,  4,  1, 0},
    {"simt_grad_query_16x16x4_d512",       kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 512, 16,  16,  0,  2,  1,  4,  1, 0},
    {"simt_grad_query_16x8x4_d512",        kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 512, 16,  8,   0,  1,  1,  4,  1, 0},
    {"simt_grad_query_8x8x2_d512",         kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 512, 8,   8,   0,  1,  1,  2,  1, 0},
    {"simt_grad_query_8x4x1_d512",         kGradQuery,    Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 512, 8,   4,   0,  1,  1,  1,  1, 0},
    {"simt_grad_key_value_64x64x4_d32",    kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 32,  64,  64,  0,  8,  4,  4,  2, 0},
    {"simt_grad_key_value_32x64x4_d32",    kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 32,  32,  64,  0,  4,  4,  4,  2, 0},
    {"simt_grad_key_value_64x64x4_d64",    kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kNoDropout,    64,  64,  64,  0,  4,  8,  4,  2, 0},
    {"simt_grad_key_value_32x64x4_d64",    kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 64,  32,  64,  0,  4,  4,  4,  2, 0},
    {"simt_grad_key_value_32x32x4_d64",    kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 64,  32,  32,  0,  2,  4,  4,  2, 0},
    {"simt_grad_key_value_32x64x4_d128",   kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kUneven,       128, 32,  64,  0,  2,  8,  4,  2, 0},
    {"simt_grad_key_value_32x64x8_d128",   kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 128, 32,  64,  0,  2,  4,  8,  2, 0},
    {"simt_grad_key_value_32x32x4_d128",   kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 128, 32,  32,  0,  2,  4,  4,  2, 0},
    {"simt_grad_key_value_16x32x4_d128",   kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 128, 16,  32,  0,  1,  4,  4,  2, 0},
    {"simt_grad_key_value_16x16x4_d128",   kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 128, 16,  16,  0,  1,  2,  4,  2, 0},
    {"simt_grad_key_value_32x64x8_d256",   kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kNoDropout,    256, 32,  64,  0,  2,  4,  8,  2, 0},
    {"simt_grad_key_value_32x32x4_d256",   kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 256, 32,  32,  0,  2,  4,  4,  2, 0},
    {"simt_grad_key_value_16x32x4_d256t",  kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 256, 16,  32,  0,  1,  4,  4,  1, 0},
    {"simt_grad_key_value_16x16x4_d256t",  kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 256, 16,  16,  0,  1,  2,  4,  1, 0},
    {"simt_grad_key_value_8x16x4_d256t",   kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 256, 8,   16,  0,  1,  1,  4,  1, 0},
    {"simt_grad_key_value_16x32x8_d512",   kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 512, 16,  32,  0,  1,  2,  8,  2, 0},
    {"simt_grad_key_value_16x16x4_d512",   kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 512, 16,  16,  0,  1,  2,  4,  2, 0},
    {"simt_grad_key_value_8x16x4_d512t",   kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 512, 8,   16,  0,  1,  1,  4,  1, 0},
    {"simt_grad_key_value_8x8x2_d512t",    kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 512, 8,   8,   0,  1,  1,  2,  1, 0},
    {"simt_grad_key_value_8x4x1_d512t",    kGradKeyValue, Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 512, 8,   4,   256,1,  1,  1,  1, 0},
    {"simt_grad_bias_64x64x8_d512",        kGradBias,     Family::simt, 60, kNewest, Isa::none, kAll, kEveryFeature, 512, 64,  64,  0,  4,  4,  8,  1, 0},
    {"delta_32x8_d128",     kDelta,   Family::rows,  60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 128,  32,   0,    0,    0,  0,  8,  0,  0},
    {"delta_16x8_d256",     kDelta,   Family::rows,  60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 256,  16,   0,    0,    0,  0,  8,  0,  0},
    {"delta_8x8_d512",      kDelta,   Family::rows,  60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 512,  8,    0,    0,    0,  0,  8,  0,  0},
    {"round_query_32x8_d128",kRoundQuery,Family::rows,60, kNewest,  Isa::none,    kAll,  kEveryFeature, 128,  32,   0,    0,    0,  0,  8,  0,  0},
    {"round_query_8x8_d512",kRoundQuery,Family::rows,60,  kNewest,  Isa::none,    kAll,  kEveryFeature, 512,  8,    0,    0,    0,  0,  8,  0,  0},
    {"cpu_avx512_f32",      kForward, Family::cpu,   0,   0,        Isa::avx512,  kF32,  kUnpaged,      512,  48,   128,  0,    3,  8,  0,  0,  16},
    {"cpu_avx512_paged",    kForward, Family::cpu,   0,   0,        Isa::avx512,  kF32,  kEveryFeature, 256,  96,   128,  0,    3,  8,  0,  0,  16},
    {"cpu_avx512",          kForward, Family::cpu,   0,   0,        Isa::avx512,  kHalf, kEveryFeature, 256,  96,   64,   0,    3,  8,  0,  0,  16},
    {"cpu_avx512_d512",     kForward, Family::cpu,   0,   0,        Isa::avx512,  kAll,  kEveryFeature, 512,  48,   64,   0,    3,  8,  0,  0,  16},
    {"cpu_avx2_f32",        kForward, Family::cpu,   0,   0,        Isa::avx2,    kF32,  kUnpaged,      512,  32,   96,   0,    2,  6,  0,  0,  8},
    {"cpu_avx2",            kForward, Family::cpu,   0,   0,        Isa::avx2,    kAll,  kEveryFeature, 256,  64,   96,   0,    2,  6,  0,  0,  8},
    {"cpu_avx2_d512",       kForward, Family::cpu,   0,   0,        Isa::avx2,    kAll,  kEveryFeature, 512,  32,   96,   0,    2,  6,  0,  0,  8},
    {"cpu_avx512_merge",    kMerge,   Family::cpu,   0,   0,        Isa::avx512,  kAll,  kEveryFeature, 512,  64,   0,    0,    0,  0,  0,  0,  16},
    {"cpu_avx2_merge",      kMerge,   Family::cpu,   0,   0,        Isa::avx2,    kAll,  kEveryFeature, 512,  64,   0,    0,    0,  0,  0,  0,  8},
    {"cpu_avx512_grad_merge",kGradMerge,Family::cpu,  0,  0,        Isa::avx512,  kAll,  kEveryFeature, 512,  64,   0,    0,    0,  0,  0,  0,  16},
    {"cpu_avx2_grad_merge", kGradMerge,Family::cpu,   0,  0,        Isa::avx2,    kAll,  kEveryFeature, 512,  64,   0,    0,    0,  0,  0,  0,  8},
    {"cpu_avx512_delta",             kDelta,        Family::cpu, 0, 0, Isa::avx512, kAll, kEveryFeature, 512, 64,  0,   0,  0,  0,  0,  0, 16},
    {"cpu_avx512_grad_query_d64",    kGradQuery,    Family::cpu, 0, 0, Isa::avx512, kAll, kEveryFeature, 64,  256, 96,  0,  4,  6,  0,  0, 16},
    {"cpu_avx512_grad_query_d128",   kGradQuery,    Family::cpu, 0, 0, Isa::avx512, kAll, kEveryFeature, 128, 192, 96,  0,  4,  6,  0,  0, 16},
    {"cpu_avx512_grad_query_d512",   kGradQuery,    Family::cpu, 0, 0, Isa::avx512, kAll, kEveryFeature, 512, 128, 96,  0,  4,  6,  0,  0, 16},
    {"cpu_avx512_grad_key_value_d64", kGradKeyValue, Family::cpu, 0, 0, Isa::avx512, kAll, kEveryFeature, 64,  96,  256, 0,  6,  4,  0,  0, 16},
    {"cpu_avx512_grad_key_value_d128", kGradKeyValue, Family::cpu, 0, 0, Isa::avx512, kAll, kEveryFeature, 128, 96,  192, 0,  6,  4,  0,  0, 16},
    {"cpu_avx512_grad_key_value_d512", kGradKeyValue, Family::cpu, 0, 0, Isa::avx512, kAll, kEveryFeature, 512, 48,  128, 0,  6,  4,  0,  0, 16},
    {"cpu_avx512_grad_bias_d128",    kGradBias,     Family::cpu, 0, 0, Isa::avx512, kAll, kEveryFeature, 128, 192, 128, 0,  6,  4,  0,  0, 16},
    {"cpu_avx512_grad_bias_d512",    kGradBias,     Family::cpu, 0, 0, Isa::avx512, kAll, kEveryFeature, 512, 48,  64,  0,  6,  4,  0,  0, 16},
    {"cpu_avx2_delta",               kDelta,        Family::cpu, 0, 0, Isa::avx2,   kAll, kEveryFeature, 512, 64,  0,   0,  0,  0,  0,  0, 8},
    {"cpu_avx2_grad_query_d128",     kGradQuery,    Family::cpu, 0, 0, Isa::avx2,   kAll, kEveryFeature, 128, 96,  96,  0,  2,  6,  0,  0, 8},
    {"cpu_avx2_grad_query_d512",     kGradQuery,    Family::cpu, 0, 0, Isa::avx2,   kAll, kEveryFeature, 512, 64,  96,  0,  2,  6,  0,  0, 8},
    {"cpu_avx2_grad_key_value_d128", kGradKeyValue, Family::cpu, 0, 0, Isa::avx2,   kAll, kEveryFeature, 128, 96,  96,  0,  6,  2,  0,  0, 8},
    {"cpu_avx2_grad_key_value_d512", kGradKeyValue, Family::cpu, 0, 0, Isa::avx2,   kAll, kEveryFeature, 512, 48,  64,  0,  6,  2,  0,  0, 8},
    {"cpu_avx2_grad_bias_d128",      kGradBias,     Family::cpu, 0, 0, Isa::avx2,   kAll, kEveryFeature, 128, 96,  96,  0,  6,  2,  0,  0, 8},
    {"cpu_avx2_grad_bias_d512",      kGradBias,     Family::cpu, 0, 0, Isa::avx2,   kAll, kEveryFeature, 512, 48,  32,  0,  6,  2,  0,  0, 8},
};
// clang-format on

}  // namespace

unsigned features_of(const Problem& problem) {
  return (problem.blocks == kernel::Blocks::varlen ? kVarlen : 0u) |
         (problem.keys == kernel::Keys::paged ? kPaged : 0u) |
         (problem.bias != kernel::Bias::none ? kBias : 0u) |
         (problem.dropout == kernel::Dropout::on ? kDropout : 0u) |
         (problem.window_left == kernel::Edge::bounded || problem.window_right == kernel::Edge::bounded
              ? kWindow
              : 0u) |
         (problem.query_gradient == kernel::QueryGradient::atomic ? kAtomic : 0u) |
         (problem.query_gradient == kernel::QueryGradient::ordered ? kOrdered : 0u) |
         (problem.split == kernel::Split::on ? kSplit : 0u);
}

std::span<const Candidate> candidates() {
  return kCandidates;
}

int shared_bytes(const kernel::KernelSpec& spec) {
  return kernel::shared_bytes(spec);
}

}  // namespace attune::codegen
