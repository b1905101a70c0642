// The launch of an sm90 kernel: tensor maps, and who hands out its tiles.
#pragma once

#include "attune/params.h"
#include "attune/spec.h"
#include "base/result.h"
#include "runtime/cuda/cuda_kernel.h"
#include "runtime/cuda/driver.h"

namespace attune::runtime {

/// Everything that the kernel is told. `stream` is the one of the launch, in the current context. Fails with
/// internal when the driver refuses a tensor map.
Result<void> fill_sm90_params(const CudaDevice& device, const kernel::KernelSpec& spec,
                              const kernel::ForwardParams& forward, CUstream stream,
                              kernel::ForwardSm90Params& params);

/// Blocks of the launch: one for each multiprocessor, or fewer tiles.
unsigned sm90_blocks(const CudaDevice& device, const kernel::ForwardSm90Params& params);

}  // namespace attune::runtime
