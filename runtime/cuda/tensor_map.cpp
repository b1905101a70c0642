#include "runtime/cuda/tensor_map.h"

#include "attune/cuda/shared.h"

#include <array>
#include <cstddef>
#include <cstdint>

namespace attune::runtime {
namespace {

constexpr int kPanelRowBytes = kernel::Sm90Shared::kPanelRowBytes;

CUtensorMapSwizzle swizzle_of(int row_bytes) {
  return row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
         : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                           : CU_TENSOR_MAP_SWIZZLE_32B;
}

CUtensorMapDataType element_of(kernel::Bias bias) {
  switch (bias) {
    case kernel::Bias::f32: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    case kernel::Bias::f16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case kernel::Bias::bf16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case kernel::Bias::boolean:
    case kernel::Bias::none: break;
  }
  return CU_TENSOR_MAP_DATA_TYPE_UINT8;
}

/// Rows of the tensor have `columns` elements; those of a box are as long as the swizzle.
struct Described {
  const void* data = nullptr;
  BoxAxes axes;
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  int element_bytes = 0;
  int columns = 0;
  int row_bytes = 0;
  int rows = 0;  // of a box
  bool operator==(const Described&) const = default;
};

Result<void> encode(const Driver& driver, const Described& d, kernel::TensorMap& map) {
  const auto bytes = [&](kernel::i64 stride) { return static_cast<cuuint64_t>(stride * d.element_bytes); };
  const cuuint64_t extents[] = {static_cast<cuuint64_t>(d.columns), static_cast<cuuint64_t>(d.axes.rows),
                                static_cast<cuuint64_t>(d.axes.heads), static_cast<cuuint64_t>(d.axes.batch)};
  const cuuint64_t strides[] = {bytes(d.axes.row_stride), bytes(d.axes.head_stride),
                                bytes(d.axes.batch_stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(d.row_bytes / d.element_bytes),
                            static_cast<cuuint32_t>(d.rows), 1, 1};
  const cuuint32_t every[] = {1, 1, 1, 1};
  const CUresult result = driver.cuTensorMapEncodeTiled(
      reinterpret_cast<CUtensorMap*>(&map), d.type, 4, const_cast<void*>(d.data), extents, strides, box,
      every, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(d.row_bytes), CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return done();
  auto described = driver.check(result, "describing a tensor");
  if (result != CUDA_ERROR_INVALID_VALUE) return described;
  return internal_failure(described.failure().message);  // check() lets no such tensor through
}

/// Maps that this thread made last. One depends on nothing but what it describes, so a call that comes again
/// need not ask the driver, which takes 0.07 us a map.
class RecentMaps {
 public:
  Result<void> get(const Driver& driver, const Described& described, kernel::TensorMap& map) {
    Set& set = sets_[set_of(described)];
    for (const Made& made : set.made) {
      if (made.described != described) continue;
      map = made.map;
      return done();
    }
    ATTUNE_TRY(encode(driver, described, map));
    set.made[set.oldest++ % kWays] = {described, map};
    return done();
  }

 private:
  static constexpr std::size_t kSets = 8;
  static constexpr std::size_t kWays = 8;  // a pass has as many maps, which even spacing may bring together
  struct Made {
    Described described;  // data null: none yet
    kernel::TensorMap map{};
  };
  struct Set {
    std::array<Made, kWays> made{};
    unsigned oldest = 0;
  };

  static std::size_t set_of(const Described& d) {
    const auto address = reinterpret_cast<std::uintptr_t>(d.data);
    return (address + static_cast<unsigned>(d.rows)) * 0x9e3779b97f4a7c15u >> 32 & (kSets - 1);
  }

  std::array<Set, kSets> sets_{};
};
constinit thread_local RecentMaps recent{};

}  // namespace

Result<void> encode_panels(const Driver& driver, kernel::DType dtype, const void* data, int head_dim,
                           const BoxAxes& axes, int rows, kernel::TensorMap& map) {
  const auto type =
      dtype == kernel::DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return recent.get(driver, {data, axes, type, 2, head_dim, kPanelRowBytes, rows}, map);
}

Result<void> encode_bias(const Driver& driver, kernel::Bias type, const void* data, int len_k,
                         const BoxAxes& axes, int row_bytes, int rows, kernel::TensorMap& map) {
  return recent.get(driver, {data, axes, element_of(type), size_of(type), len_k, row_bytes, rows}, map);
}

}  // namespace attune::runtime
