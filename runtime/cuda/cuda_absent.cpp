// The CUDA backend of a library that was built without CUDA headers: the same interface, and what is missing.
#include "runtime/cuda/cuda_backend.h"

namespace attune::runtime {
namespace {

constexpr const char* kAbsent =
    "this build of Attune has no CUDA backend: its build machine had no CUDA headers (cuda.h, nvrtc.h). "
    "Install a CUDA "
    "toolkit or the PyPI wheels nvidia-cuda-runtime and nvidia-cuda-nvrtc and build again, or use CPU "
    "tensors";

Failure absent() {
  return environment_failure(kAbsent);
}

}  // namespace

CudaReport cuda_report() {
  CudaReport report;
  report.driver_problem = kAbsent;
  report.nvrtc_problem = kAbsent;
  return report;
}
Result<Backend*> cuda_backend(int) {
  return absent();
}
Result<codegen::CompilerId> nvrtc_compiler(const codegen::Arch&) {
  return absent();
}
std::optional<codegen::CompilerId> nvrtc_at_a_glance(const codegen::Arch&) {
  return std::nullopt;
}
Result<Image> nvrtc_compile(const codegen::Unit&) {
  return absent();
}
Result<std::string> nvrtc_path(const codegen::Arch&) {
  return absent();
}
Result<Image> nvrtc_compile_with(const std::string&, const codegen::Unit&) {
  return absent();
}
Result<void*> cuda_allocate(int, std::size_t, void*) {
  return absent();
}
void cuda_free(int, void*, void*) noexcept {}
Result<const void*> cuda_upload(int, const void*, std::size_t, void*) {
  return absent();
}
Result<void> cuda_copy_on_device(int, void*, const void*, std::size_t, void*) {
  return absent();
}
Result<void> cuda_copy_to_device(int, void*, const void*, std::size_t) {
  return absent();
}
Result<void> cuda_copy_to_host(int, void*, const void*, std::size_t) {
  return absent();
}
Result<void> cuda_synchronize(int) {
  return absent();
}

}  // namespace attune::runtime
