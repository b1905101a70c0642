#include "tests/support/cuda_copy.h"

#include <fmt/format.h>

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>

namespace attune::test {
namespace {

// The driver's ABI, as far as it is used here; 0 is success everywhere.
struct Driver {
  int (*init)(unsigned flags) = nullptr;
  int (*device_count)(int* count) = nullptr;
  int (*retain_context)(void** context, int device) = nullptr;
  int (*set_context)(void* context) = nullptr;
  int (*synchronize)() = nullptr;
  int (*to_gpu)(std::uint64_t target, const void* source, std::size_t bytes) = nullptr;
  int (*from_gpu)(void* target, std::uint64_t source, std::size_t bytes) = nullptr;
  std::string problem;  // empty when every function was found
};

template <typename Function>
void find(void* library, const char* name, Driver& driver, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) driver.problem = fmt::format("libcuda.so.1 has no {}", name);
}

const Driver& driver() {
  static const Driver loaded = [] {
    Driver result;
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == nullptr) {
      result.problem = dlerror();
      return result;
    }
    find(library, "cuInit", result, result.init);
    find(library, "cuDeviceGetCount", result, result.device_count);
    find(library, "cuDevicePrimaryCtxRetain", result, result.retain_context);
    find(library, "cuCtxSetCurrent", result, result.set_context);
    find(library, "cuCtxSynchronize", result, result.synchronize);
    find(library, "cuMemcpyHtoD_v2", result, result.to_gpu);
    find(library, "cuMemcpyDtoH_v2", result, result.from_gpu);
    return result;
  }();
  return loaded;
}

void check(int status, const char* what) {
  if (status != 0) throw std::runtime_error(fmt::format("{} failed with CUDA error {}", what, status));
}

std::uint64_t address(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer);
}

}  // namespace

std::string use_gpu() {
  const Driver& cuda = driver();
  if (!cuda.problem.empty()) return cuda.problem;
  int count = 0;
  if (const int status = cuda.init(0); status != 0) return fmt::format("cuInit failed with error {}", status);
  check(cuda.device_count(&count), "cuDeviceGetCount");
  if (count == 0) return "the driver sees no GPU";
  void* context = nullptr;
  check(cuda.retain_context(&context, 0), "cuDevicePrimaryCtxRetain");
  check(cuda.set_context(context), "cuCtxSetCurrent");
  return "";
}

void copy_to_gpu(void* target, std::span<const std::byte> source) {
  if (source.empty()) return;
  check(driver().to_gpu(address(target), source.data(), source.size()), "cuMemcpyHtoD");
}

void copy_from_gpu(std::span<std::byte> target, const void* source) {
  check(driver().synchronize(), "cuCtxSynchronize");
  if (target.empty()) return;
  check(driver().from_gpu(target.data(), address(source), target.size()), "cuMemcpyDtoH");
}

}  // namespace attune::test
