// The compiler plugin, libattune_clang.so: where it is looked for, and whether it is the one that was built
// with this library.
#pragma once

#include "base/result.h"
#include "runtime/cpu/plugin/plugin_abi.h"

#include <string>
#include <vector>

namespace attune::runtime {

struct Plugin {
  std::string path;
  attune_clang_version_fn version = nullptr;
  attune_clang_compile_fn compile = nullptr;
  attune_clang_free_fn free = nullptr;
};

/// Loads the plugin at first use; later calls return the same plugin or the same failure (environment).
const Result<Plugin>& plugin();

/// Files that plugin() looks for, in order.
std::vector<std::string> plugin_candidates();

}  // namespace attune::runtime
