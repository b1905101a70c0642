#include "runtime/cpu/plugin_loader.h"

#include "base/installation.h"
#include "runtime/cpu/cpu_backend.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <dlfcn.h>

#include <atomic>
#include <filesystem>
#include <string_view>
#include <system_error>

namespace attune::runtime {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFileName = "libattune_clang.so";

std::atomic<bool> g_loaded{false};

template <typename Function>
bool look_up(void* handle, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  return function != nullptr;
}

/// The plugin in a loaded library, after checking that it is of this build.
Result<Plugin> bind(void* handle, const std::string& path) {
  Plugin plugin{.path = path};
  attune_clang_abi_version_fn abi_version = nullptr;
  if (!look_up(handle, "attune_clang_abi_version", abi_version) ||
      !look_up(handle, "attune_clang_version", plugin.version) ||
      !look_up(handle, "attune_clang_compile", plugin.compile) ||
      !look_up(handle, "attune_clang_free", plugin.free)) {
    return environment_failure(fmt::format("{} is no Attune compiler plugin: reinstall Attune", path));
  }
  if (abi_version() != ATTUNE_CLANG_ABI_VERSION) {
    return environment_failure(
        fmt::format("{} has plugin interface {}, this library needs {}: install both from one build", path,
                    abi_version(), ATTUNE_CLANG_ABI_VERSION));
  }
  if (std::string_view(plugin.version()) != ATTUNE_CLANG_VERSION) {
    // The version is in every kernel's key, so another compiler must not answer for it.
    return environment_failure(
        fmt::format("{} holds Clang {}, this library was built for Clang {}: install both "
                    "from one build",
                    path, plugin.version(), ATTUNE_CLANG_VERSION));
  }
  return plugin;
}

Result<Plugin> load() {
  const std::vector<std::string> candidates = plugin_candidates();
  for (const std::string& path : candidates) {
    std::error_code error;
    if (!fs::exists(path, error)) continue;
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr)
      return environment_failure(fmt::format("cannot load the compiler plugin: {}", dlerror()));
    g_loaded = true;
    return bind(handle, path);
  }
  return environment_failure(fmt::format(
      "no compiler for CPU kernels: {} is not there (looked for {}). Install it beside libattune.so, or "
      "build Attune with LLVM 19",
      kFileName, fmt::join(candidates, ", ")));
}

}  // namespace

std::vector<std::string> plugin_candidates() {
  return installed_candidates(kFileName);
}

const Result<Plugin>& plugin() {
  static const Result<Plugin> instance = load();
  return instance;
}

bool cpu_plugin_loaded() {
  return g_loaded;
}

}  // namespace attune::runtime
