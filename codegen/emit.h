// Spec -> source text: one constexpr KernelSpec with named fields and an extern "C" entry point.
#pragma once

#include "attune/spec.h"
#include "codegen/arch.h"

#include <string>

namespace attune::codegen {

/// The name of the entry point of every generated kernel.
inline constexpr const char* kEntryName = "attune_kernel";

/// CPU kernels also export `int attune_scratch_bytes()`: scratch memory per thread.
inline constexpr const char* kScratchName = "attune_scratch_bytes";

std::string emit(const kernel::KernelSpec& spec, const Arch& arch);

/// "dtype=f16 head_dim=64 ...": every field in order; the canonical text that the key hashes.
std::string describe(const kernel::KernelSpec& spec);

}  // namespace attune::codegen
