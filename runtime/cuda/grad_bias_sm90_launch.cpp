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
  ATTUNE_TRY(add_tiles(driver, spec, backward, p));
  p.backward = backward;
  p.heads = forward.groups * forward.heads;
  p.heads_per_key_head = static_cast<int>(p.heads / key_axes(forward, forward.key_strides).heads);
  p.slots = static_cast<int>(kernel::bias_slots(spec, backward));
  return add_bias(driver, spec, forward, p.heads, kernel::Sm90Shared(spec).bias_row_bytes, p);
}

unsigned sm90_blocks(const CudaDevice& device, const kernel::GradBiasSm90Params& params) {
  return static_cast<unsigned>(std::min(device.multiprocessors, params.slots));
}

}  // namespace attune::runtime
