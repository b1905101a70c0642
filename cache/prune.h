// Which entries go when the cache is too large or they are too old, and their going.
#pragma once

#include "cache/folder.h"

#include <chrono>
#include <cstdint>
#include <optional>
#include <vector>

namespace attune::cache {

struct PruneLimits {
  std::optional<std::uint64_t> max_bytes;       // what may stay, the most recently used first
  std::optional<std::chrono::seconds> max_age;  // since the last use
  bool dry_run = false;                         // only tells what would go
};

struct Pruned {
  std::vector<Listed> removed;  // in the order of their going
  std::uint64_t removed_bytes = 0;
  std::uint64_t kept = 0;
  std::uint64_t kept_bytes = 0;
};

/// Removes entries, the least recently used first, until the rest keeps the limits. One that was replaced or
/// used since it was listed stays; one that somebody reads is read to its end, since an open file outlives
/// its name.
Pruned prune(std::vector<Listed> entries, const PruneLimits& limits);

/// Removes the files in a folder that were last changed longer ago than this. Best effort: what can't be
/// removed today is found again.
void remove_older(const std::filesystem::path& folder, std::chrono::seconds age);

}  // namespace attune::cache
