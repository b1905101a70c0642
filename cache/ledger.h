// Ledger: what all processes together have done with a cache, in a file of 64 bytes and a table of each
// kernel's hits. Nothing but statistics, and the occasion for a sweep, rests on it.
#pragma once

#include "base/digest.h"
#include "base/result.h"
#include "cache/kernel_hits.h"

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <mutex>
#include <optional>
#include <vector>

namespace attune::cache {

struct Totals {
  std::uint64_t hits = 0;
  std::uint64_t misses = 0;
  std::uint64_t defects = 0;
  std::uint64_t stores = 0;
  std::uint64_t compiles = 0;
  std::uint64_t evictions = 0;

  bool operator==(const Totals&) const = default;
  Totals& operator+=(const Totals& more);
};

class Ledger {
 public:
  /// How long a hit, which takes a millisecond itself, may wait to be counted; and a store, which comes after
  /// hundreds.
  static constexpr std::chrono::milliseconds kHitPatience{2};
  static constexpr std::chrono::milliseconds kStorePatience{500};

  explicit Ledger(std::filesystem::path root) : root_(std::move(root)) {}

  /// Counts, in memory.
  void note(const Totals& more, std::int64_t bytes = 0);
  /// A hit, of this kernel.
  void note_hit(const Digest& key);
  /// Adds what was noted to the file, once no other process is at it, which takes microseconds unless that
  /// one was stopped in between. Where it fails, now or for good, it stays noted for the next time: a process
  /// that dies loses what it could not write until then. Returns how many bytes the entries have, as far as
  /// is known.
  Result<std::optional<std::uint64_t>> write(std::chrono::milliseconds patience = kHitPatience);
  /// Like write(), and from now on the entries have that many bytes: somebody has looked.
  Result<std::optional<std::uint64_t>> write_bytes(std::uint64_t found);

  /// What the file says; zeros without one.
  Result<Totals> totals() const;
  Result<KernelHits> kernel_hits() const;

 private:
  Result<std::optional<std::uint64_t>> update(std::optional<std::uint64_t> found,
                                              std::chrono::milliseconds patience);

  std::filesystem::path root_;
  std::mutex mutex_;  // guards what is noted
  Totals noted_;
  std::int64_t noted_bytes_ = 0;
  std::vector<Digest> noted_hits_;
};

}  // namespace attune::cache
