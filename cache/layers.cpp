#include "cache/layers.h"

#include "base/env.h"
#include "base/file.h"

#include <fmt/format.h>

#include <unistd.h>

#include <sstream>
#include <system_error>
#include <utility>

namespace attune::cache {
namespace {

namespace fs = std::filesystem;

constexpr uid_t kRoot = 0;

/// A cache that others keep. Who names a folder trusts its owner; docs/threat_model.md says how far.
Result<ReadLayer> open_shared_folder(const fs::path& path) {
  ATTUNE_ASSIGN(owner, check_shared_directory(path));
  const auto find = [path, owner](const Digest& key) -> Result<std::optional<Entry>> {
    ATTUNE_ASSIGN(bytes, read_file_of(object_in(path, key), {::geteuid(), kRoot, owner}));
    if (!bytes) return std::optional<Entry>();
    ATTUNE_ASSIGN(entry, decode(*bytes, key));
    return std::optional(std::move(entry));
  };
  return ReadLayer{.name = path.string(), .find = find};
}

}  // namespace

Layers::Layers(Store& store, std::vector<fs::path> paths, std::function<void(const std::string&)> warn)
    : store_(store), paths_(std::move(paths)), warn_(std::move(warn)) {}

const std::vector<ReadLayer>& Layers::shared() {
  std::call_once(opened_, [this] {
    for (const fs::path& path : paths_) {
      auto layer = open_shared_folder(path);
      if (layer.ok()) {
        shared_.push_back(std::move(*layer));
      } else {
        warn_(fmt::format("ATTUNE_CACHE_PATH: {}; it is not read", layer.failure().message));
      }
    }
  });
  return shared_;
}

std::optional<Found> Layers::find(const Digest& key) {
  if (auto entry = store_.find(key)) {
    return Found{.entry = std::move(*entry), .layer = store_.root().string()};
  }
  for (const ReadLayer& layer : shared()) {
    auto entry = layer.find(key);
    if (!entry.ok()) {
      warn_(fmt::format("{} ({} in {}); looking elsewhere", entry.failure().message, key.hex(), layer.name));
    } else if (entry->has_value()) {
      shared_hits_.fetch_add(1, std::memory_order_relaxed);
      return Found{.entry = std::move(**entry), .layer = layer.name};
    }
  }
  const bool looked = store_.mode() == Mode::rw || store_.mode() == Mode::ro || !shared().empty();
  if (looked) misses_.fetch_add(1, std::memory_order_relaxed);
  return std::nullopt;
}

std::optional<std::string> Layers::locate(const Digest& key) {
  if (store_.inspect(key).ok()) return store_.root().string();
  for (const ReadLayer& layer : shared()) {
    const auto entry = layer.find(key);
    if (entry.ok() && entry->has_value()) return layer.name;
  }
  return std::nullopt;
}

std::vector<fs::path> shared_paths() {
  std::vector<fs::path> paths;
  std::istringstream list(env("ATTUNE_CACHE_PATH").value_or(""));
  for (std::string element; std::getline(list, element, ':');) {
    if (element.empty()) continue;
    std::error_code error;
    fs::path path = fs::absolute(element, error);  // now: the program may change its folder later
    paths.push_back(error ? fs::path(element) : std::move(path));
  }
  return paths;
}

}  // namespace attune::cache
