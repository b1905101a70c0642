// The CUDA devices of this process, opened on first use and kept.
#pragma once

#include "base/result.h"
#include "runtime/cuda/cuda_kernel.h"

namespace attune::runtime {

/// The device with its primary context retained. Fails with environment when there is no such device, and
/// with unsupported when it is older than any kernel.
Result<const CudaDevice*> cuda_device(int index);

}  // namespace attune::runtime
