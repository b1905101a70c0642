// A cubin on a device: loaded once, launched from any context of the device.
#pragma once

#include "attune/spec.h"
#include "runtime/backend.h"
#include "runtime/cuda/driver.h"

#include <cstddef>
#include <memory>
#include <span>

namespace attune::runtime {

struct CudaDevice {
  const Driver* driver = nullptr;
  CUdevice handle = 0;
  CUcontext primary = nullptr;  // retained for the life of the process
  codegen::Arch arch;
  std::string name;
  bool memory_pools = false;
  int multiprocessors = 0;
};

/// Loads a cubin and makes it resident, so that no later launch, and no capture, loads anything. Fails as
/// Backend::load() does.
Result<std::unique_ptr<Kernel>> load_cuda_kernel(const CudaDevice& device, std::span<const std::byte> image,
                                                 const kernel::KernelSpec& spec);

}  // namespace attune::runtime
