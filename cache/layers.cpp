#include "cache/layers.h"

#include "base/env.h"
#include "base/file.h"
#include "cache/pack.h"

#include <fmt/format.h>

#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <memory>
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
  const auto has = [path](const Digest& key) {
    std::error_code error;
    return fs::exists(object_in(path, key), error);
  };
  const auto describe = [path, find] {
    std::vector<std::string> texts;
    for (const Listed& listed : list_objects(path)) {
      auto entry = find(listed.key);
      if (entry.ok() && entry->has_value()) texts.push_back(std::move((*entry)->metadata_json));
    }
    return texts;
  };
  return ReadLayer{.name = path.string(), .find = find, .has = has, .describe = describe};
}

Result<ReadLayer> open_pack(const fs::path& path) {
  ATTUNE_ASSIGN(key, configured_pack_key());
  ATTUNE_ASSIGN(opened, Pack::open(path, key ? &*key : nullptr));
  const auto pack = std::make_shared<const Pack>(std::move(opened));  // a std::function wants to be copied
  return ReadLayer{.name = path.string(),
                   .find = [pack](const Digest& wanted) { return pack->find(wanted); },
                   .has = [pack](const Digest& wanted) { return pack->index().find(wanted).has_value(); },
                   .describe = [pack] { return std::vector{std::string(pack->index().manifest())}; }};
}

}  // namespace

Layers::Layers(Store& store, std::vector<fs::path> paths, std::function<void(const std::string&)> warn,
               std::unique_ptr<Remote> remote)
    : store_(store), paths_(std::move(paths)), warn_(std::move(warn)), remote_(std::move(remote)) {}

void Layers::open() {
  std::call_once(opened_, [this] {
    for (const fs::path& path : paths_) {
      std::error_code error;
      const bool is_pack = fs::is_regular_file(path, error);
      auto layer = is_pack ? open_pack(path) : open_shared_folder(path);
      if (layer.ok()) {
        (is_pack ? packs_ : folders_).push_back(std::move(*layer));
      } else {
        warn_(fmt::format("ATTUNE_CACHE_PATH: {}; it is not read", layer.failure().message));
      }
    }
  });
}

std::optional<Found> Layers::find_in(const std::vector<ReadLayer>& layers, const Digest& key) {
  for (const ReadLayer& layer : layers) {
    auto entry = layer.find(key);
    if (!entry.ok()) {
      warn_(fmt::format("{} ({} in {}); looking elsewhere", entry.failure().message, key.hex(), layer.name));
    } else if (entry->has_value()) {
      shared_hits_.fetch_add(1, std::memory_order_relaxed);
      return Found{.entry = std::move(**entry), .layer = layer.name};
    }
  }
  return std::nullopt;
}

std::optional<Found> Layers::find_in_remote(const Digest& key) {
  if (!remote_) return std::nullopt;
  const auto find = [this](const Digest& wanted) { return remote_->find(wanted); };
  auto found = find_in({{.name = remote_->url(), .find = find, .has = nullptr, .describe = nullptr}}, key);
  if (found) store_.store(found->entry);
  return found;
}

void Layers::store(const Entry& entry) {
  store_.store(entry);
  if (!remote_) return;
  if (const auto sent = remote_->store(entry); !sent.ok()) {
    warn_(fmt::format("{} ({} not sent to {})", sent.failure().message, entry.key.hex(), remote_->url()));
  }
}

std::optional<Found> Layers::find(const Digest& key) {
  open();
  if (auto found = find_in(packs_, key)) return found;
  if (auto entry = store_.find(key)) {
    return Found{.entry = std::move(*entry), .layer = store_.root().string()};
  }
  if (auto found = find_in(folders_, key)) return found;
  if (auto found = find_in_remote(key)) return found;
  const bool looked = store_.mode() == Mode::rw || store_.mode() == Mode::ro || !packs_.empty() ||
                      !folders_.empty() || remote_ != nullptr;
  if (looked) misses_.fetch_add(1, std::memory_order_relaxed);
  return std::nullopt;
}

std::optional<std::string> Layers::locate(const Digest& key) {
  open();
  const auto has = [&](const ReadLayer& layer) {
    const auto entry = layer.find(key);
    return entry.ok() && entry->has_value();
  };
  if (const auto pack = std::ranges::find_if(packs_, has); pack != packs_.end()) return pack->name;
  if (store_.inspect(key).ok()) return store_.root().string();
  if (const auto folder = std::ranges::find_if(folders_, has); folder != folders_.end()) return folder->name;
  return std::nullopt;
}

bool Layers::may_have(const Digest& key) {
  open();
  const auto has = [&](const ReadLayer& layer) { return layer.has(key); };
  return std::ranges::any_of(packs_, has) || store_.may_have(key) || std::ranges::any_of(folders_, has);
}

std::vector<std::string> Layers::descriptions() {
  open();
  std::vector<std::string> all;
  const auto add = [&](const ReadLayer& layer) {
    auto texts = layer.describe();
    std::ranges::move(texts, std::back_inserter(all));
  };
  std::ranges::for_each(packs_, add);
  if (store_.mode() == Mode::rw || store_.mode() == Mode::ro) {
    for (const Listed& listed : store_.list()) {
      auto entry = store_.inspect(listed.key);
      if (entry.ok()) all.push_back(std::move(entry->metadata_json));
    }
  }
  std::ranges::for_each(folders_, add);
  return all;
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
