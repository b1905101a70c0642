#include "tools/device_option.h"

#include "runtime/cuda/cuda_backend.h"
#include "runtime/engine.h"

#include <fmt/format.h>

#include <charconv>

namespace attune::tools {
namespace {

constexpr std::string_view kCudaPrefix = "cuda:";

Result<Device> native_device() {
  ATTUNE_ASSIGN(options, runtime::EngineOptions::from_environment());
  if (options.backend == runtime::BackendChoice::cpu) return Device{};
  if (options.backend == runtime::BackendChoice::cuda) return Device{.type = DeviceType::cuda};
  return Device{.type = runtime::cuda_backend(0).ok() ? DeviceType::cuda : DeviceType::cpu};
}

}  // namespace

Result<Device> parse_device(const std::string& text) {
  if (text == "auto") return native_device();
  if (text == "cpu") return Device{};
  if (text == "cuda") return Device{.type = DeviceType::cuda};
  Device device{.type = DeviceType::cuda};
  if (text.starts_with(kCudaPrefix)) {
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data() + kCudaPrefix.size(), end, device.index);
    if (error == std::errc() && stop == end && device.index >= 0) return device;
  }
  return invalid_argument(fmt::format("--device {}: expected auto, cpu, cuda or cuda:N", text));
}

std::string to_text(Device device) {
  return device.type == DeviceType::cpu ? "cpu" : fmt::format("{}{}", kCudaPrefix, device.index);
}

Result<codegen::Arch> parse_arch(const std::string& text) {
  if (text != kNativeArch) return codegen::arch_from_name(text);
  ATTUNE_ASSIGN(device, native_device());
  ATTUNE_ASSIGN(backend, runtime::backend_of(device));
  return backend->arch();
}

}  // namespace attune::tools
