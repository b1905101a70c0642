#include "runtime/cuda/loader_path.h"

#include "base/file.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <memory>
#include <string_view>
#include <system_error>
#include <vector>

namespace attune::runtime {
namespace {

namespace fs = std::filesystem;

/// LD_LIBRARY_PATH, the run path and the system's folders, as the loader has them.
std::vector<fs::path> search_path() {
  const std::unique_ptr<void, int (*)(void*)> program(dlopen(nullptr, RTLD_NOW), dlclose);
  Dl_serinfo sizes{};
  if (program == nullptr || dlinfo(program.get(), RTLD_DI_SERINFOSIZE, &sizes) != 0) return {};
  const auto storage = std::make_unique<std::byte[]>(sizes.dls_size);
  auto* info = new (storage.get()) Dl_serinfo(sizes);
  if (dlinfo(program.get(), RTLD_DI_SERINFOSIZE, info) != 0) return {};
  if (dlinfo(program.get(), RTLD_DI_SERINFO, info) != 0) return {};
  std::vector<fs::path> folders;
  for (unsigned i = 0; i < info->dls_cnt; ++i) folders.emplace_back(info->dls_serpath[i].dls_name);
  return folders;
}

/// The first path of /etc/ld.so.cache, whose strings end with zeros, that ends with the name.
std::optional<fs::path> in_loader_cache(const std::string& soname) {
  const auto bytes = read_file("/etc/ld.so.cache");
  if (!bytes.ok()) return std::nullopt;
  const std::string_view cache(reinterpret_cast<const char*>(bytes->data()), bytes->size());
  const std::string end = "/" + soname + '\0';
  const auto found =
      std::search(cache.begin(), cache.end(), std::boyer_moore_horspool_searcher(end.begin(), end.end()));
  if (found == cache.end()) return std::nullopt;
  const auto slash = static_cast<std::size_t>(found - cache.begin());
  const std::size_t begin = cache.rfind('\0', slash) + 1;
  return fs::path(cache.substr(begin, slash - begin)) / soname;
}

}  // namespace

std::optional<fs::path> loader_path(const std::string& soname) {
  for (const fs::path& folder : search_path()) {
    std::error_code error;  // an unreadable folder is an empty one
    if (fs::exists(folder / soname, error)) return folder / soname;
  }
  return in_loader_cache(soname);
}

}  // namespace attune::runtime
