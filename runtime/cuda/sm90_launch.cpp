#include "runtime/cuda/sm90_launch.h"

#include "attune/hd.h"
#include "runtime/boxes.h"
#include "runtime/cuda/tile_counter.h"

#include <algorithm>

namespace attune::runtime {
namespace {

using kernel::DType;
using kernel::ForwardParams;
using kernel::ForwardSm90Params;
using kernel::i64;
using kernel::KernelSpec;
using kernel::TensorMap;

constexpr int kGroupRows = 64;                // queries of a warpgroup
constexpr int kPanelElements = 64;            // 128 bytes, what the swizzle works on
constexpr i64 kSectionBytes = i64{32} << 20;  // of keys and values that stay in the L2 cache
constexpr cuuint64_t kPanelBytes = 2 * kPanelElements;

/// Writes the map of a 16-bit tensor whose boxes are `rows` rows of one head.
Result<void> encode(const Driver& driver, const KernelSpec& spec, const void* data, const BoxAxes& axes,
                    int rows, TensorMap& map) {
  const auto panels = static_cast<cuuint64_t>(spec.head_dim / kPanelElements);
  const auto bytes = [](i64 stride) {
    return static_cast<cuuint64_t>(std::max<i64>(stride, 8)) * 2;
  };  // of one: any
  const cuuint64_t extents[] = {kPanelElements, static_cast<cuuint64_t>(axes.rows), panels,
                                static_cast<cuuint64_t>(axes.heads), static_cast<cuuint64_t>(axes.batch)};
  const cuuint64_t strides[] = {bytes(axes.row_stride), kPanelBytes, bytes(axes.head_stride),
                                bytes(axes.batch_stride)};
  const cuuint32_t box[] = {kPanelElements, static_cast<cuuint32_t>(rows), static_cast<cuuint32_t>(panels), 1,
                            1};
  const cuuint32_t every[] = {1, 1, 1, 1, 1};
  const CUresult result = driver.cuTensorMapEncodeTiled(
      reinterpret_cast<CUtensorMap*>(&map),
      spec.dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5,
      const_cast<void*>(data), extents, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return done();
  return internal_failure(driver.check(result, "describing a tensor").failure().message);
}

/// How many neighbouring (batch, head) pairs have keys and values that fit the L2 cache together.
int section_of(const KernelSpec& spec, const ForwardSm90Params& p) {
  const i64 pair_bytes = i64{p.forward.len_k} * (spec.head_dim + spec.head_dim_v) * 2 / p.heads_per_key_head;
  int section = 1;
  while (section * 2 <= p.pairs && section * 2 * pair_bytes <= kSectionBytes) section *= 2;
  return section;
}

}  // namespace

Result<void> fill_sm90_params(const CudaDevice& device, const KernelSpec& spec, const ForwardParams& forward,
                              CUstream stream, ForwardSm90Params& p) {
  const Driver& driver = *device.driver;
  const BoxAxes query = query_axes(forward, forward.query_strides);
  const BoxAxes key = key_axes(forward, forward.key_strides);
  const BoxAxes value = key_axes(forward, forward.value_strides);
  const BoxAxes output = query_axes(forward, forward.output_strides);
  ATTUNE_TRY(encode(driver, spec, forward.query, query, kGroupRows, p.query));
  ATTUNE_TRY(encode(driver, spec, forward.key, key, spec.block_n, p.key));
  ATTUNE_TRY(encode(driver, spec, forward.value, value, spec.block_n, p.value));
  ATTUNE_TRY(encode(driver, spec, forward.output, output, kGroupRows, p.output));
  p.forward = forward;
  p.heads = forward.groups * forward.heads;
  p.heads_per_key_head = static_cast<int>(p.heads / key.heads);
  p.row_blocks = kernel::ceil_div(forward.len_q, spec.block_m);
  p.pairs = forward.batch * p.heads;
  p.tiles = p.row_blocks * p.pairs;
  p.section = section_of(spec, p);
  const bool window = spec.window_left == kernel::Edge::bounded || spec.window_right == kernel::Edge::bounded;
  if (window) p.counter = tile_counter(driver, stream);
  return done();
}

unsigned sm90_blocks(const CudaDevice& device, const ForwardSm90Params& params) {
  return static_cast<unsigned>(std::min(device.multiprocessors, params.tiles));
}

}  // namespace attune::runtime
