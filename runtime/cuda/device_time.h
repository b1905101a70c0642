// Time on a GPU, without the host's.
#pragma once

#include "base/result.h"
#include "runtime/cuda/cuda_device.h"

#include <functional>

namespace attune::runtime {

/// Microseconds that one of `count` calls takes which launch on the default stream. The device is kept busy
/// while the host queues them, so that they run one behind the other. Fails with environment.
Result<double> time_on_device(const CudaDevice& device, int count, const std::function<Result<void>()>& call);

}  // namespace attune::runtime
