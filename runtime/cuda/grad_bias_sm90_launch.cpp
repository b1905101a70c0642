#include "runtime/cuda/grad_bias_sm90_launch.h"

#include "attune/backward.h"
#include "attune/cuda/shared.h"
#include "runtime/boxes.h"
#include "runtime/cuda/tensor_map.h"

#include <algorithm>

namespace attune::runtime {
namespace {

constexpr int kMostSlotBlocks = 8;  // of a cluster, on every GPU that has them

/// Blocks that share a slot: of a bias of one row, while there are multiprocessors for them.
int slot_blocks_of(const CudaDevice& device, const kernel::GradBiasSm90Params& p) {
  int blocks = 1;
  if (p.backward.bias_rows != 1 || device.driver->cuLaunchKernelEx == nullptr) return blocks;
  while (blocks < kMostSlotBlocks && kernel::i64{2} * blocks * p.slots <= device.multiprocessors) blocks *= 2;
  return blocks;
}

}  // namespace

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
  p.slot_blocks = slot_blocks_of(device, p);
  return add_bias(driver, spec, forward, p.heads, kernel::Sm90Shared(spec).bias_row_bytes, p);
}

unsigned sm90_blocks(const CudaDevice& device, const kernel::GradBiasSm90Params& params) {
  return static_cast<unsigned>(std::min(device.multiprocessors, params.slots * params.slot_blocks));
}

}  // namespace attune::runtime
