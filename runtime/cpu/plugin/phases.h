// The two halves of the plugin: source text to an object file (Clang), object file to a shared object (lld).
// Diagnostics come back as text; nothing is printed and nothing touches the disk.
#pragma once

#include "runtime/cpu/plugin/plugin_abi.h"

#include <llvm/ADT/SmallVector.h>

#include <chrono>
#include <string>

namespace attune::plugin {

using Bytes = llvm::SmallVector<char, 0>;

class Stopwatch {
 public:
  /// Milliseconds since the construction or the last call.
  double lap() {
    const auto now = std::chrono::steady_clock::now();
    const std::chrono::duration<double, std::milli> elapsed = now - begin_;
    begin_ = now;
    return elapsed.count();
  }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

/// Fills the phases' times in `result`. False after an error, with the reason in `log`.
bool compile_object(const attune_clang_request& request, attune_clang_result& result, Bytes& object,
                    std::string& log);

/// Links one object file into a shared object. An undefined symbol is an error.
bool link_shared(const Bytes& object, Bytes& image, std::string& log);

}  // namespace attune::plugin
