// Arch: what a kernel is compiled for. Plain data that any machine can write down, so that source, key and
// candidate choice for an absent GPU or CPU are the same as on the machine itself.
#pragma once

#include "base/result.h"

#include <cstdint>
#include <string>
#include <string_view>

namespace attune::codegen {

enum class Backend : int { cpu, cuda };

/// Instruction sets that CPU kernels are tuned for. avx2 demands AVX2, FMA and F16C (x86-64-v3); avx512
/// demands AVX-512 F, BW, CD, DQ and VL as well (x86-64-v4).
enum class Isa : int { none, avx2, avx512 };

struct Arch {
  Backend backend = Backend::cpu;
  std::string target;  // "sm_90a", "x86-64-v4": what the compiler is told, part of the key

  int sm = 0;                  // CUDA: compute capability, 90 for 9.0
  int shared_bytes = 0;        // CUDA: largest dynamic shared memory of a block
  int max_threads_per_sm = 0;  // CUDA

  Isa isa = Isa::none;  // CPU

  bool operator==(const Arch&) const = default;
};

/// The Arch of "sm_60" ... "sm_121", with or without the suffix 'a' or 'f', and of "x86-64-v3" and
/// "x86-64-v4". Fails with invalid_argument and the list of names for anything else.
Result<Arch> arch_from_name(std::string_view name);

/// The Arch of an NVIDIA GPU of the given compute capability.
Result<Arch> cuda_arch(int sm);

/// The Arch of a CPU with these features. Fails with unsupported below x86-64-v3.
Result<Arch> cpu_arch(Isa isa);

std::string_view name_of(Backend backend);

}  // namespace attune::codegen
