#include "tools/occupancy.h"

#include "codegen/arch.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>

namespace attune::tools {
namespace {

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the arithmetic and the
// blocks of an SM are those of the toolkit's cuda_occupancy.h, which a test compares. Every one has 65536
// registers.
struct SmLimits {
  int compute_capability;
  int threads;
  int blocks;
  int shared_kilobytes;
};

constexpr std::array kSms{
    SmLimits{60, 2048, 32, 64},   SmLimits{61, 2048, 32, 96},   SmLimits{62, 2048, 32, 64},
    SmLimits{70, 2048, 32, 96},   SmLimits{72, 2048, 32, 96},   SmLimits{75, 1024, 16, 64},
    SmLimits{80, 2048, 32, 164},  SmLimits{86, 1536, 16, 100},  SmLimits{87, 1536, 16, 164},
    SmLimits{89, 1536, 24, 100},  SmLimits{90, 2048, 32, 228},  SmLimits{100, 2048, 32, 228},
    SmLimits{103, 2048, 32, 228}, SmLimits{110, 1536, 24, 228}, SmLimits{120, 1536, 24, 100},
    SmLimits{121, 1536, 24, 100},
};

constexpr int kWarp = 32;
constexpr int kRegisters = 65536;
constexpr int kRegistersOfWarp = 256;  // granule of allocation

// https://developer.nvidia.com/cuda-gpus
struct NamedGpu {
  std::string_view name;
  int compute_capability;
};
constexpr std::array kNamed{NamedGpu{"P100", 60},    NamedGpu{"V100", 70},  NamedGpu{"T4", 75},
                            NamedGpu{"A100", 80},    NamedGpu{"A10", 86},   NamedGpu{"A40", 86},
                            NamedGpu{"RTX3090", 86}, NamedGpu{"L4", 89},    NamedGpu{"L40S", 89},
                            NamedGpu{"RTX4090", 89}, NamedGpu{"H100", 90},  NamedGpu{"H200", 90},
                            NamedGpu{"B200", 100},   NamedGpu{"B300", 103}, NamedGpu{"RTX5090", 120}};

std::string without_spaces(std::string_view text) {
  std::string plain;
  for (const char c : text) {
    if (c != ' ') plain += static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  }
  return plain;
}

int round_up(int value, int granule) {
  return (value + granule - 1) / granule * granule;
}

/// A warp's registers come from its quarter of the SM, or half on compute capability 6.0. A block is checked
/// as if all quarters had as many of its warps.
int blocks_by_registers(const BlockNeeds& needs, int warps, int compute_capability) {
  const int of_warp = round_up(std::max(needs.registers, 1) * kWarp, kRegistersOfWarp);
  if (of_warp * round_up(warps, 4) > kRegisters) return 0;
  const int parts = compute_capability == 60 ? 2 : 4;
  return kRegisters / parts / of_warp * parts / warps;
}

/// From compute capability 8.0 on the driver keeps a kilobyte of each block.
int blocks_by_shared_memory(const BlockNeeds& needs, const SmLimits& sm) {
  const bool ampere = sm.compute_capability >= 80;
  const int of_block = round_up(needs.shared_bytes + (ampere ? 1024 : 0), ampere ? 128 : 256);
  return of_block == 0 ? sm.blocks : sm.shared_kilobytes * 1024 / of_block;
}

}  // namespace

Result<int> compute_capability_of(std::string_view gpu) {
  const std::string plain = without_spaces(gpu);
  const auto* found = std::ranges::find(kNamed, plain, &NamedGpu::name);
  if (found != kNamed.end()) return found->compute_capability;
  if (const auto arch = codegen::arch_from_name(gpu); arch.ok() && arch->sm > 0) return arch->sm;
  std::string known;
  for (const NamedGpu& named : kNamed) known += fmt::format(" {}", named.name);
  return invalid_argument(fmt::format("unknown GPU '{}': known are sm_60 to sm_121 and{}", gpu, known));
}

Result<Occupancy> occupancy(const BlockNeeds& needs, int compute_capability) {
  const auto* sm = std::ranges::find(kSms, compute_capability, &SmLimits::compute_capability);
  if (sm == kSms.end()) {
    return invalid_argument(fmt::format("the limits of compute capability {}.{} are not known",
                                        compute_capability / 10, compute_capability % 10));
  }
  const int warps = std::max(round_up(needs.threads, kWarp) / kWarp, 1);
  const std::array<std::pair<int, const char*>, 4> limits{
      {{blocks_by_registers(needs, warps, compute_capability), "registers"},
       {blocks_by_shared_memory(needs, *sm), "shared memory"},
       {sm->threads / kWarp / warps, "threads"},
       {sm->blocks, "blocks"}}};
  const auto [blocks, limit] = *std::ranges::min_element(limits, {}, &std::pair<int, const char*>::first);
  return Occupancy{
      .blocks = blocks, .warps = blocks * warps, .max_warps = sm->threads / kWarp, .limit = limit};
}

}  // namespace attune::tools
