// The CUDA backend: libcuda and libnvrtc, both opened at run time.
#pragma once

#include "base/result.h"
#include "codegen/arch.h"
#include "codegen/unit.h"
#include "runtime/backend.h"

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace attune::runtime {

struct CudaDeviceInfo {
  int index = 0;
  std::string name;
  int sm = 0;
  std::size_t memory_bytes = 0;
  int multiprocessors = 0;
};

/// What was found on this machine, for `attune devices` and `attune doctor`. Never fails: says what is
/// missing.
struct CudaReport {
  bool built_with_cuda = false;  // CUDA headers were there at build time
  std::string driver_path;       // empty: not found
  std::string driver_version;    // "13.0"
  std::string driver_problem;    // why there is no driver or no device; empty when all is well
  std::string nvrtc_path;
  std::string nvrtc_version;  // "13.0"
  std::string nvrtc_problem;
  std::vector<std::string> nvrtc_tried;  // every place that was looked at
  std::vector<int> nvrtc_archs;
  std::vector<CudaDeviceInfo> devices;
};
CudaReport cuda_report();

/// The backend of a device. One per device and process; safe to call from any thread. Fails with environment.
Result<Backend*> cuda_backend(int device_index);

/// NVRTC alone, for machines without a GPU: identity and compilation for any architecture it knows.
Result<codegen::CompilerId> nvrtc_compiler(const codegen::Arch& arch);
/// What nvrtc_compiler() will most likely say, where that can be told without opening NVRTC, which takes
/// longer than all else that a cache hit needs. Only to look for a kernel by.
std::optional<codegen::CompilerId> nvrtc_at_a_glance(const codegen::Arch& arch);
Result<Image> nvrtc_compile(const codegen::Unit& unit);
/// The library that nvrtc_compile() uses; and compilation by it in a process that looks for none, nor for a
/// driver.
Result<std::string> nvrtc_path(const codegen::Arch& arch);
Result<Image> nvrtc_compile_with(const std::string& library, const codegen::Unit& unit);

/// Device memory for the allocating overloads, ordered on the stream. Fails with environment.
Result<void*> cuda_allocate(int device_index, std::size_t bytes, void* stream);
void cuda_free(int device_index, void* pointer, void* stream = nullptr) noexcept;

/// A new copy of host memory on the device, finished on return: any stream may read it. Waits for the
/// stream's earlier work. Fails with environment, and leaves a capture unharmed, while the stream is being
/// captured. Released by cuda_free, once no kernel reads it any more.
Result<const void*> cuda_upload(int device_index, const void* host, std::size_t bytes,
                                void* stream = nullptr);

/// A copy within the device, ordered on the stream. Fails with environment.
Result<void> cuda_copy_on_device(int device_index, void* to, const void* from, std::size_t bytes,
                                 void* stream);

/// Copies between host and device, finished on return and ordered after all earlier work of the device, and
/// the wait for that work alone. For the command and the tests. Fail with environment.
Result<void> cuda_copy_to_device(int device_index, void* device, const void* host, std::size_t bytes);
Result<void> cuda_copy_to_host(int device_index, void* host, const void* device, std::size_t bytes);
Result<void> cuda_synchronize(int device_index);

}  // namespace attune::runtime
