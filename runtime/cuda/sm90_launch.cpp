#include "runtime/cuda/sm90_launch.h"

#include "attune/blocks.h"
#include "attune/cuda/shared.h"
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

using kernel::Sm90Shared;

constexpr i64 kSectionBytes = i64{32} << 20;  // of keys and values that stay in the L2 cache

/// Writes the map of a 16-bit tensor whose boxes are a panel of `rows` rows of one head.
Result<void> encode(const Driver& driver, DType dtype, const void* data, int head_dim, const BoxAxes& axes,
                    int rows, TensorMap& map) {
  const auto bytes = [](i64 stride) { return static_cast<cuuint64_t>(stride) * 2; };
  const cuuint64_t extents[] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(axes.rows),
                                static_cast<cuuint64_t>(axes.heads), static_cast<cuuint64_t>(axes.batch)};
  const cuuint64_t strides[] = {bytes(axes.row_stride), bytes(axes.head_stride), bytes(axes.batch_stride)};
  const cuuint32_t box[] = {Sm90Shared::kPanelElements, static_cast<cuuint32_t>(rows), 1, 1};
  const cuuint32_t every[] = {1, 1, 1, 1};
  const CUresult result = driver.cuTensorMapEncodeTiled(
      reinterpret_cast<CUtensorMap*>(&map),
      dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
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
  ATTUNE_TRY(
      encode(driver, spec.dtype, forward.query, spec.head_dim, query, Sm90Shared::kGroupRows, p.query));
  ATTUNE_TRY(encode(driver, spec.dtype, forward.key, spec.head_dim, key, spec.block_n, p.key));
  ATTUNE_TRY(encode(driver, spec.dtype, forward.value, spec.head_dim_v, value, spec.block_n, p.value));
  ATTUNE_TRY(
      encode(driver, spec.dtype, forward.output, spec.head_dim_v, output, Sm90Shared::kGroupRows, p.output));
  p.forward = forward;
  p.heads = forward.groups * forward.heads;
  p.heads_per_key_head = static_cast<int>(p.heads / key.heads);
  p.row_blocks = static_cast<int>(kernel::tiles_of_head(spec, forward.len_q, forward.sequences.count));
  p.pairs = forward.batch * p.heads;
  p.tiles = p.row_blocks * p.pairs;
  p.section = section_of(spec, p);
  const bool uneven = spec.window_left == kernel::Edge::bounded ||
                      spec.window_right == kernel::Edge::bounded || spec.blocks == kernel::Blocks::varlen;
  if (uneven) p.counter = tile_counter(driver, stream);
  return done();
}

unsigned sm90_blocks(const CudaDevice& device, const ForwardSm90Params& params) {
  return static_cast<unsigned>(std::min(device.multiprocessors, params.tiles));
}

}  // namespace attune::runtime
