// The CPU backend: Clang/LLVM in a separately loaded plugin, kernels as shared objects, a thread pool.
#pragma once

#include "base/result.h"
#include "codegen/arch.h"
#include "runtime/backend.h"

#include <string>

namespace attune::runtime {

struct CpuReport {
  codegen::Isa isa = codegen::Isa::none;
  std::string isa_problem;  // empty when kernels can run here
  int threads = 0;
  std::string plugin_path;     // empty: not found
  std::string plugin_version;  // "clang 19.1.7"
  std::string plugin_problem;  // empty when all is well
  std::vector<std::string> plugin_tried;
};
/// For `attune doctor`; loads the plugin.
CpuReport cpu_report();

/// The process's CPU backend. Fails with unsupported on CPUs below x86-64-v3.
Result<Backend*> cpu_backend();

/// Was LLVM loaded in this process? A cache hit must not.
bool cpu_plugin_loaded();

/// Clang alone, for any CPU architecture: identity (no LLVM loaded) and compilation.
codegen::CompilerId clang_compiler(const codegen::Arch& arch);
Result<Image> clang_compile(const codegen::Unit& unit);

}  // namespace attune::runtime
