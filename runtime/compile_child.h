// Compilers in a process of their own: one that crashes or never ends costs a call an error, not the process.
#pragma once

#include "base/result.h"
#include "codegen/unit.h"
#include "runtime/backend.h"

#include <chrono>
#include <filesystem>

namespace attune::runtime {

struct CompileChild {
  std::filesystem::path program;                              // empty: attune-compile of this installation
  std::chrono::milliseconds limit = std::chrono::minutes(5);  // of one kernel, from start to answer
};

/// compile_for() in a new process, which inherits no lock, thread, signal handler, file or state of a device.
/// Fails with what the compiler says; with environment when it does not live to say it, naming its signal or
/// the limit.
Result<Image> compile_in_child(const codegen::Unit& unit, const CompileChild& child);

}  // namespace attune::runtime
