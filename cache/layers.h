// Layers: all places where a compiled kernel may be. On disk only the user's own cache is ever written. What
// a pack or a folder has is not copied into it, what the remote has is.
#pragma once

#include "cache/entry.h"
#include "cache/remote.h"
#include "cache/store.h"

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace attune::cache {

struct Found {
  Entry entry;
  std::string layer;  // its path or URL
};

/// A layer that is only read, by any thread: the verified entry, nothing, or why it can't be had.
struct ReadLayer {
  std::string name;
  std::function<Result<std::optional<Entry>>(const Digest&)> find;
  /// Whether there is something for find() to verify.
  std::function<bool(const Digest&)> has;
  /// JSON texts: a pack's manifest, or the metadata of a folder's entries, all of which are read for it.
  std::function<std::vector<std::string>()> describe;
};

class Layers {
 public:
  /// `paths` are packs, and folders laid out like the store's. They are opened at the first look-up, and one
  /// that is unsafe or absent costs a warning.
  Layers(Store& store, std::vector<std::filesystem::path> paths, std::function<void(const std::string&)> warn,
         std::unique_ptr<Remote> remote = nullptr);

  /// In the packs, then in the store, then in the folders, packs and folders in the order of their naming,
  /// and then in the remote: what that has is stored.
  std::optional<Found> find(const Digest& key);
  /// In the store, and in a remote that is written to.
  void store(const Entry& entry);
  /// The layer on disk that find() would take the entry from. Counts, moves and warns of nothing.
  std::optional<std::string> locate(const Digest& key);
  /// Whether a layer on disk has something under this name, verified or not: what find() is worth asking for.
  bool may_have(const Digest& key);
  /// What the layers on disk say of their kernels, as ReadLayer::describe().
  std::vector<std::string> descriptions();

  /// What other layers than the store had.
  std::uint64_t shared_hits() const { return shared_hits_.load(std::memory_order_relaxed); }
  /// What no layer had.
  std::uint64_t misses() const { return misses_.load(std::memory_order_relaxed); }

 private:
  void open();
  std::optional<Found> find_in_remote(const Digest& key);
  std::optional<Found> find_in(const std::vector<ReadLayer>& layers, const Digest& key);

  Store& store_;
  std::vector<std::filesystem::path> paths_;
  std::function<void(const std::string&)> warn_;
  std::unique_ptr<Remote> remote_;  // null: none
  std::once_flag opened_;
  std::vector<ReadLayer> packs_;
  std::vector<ReadLayer> folders_;
  std::atomic<std::uint64_t> shared_hits_{0};
  std::atomic<std::uint64_t> misses_{0};
};

/// The elements of ATTUNE_CACHE_PATH, absolute.
std::vector<std::filesystem::path> shared_paths();

}  // namespace attune::cache
