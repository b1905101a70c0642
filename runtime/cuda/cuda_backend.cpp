#include "runtime/cuda/cuda_backend.h"

#include "runtime/cuda/cuda_device.h"
#include "runtime/cuda/device_time.h"
#include "runtime/cuda/driver.h"
#include "runtime/cuda/nvrtc.h"

#include <fmt/format.h>

#include <map>
#include <mutex>

namespace attune::runtime {
namespace {

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(const CudaDevice& device) : device_(device) {}

  const codegen::Arch& arch() const override { return device_.arch; }
  int multiprocessors() const override { return device_.multiprocessors; }
  Result<codegen::CompilerId> compiler() override { return nvrtc_compiler(device_.arch); }
  Result<Image> compile(const codegen::Unit& unit) override { return nvrtc_compile(unit); }

  Result<std::unique_ptr<Kernel>> load(std::span<const std::byte> image,
                                       const kernel::KernelSpec& spec) override {
    return load_cuda_kernel(device_, image, spec);
  }

  Result<void> may_load(void* stream) override {
    ATTUNE_ASSIGN(scope, ScopedContext::enter(*device_.driver, device_.handle, device_.primary));
    return check_not_captured(
        *device_.driver, static_cast<CUstream>(stream),
        "this kernel is not loaded yet and the stream is being captured into a graph: call prepare() with "
        "the same arguments, or run the call once, before the capture begins; or set ATTUNE_CAPTURE=compile");
  }

  std::string description() const override {
    return fmt::format("{} ({})", device_.name, device_.arch.target);
  }

  Result<double> microseconds(int count, const std::function<Result<void>()>& call) override {
    return time_on_device(device_, count, call);
  }

 private:
  const CudaDevice& device_;
};

void report_driver(CudaReport& report) {
  const auto opened = driver();
  if (!opened.ok()) {
    report.driver_problem = opened.failure().message;
    return;
  }
  const Driver& cuda = **opened;
  report.driver_path = cuda.path;
  report.driver_version = cuda_version_text(cuda.version);
  int count = 0;
  if (const auto counted = cuda.check(cuda.cuDeviceGetCount(&count), "counting CUDA devices");
      !counted.ok()) {
    report.driver_problem = counted.failure().message;
    return;
  }
  if (count == 0) report.driver_problem = "the CUDA driver sees no device";
  for (int index = 0; index < count; ++index) {
    const auto device = cuda_device(index);
    if (!device.ok()) {
      report.driver_problem = fmt::format("device {}: {}", index, device.failure().message);
      continue;
    }
    CudaDeviceInfo info{.index = index, .name = (*device)->name, .sm = (*device)->arch.sm};
    const CUdevice handle = (*device)->handle;
    const bool known =
        cuda.cuDeviceTotalMem(&info.memory_bytes, handle) == CUDA_SUCCESS &&
        cuda.cuDeviceGetAttribute(&info.multiprocessors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, handle) ==
            CUDA_SUCCESS;
    if (!known) report.driver_problem = fmt::format("device {} does not tell its size", index);
    report.devices.push_back(std::move(info));
  }
}

void report_nvrtc(CudaReport& report) {
  NvrtcSearch search = search_nvrtc();
  report.nvrtc_tried = std::move(search.tried);
  if (!search.found.ok()) {
    report.nvrtc_problem = search.found.failure().message;
    return;
  }
  const Nvrtc& nvrtc = **search.found;
  report.nvrtc_path = nvrtc.path();
  report.nvrtc_version = fmt::format("{}.{}", nvrtc.major(), nvrtc.minor());
  report.nvrtc_archs = nvrtc.archs();
}

}  // namespace

CudaReport cuda_report() {
  CudaReport report;
  report.built_with_cuda = true;
  report_driver(report);
  report_nvrtc(report);
  return report;
}

Result<Backend*> cuda_backend(int device_index) {
  static std::mutex mutex;
  static auto* backends = new std::map<int, std::unique_ptr<CudaBackend>>;  // outlive every thread
  ATTUNE_ASSIGN(device, cuda_device(device_index));
  const std::lock_guard lock(mutex);
  auto& backend = (*backends)[device_index];
  if (backend == nullptr) backend = std::make_unique<CudaBackend>(*device);
  return backend.get();
}

Result<codegen::CompilerId> nvrtc_compiler(const codegen::Arch& arch) {
  ATTUNE_ASSIGN(nvrtc, nvrtc_for(arch));
  return codegen::CompilerId{nvrtc->identity(), nvrtc->options(arch)};
}

Result<Image> nvrtc_compile(const codegen::Unit& unit) {
  ATTUNE_ASSIGN(nvrtc, nvrtc_for(unit.arch));
  return nvrtc->compile(unit);
}

Result<std::string> nvrtc_path(const codegen::Arch& arch) {
  ATTUNE_ASSIGN(nvrtc, nvrtc_for(arch));
  return nvrtc->path();
}

Result<Image> nvrtc_compile_with(const std::string& library, const codegen::Unit& unit) {
  ATTUNE_ASSIGN(nvrtc, Nvrtc::open(library));
  return nvrtc.compile(unit);
}

}  // namespace attune::runtime
