// Pack: many entries in one file, read-only, made ahead of time by `attune cache pack`. To open one reads and
// verifies its head alone; a kernel is read, verified and decompressed when it is found.
#pragma once

#include "base/file.h"
#include "base/result.h"
#include "cache/entry.h"
#include "cache/pack_index.h"
#include "cache/pack_key.h"

#include <filesystem>
#include <optional>

namespace attune::cache {

class Pack {
 public:
  /// With a key, a pack that its owner did not sign is refused, and any file that he did will do. Without,
  /// the file must be ours or the superuser's and writable by nobody else. Never follows a symlink.
  static Result<Pack> open(const std::filesystem::path& path, const VerifyingKey* key = nullptr);

  /// The verified entry, nothing when the pack has none of this key, or what is wrong with it. Thread-safe.
  Result<std::optional<Entry>> find(const Digest& key) const;

  const PackIndex& index() const { return index_; }
  const std::filesystem::path& path() const { return path_; }

 private:
  Pack(std::filesystem::path path, OpenFile file, PackIndex index)
      : path_(std::move(path)), file_(std::move(file)), index_(std::move(index)) {}

  std::filesystem::path path_;
  OpenFile file_;
  PackIndex index_;
};

}  // namespace attune::cache
