#include "base/installation.h"

#include <dlfcn.h>

#include <algorithm>
#include <filesystem>
#include <system_error>

namespace attune {
namespace {

namespace fs = std::filesystem;

/// The folder of the library or program that contains this code; empty when unknown.
fs::path own_folder() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&installed_candidates), &info) == 0 || info.dli_fname == nullptr)
    return {};
  std::error_code error;
  const fs::path path = fs::canonical(info.dli_fname, error);
  return error ? fs::path() : path.parent_path();
}

fs::path program_folder() {
  std::error_code error;
  const fs::path path = fs::read_symlink("/proc/self/exe", error);
  return error ? fs::path() : path.parent_path();
}

}  // namespace

std::vector<std::string> installed_candidates(const std::string& file_name) {
  std::vector<std::string> candidates;
  const auto add = [&](const fs::path& folder, const char* relative) {
    if (folder.empty()) return;
    const std::string path = (folder / relative / file_name).lexically_normal().string();
    if (std::ranges::find(candidates, path) == candidates.end()) candidates.push_back(path);
  };
  add(own_folder(), "");
  add(program_folder(), "../lib");
  add(program_folder(), "../" ATTUNE_INSTALL_LIBDIR);
  return candidates;
}

}  // namespace attune
