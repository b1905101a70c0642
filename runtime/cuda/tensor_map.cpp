#include "runtime/cuda/tensor_map.h"

#include "attune/cuda/shared.h"

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

/// Rows of a tensor have `columns` elements; those of a box are as long as the swizzle.
Result<void> encode(const Driver& driver, CUtensorMapDataType type, int element_bytes, const void* data,
                    int columns, const BoxAxes& axes, int row_bytes, int rows, kernel::TensorMap& map) {
  const auto bytes = [&](kernel::i64 stride) { return static_cast<cuuint64_t>(stride * element_bytes); };
  const cuuint64_t extents[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(axes.rows),
                                static_cast<cuuint64_t>(axes.heads), static_cast<cuuint64_t>(axes.batch)};
  const cuuint64_t strides[] = {bytes(axes.row_stride), bytes(axes.head_stride), bytes(axes.batch_stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(row_bytes / element_bytes), static_cast<cuuint32_t>(rows),
                            1, 1};
  const cuuint32_t every[] = {1, 1, 1, 1};
  const CUresult result = driver.cuTensorMapEncodeTiled(
      reinterpret_cast<CUtensorMap*>(&map), type, 4, const_cast<void*>(data), extents, strides, box, every,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(row_bytes), CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return done();
  auto described = driver.check(result, "describing a tensor");
  if (result != CUDA_ERROR_INVALID_VALUE) return described;
  return internal_failure(described.failure().message);  // check() lets no such tensor through
}

}  // namespace

Result<void> encode_panels(const Driver& driver, kernel::DType dtype, const void* data, int head_dim,
                           const BoxAxes& axes, int rows, kernel::TensorMap& map) {
  const auto type =
      dtype == kernel::DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode(driver, type, 2, data, head_dim, axes, kPanelRowBytes, rows, map);
}

Result<void> encode_bias(const Driver& driver, kernel::Bias type, const void* data, int len_k,
                         const BoxAxes& axes, int row_bytes, int rows, kernel::TensorMap& map) {
  return encode(driver, element_of(type), size_of(type), data, len_k, axes, row_bytes, rows, map);
}

}  // namespace attune::runtime
