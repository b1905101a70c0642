#include "runtime/cuda/cuda_device.h"

#include <fmt/format.h>

#include <array>
#include <mutex>

namespace attune::runtime {
namespace {

constexpr int kMaxDevices = 64;

Result<int> attribute(const Driver& driver, CUdevice device, CUdevice_attribute which) {
  int value = 0;
  ATTUNE_TRY(
      driver.check(driver.cuDeviceGetAttribute(&value, which, device), "asking for a device's attributes"));
  return value;
}

Result<const CudaDevice*> open_device(int index) {
  ATTUNE_ASSIGN(cuda, driver());
  int count = 0;
  ATTUNE_TRY(cuda->check(cuda->cuDeviceGetCount(&count), "counting CUDA devices"));
  if (index < 0 || index >= count) {
    return environment_failure(fmt::format("no CUDA device {}: this process sees {}", index, count));
  }
  CudaDevice device;
  device.driver = cuda;
  ATTUNE_TRY(cuda->check(cuda->cuDeviceGet(&device.handle, index), "opening a CUDA device"));
  std::array<char, 256> name{};
  ATTUNE_TRY(cuda->check(cuda->cuDeviceGetName(name.data(), name.size(), device.handle),
                         "asking for a device's name"));
  device.name = name.data();
  ATTUNE_ASSIGN(major, attribute(*cuda, device.handle, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR));
  ATTUNE_ASSIGN(minor, attribute(*cuda, device.handle, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR));
  ATTUNE_ASSIGN(arch, codegen::cuda_arch(major * 10 + minor));
  device.arch = std::move(arch);
  ATTUNE_ASSIGN(pools, attribute(*cuda, device.handle, CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED));
  device.memory_pools = pools != 0 && cuda->cuMemAllocAsync != nullptr && cuda->cuMemFreeAsync != nullptr;
  ATTUNE_ASSIGN(multiprocessors, attribute(*cuda, device.handle, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT));
  device.multiprocessors = multiprocessors;
  ATTUNE_TRY(cuda->check(cuda->cuDevicePrimaryCtxRetain(&device.primary, device.handle),
                         "opening the device's primary CUDA context"));
  return new CudaDevice(std::move(device));  // lives as long as the process
}

}  // namespace

Result<const CudaDevice*> cuda_device(int index) {
  static std::mutex mutex;
  static std::array<const CudaDevice*, kMaxDevices> opened{};
  if (index < 0 || index >= kMaxDevices) return environment_failure(fmt::format("no CUDA device {}", index));
  const std::lock_guard lock(mutex);
  const CudaDevice*& device = opened[static_cast<std::size_t>(index)];
  if (device != nullptr) return device;
  ATTUNE_ASSIGN(now, open_device(index));  // a failure is not kept: the device may have been busy
  device = now;
  return now;
}

}  // namespace attune::runtime
