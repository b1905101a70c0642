// The launch of the sm90 kernel of grad_bias: tensor maps.
#pragma once

#include "attune/params.h"
#include "attune/spec.h"
#include "base/result.h"
#include "runtime/cuda/cuda_kernel.h"
#include "runtime/cuda/driver.h"

namespace attune::runtime {

/// Everything that the kernel is told; otherwise as for forward (sm90_launch.h).
Result<void> fill_sm90_params(const CudaDevice& device, const kernel::KernelSpec& spec,
                              const kernel::BackwardParams& backward, CUstream stream,
                              kernel::GradBiasSm90Params& params);

unsigned sm90_blocks(const CudaDevice& device, const kernel::GradBiasSm90Params& params);

}  // namespace attune::runtime
