#include "runtime/cuda/grad_bias_sm90_launch.h"

#include "attune/backward.h"
#include "attune/cuda/shared.h"
#include "runtime/boxes.h"
#include "runtime/cuda/tensor_map.h"

#include <algorithm>

namespace attune::runtime {

Result<void> fill_sm90_params(const CudaDevice& device, const kernel::KernelSpec& spec,
                              const kernel::BackwardParams& backward, CUstream /*stream*/,
                              kernel::GradBiasSm90Params& p) {
  const Driver& driver = *device.driver;
  const kernel::ForwardParams& forward = backward.forward;
  const BoxAxes query = query_axes(forward, forward.query_strides);
  const BoxAxes key = key_axes(forward, forward.key_strides);
  const BoxAxes value = key_axes(forward, forward.value_strides);
  const BoxAxes grad_output = query_axes(forward, backward.grad_output_strides);
  const auto panels = [&](const void* data, int head_dim, const BoxAxes& axes, int rows,
                          kernel::TensorMap& map) {
    return encode_panels(driver, spec.dtype, data, head_dim, axes, rows, map);
  };
  ATTUNE_TRY(panels(forward.query, spec.head_dim, query, spec.block_m, p.query));
  ATTUNE_TRY(panels(forward.key, spec.head_dim, key, spec.block_n, p.key));
  ATTUNE_TRY(panels(forward.value, spec.head_dim_v, value, spec.block_n, p.value));
  ATTUNE_TRY(panels(backward.grad_output, spec.head_dim_v, grad_output, spec.block_m, p.grad_output));
  p.backward = backward;
  p.heads = forward.groups * forward.heads;
  p.heads_per_key_head = static_cast<int>(p.heads / key.heads);
  p.slots = static_cast<int>(kernel::bias_slots(spec, backward));
  return add_bias(driver, spec, forward, p.heads, kernel::Sm90Shared(spec).bias_row_bytes, p);
}

unsigned sm90_blocks(const CudaDevice& device, const kernel::GradBiasSm90Params& params) {
  return static_cast<unsigned>(std::min(device.multiprocessors, params.slots));
}

}  // namespace attune::runtime
