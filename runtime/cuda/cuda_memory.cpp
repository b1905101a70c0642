// Device memory for the allocating overloads, and copies for the command and the tests.
#include "runtime/cuda/cuda_backend.h"
#include "runtime/cuda/cuda_device.h"

#include <fmt/format.h>

namespace attune::runtime {
namespace {

/// Runs `work(driver)` in a context of the device.
template <typename Work>
Result<void> in_context(int device_index, const char* what, Work&& work) {
  ATTUNE_ASSIGN(device, cuda_device(device_index));
  ATTUNE_ASSIGN(scope, ScopedContext::enter(*device->driver, device->handle, device->primary));
  return device->driver->check(work(*device), what);
}

CUdeviceptr address_of(const void* pointer) {
  return reinterpret_cast<CUdeviceptr>(pointer);
}

}  // namespace

Result<void*> cuda_allocate(int device_index, std::size_t bytes, void* stream) {
  CUdeviceptr address = 0;
  const std::string what = fmt::format("allocating {} bytes on CUDA device {}", bytes, device_index);
  ATTUNE_TRY(in_context(device_index, what.c_str(), [&](const CudaDevice& device) {
    const Driver& driver = *device.driver;
    if (device.memory_pools) return driver.cuMemAllocAsync(&address, bytes, static_cast<CUstream>(stream));
    const RelaxedCapture relaxed(driver);
    return driver.cuMemAlloc(&address, bytes);
  }));
  return reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr): a device address
}

void cuda_free(int device_index, void* pointer, void* stream) noexcept {
  // Fails only when the driver is gone, at the process's end; the memory is gone with it.
  (void)in_context(device_index, "freeing device memory", [&](const CudaDevice& device) {
    const Driver& driver = *device.driver;
    if (device.memory_pools) return driver.cuMemFreeAsync(address_of(pointer), static_cast<CUstream>(stream));
    const RelaxedCapture relaxed(driver);
    return driver.cuMemFree(address_of(pointer));
  });
}

Result<const void*> cuda_upload(int device_index, const void* host, std::size_t bytes, void* stream) {
  ATTUNE_ASSIGN(device, cuda_device(device_index));
  const Driver& driver = *device->driver;
  ATTUNE_ASSIGN(scope, ScopedContext::enter(driver, device->handle, device->primary));
  const auto queue = static_cast<CUstream>(stream);
  ATTUNE_TRY(check_not_captured(
      driver, queue,
      "a host list of sequence lengths or pages is not on the GPU yet and the stream is being captured into "
      "a graph: run the call once with the same bias before the capture begins, or give device tensors"));
  const RelaxedCapture relaxed(driver);
  ATTUNE_ASSIGN(copy, cuda_allocate(device_index, bytes, stream));
  auto copied =
      driver.check(driver.cuMemcpyHtoDAsync(address_of(copy), host, bytes, queue), "copying a list to a GPU");
  if (copied.ok()) copied = driver.check(driver.cuStreamSynchronize(queue), "copying a list to a GPU");
  if (!copied.ok()) {
    cuda_free(device_index, copy);
    return copied.failure();
  }
  return copy;
}

Result<void> cuda_copy_on_device(int device_index, void* to, const void* from, std::size_t bytes,
                                 void* stream) {
  return in_context(device_index, "copying within a CUDA device", [&](const CudaDevice& device) {
    return device.driver->cuMemcpyDtoDAsync(address_of(to), address_of(from), bytes,
                                            static_cast<CUstream>(stream));
  });
}

Result<void> cuda_copy_to_device(int device_index, void* device, const void* host, std::size_t bytes) {
  ATTUNE_TRY(cuda_synchronize(device_index));
  return in_context(device_index, "copying to a CUDA device", [&](const CudaDevice& target) {
    return target.driver->cuMemcpyHtoD(address_of(device), host, bytes);
  });
}

Result<void> cuda_copy_to_host(int device_index, void* host, const void* device, std::size_t bytes) {
  ATTUNE_TRY(cuda_synchronize(device_index));
  return in_context(device_index, "copying from a CUDA device", [&](const CudaDevice& source) {
    return source.driver->cuMemcpyDtoH(host, address_of(device), bytes);
  });
}

Result<void> cuda_synchronize(int device_index) {
  return in_context(device_index, "waiting for a CUDA device",
                    [](const CudaDevice& device) { return device.driver->cuCtxSynchronize(); });
}

}  // namespace attune::runtime
