#include "codegen/arch.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

namespace attune::codegen {
namespace {

// Compute capabilities and their limits: CUDA C++ Programming Guide, "Technical Specifications per Compute
// Capability".
struct GpuLimits {
  int sm;
  int shared_bytes;  // opt-in limit of one block
  int threads_per_sm;
  bool specific;  // has an architecture-specific target with suffix 'a'
};

constexpr int kKilobyte = 1024;
constexpr std::array kGpus{
    GpuLimits{60, 48 * kKilobyte, 2048, false},  GpuLimits{61, 48 * kKilobyte, 2048, false},
    GpuLimits{62, 48 * kKilobyte, 2048, false},  GpuLimits{70, 96 * kKilobyte, 2048, false},
    GpuLimits{72, 96 * kKilobyte, 2048, false},  GpuLimits{75, 64 * kKilobyte, 1024, false},
    GpuLimits{80, 163 * kKilobyte, 2048, false}, GpuLimits{86, 99 * kKilobyte, 1536, false},
    GpuLimits{87, 163 * kKilobyte, 1536, false}, GpuLimits{88, 163 * kKilobyte, 1536, false},
    GpuLimits{89, 99 * kKilobyte, 1536, false},  GpuLimits{90, 227 * kKilobyte, 2048, true},
    GpuLimits{100, 227 * kKilobyte, 2048, true}, GpuLimits{103, 227 * kKilobyte, 2048, true},
    GpuLimits{110, 227 * kKilobyte, 1536, true}, GpuLimits{120, 99 * kKilobyte, 1536, true},
    GpuLimits{121, 99 * kKilobyte, 1536, true},
};

const GpuLimits* find_gpu(int sm) {
  const auto* found = std::ranges::find(kGpus, sm, &GpuLimits::sm);
  return found == kGpus.end() ? nullptr : found;
}

Arch arch_of(const GpuLimits& gpu, std::string_view suffix) {
  return {.backend = Backend::cuda,
          .target = fmt::format("sm_{}{}", gpu.sm, suffix),
          .sm = gpu.sm,
          .shared_bytes = gpu.shared_bytes,
          .max_threads_per_sm = gpu.threads_per_sm};
}

Failure unknown_arch(std::string_view name) {
  std::string known;
  for (const GpuLimits& gpu : kGpus) known += fmt::format("sm_{}{} ", gpu.sm, gpu.specific ? "a" : "");
  return invalid_argument(
      fmt::format("unknown architecture '{}': known are {}x86-64-v3 x86-64-v4", name, known));
}

}  // namespace

std::string_view name_of(Backend backend) {
  return backend == Backend::cpu ? "cpu" : "cuda";
}

Result<Arch> cpu_arch(Isa isa) {
  switch (isa) {
    case Isa::avx512: return Arch{.backend = Backend::cpu, .target = "x86-64-v4", .isa = isa};
    case Isa::avx2: return Arch{.backend = Backend::cpu, .target = "x86-64-v3", .isa = isa};
    case Isa::none: break;
  }
  return unsupported("this CPU lacks AVX2, FMA or F16C: CPU kernels need x86-64-v3 (2013) or later");
}

Result<Arch> cuda_arch(int sm) {
  const GpuLimits* gpu = find_gpu(sm);
  if (gpu == nullptr) {
    return unsupported(
        fmt::format("no kernels for compute capability {}.{}: Attune knows 6.0 to 12.1", sm / 10, sm % 10));
  }
  return arch_of(*gpu, gpu->specific ? "a" : "");
}

Result<Arch> arch_from_name(std::string_view name) {
  if (name == "x86-64-v3") return cpu_arch(Isa::avx2);
  if (name == "x86-64-v4") return cpu_arch(Isa::avx512);
  if (!name.starts_with("sm_")) return unknown_arch(name);
  std::string_view digits = name.substr(3);
  std::string_view suffix;
  if (digits.ends_with('a') || digits.ends_with('f')) {
    suffix = digits.substr(digits.size() - 1);
    digits.remove_suffix(1);
  }
  int sm = 0;
  if (digits.empty() || digits.size() > 3) return unknown_arch(name);
  for (const char digit : digits) {
    if (digit < '0' || digit > '9') return unknown_arch(name);
    sm = sm * 10 + (digit - '0');
  }
  const GpuLimits* gpu = find_gpu(sm);
  if (gpu == nullptr || (!suffix.empty() && !gpu->specific)) return unknown_arch(name);
  return arch_of(*gpu, suffix);
}

}  // namespace attune::codegen
