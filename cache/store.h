// Store: entries by key in a folder. Knows bytes and digests, no kernels. Never fails a caller: what can't be
// read is a miss, what can't be written is a warning.
#pragma once

#include "cache/entry.h"
#include "cache/folder.h"
#include "cache/ledger.h"
#include "cache/prune.h"

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace attune::cache {

enum class Mode {
  rw,       // read and write
  ro,       // read only
  off,      // neither
  refresh,  // write only: every first use compiles anew
};

/// Counters of one store in this process; all monotonic.
struct Counters {
  std::atomic<std::uint64_t> hits{0};
  std::atomic<std::uint64_t> misses{0};   // no entry
  std::atomic<std::uint64_t> defects{0};  // an entry that was refused; counts as a miss too
  std::atomic<std::uint64_t> stores{0};
  std::atomic<std::uint64_t> store_errors{0};
  std::atomic<std::uint64_t> evictions{0};
};

/// ATTUNE_CACHE_MAX_SIZE's default: ten to twenty thousand kernels.
inline constexpr std::uint64_t kDefaultMaxBytes = std::uint64_t{1} << 30;

class Store {
 public:
  /// Opens lazily: nothing is created before the first store. `warn` gets one line for each kind of trouble.
  /// Whoever stores more than `max_bytes` (0: no bound) removes entries down to 80 % of that, the least
  /// recently used first.
  Store(const std::filesystem::path& root, Mode mode, std::function<void(const std::string&)> warn,
        std::uint64_t max_bytes = kDefaultMaxBytes);

  /// The verified entry, or nothing. A defective file is moved to quarantine/ with a warning; one that can't
  /// be read or trusted (a symlink, not ours, writable by others) stays, with a warning, until the next store
  /// replaces it.
  std::optional<Entry> find(const Digest& key);

  /// Whether find() has something to verify.
  bool may_have(const Digest& key);

  /// Publishes atomically (temp file in tmp/, fsync, rename). An unwritable, full or unsafe folder (a
  /// symlink, not ours, writable by others) costs one warning and turns the store off for writing.
  void store(const Entry& entry);

  /// Whether store() would try. Makes the folder.
  bool writable();

  /// All files under objects/, sorted by key; for `attune cache list|verify`.
  std::vector<Listed> list() const;
  /// Reads and verifies one entry without quarantining it.
  Result<Entry> inspect(const Digest& key) const;
  /// Moves a defective entry to quarantine/, over an earlier one of its key. True when it was moved.
  bool quarantine(const Digest& key);

  /// Removes entries until the rest keeps the limits. Fails when it may not, or while another process does.
  Result<Pruned> prune(const PruneLimits& limits);

  /// Counts a compile among the totals; the store that follows it writes them.
  void compiled();
  /// What all processes have done with this folder since it was made.
  Result<Totals> totals() const { return ledger_.totals(); }
  /// And how often they found each kernel.
  Result<KernelHits> kernel_hits() const { return ledger_.kernel_hits(); }

  std::uint64_t bytes_on_disk() const;
  const std::filesystem::path& root() const { return root_; }
  Mode mode() const { return mode_; }
  std::uint64_t max_bytes() const { return max_bytes_; }
  const Counters& counters() const { return counters_; }

  /// <root>/v1/objects/ab/cdef...
  std::filesystem::path path_of(const Digest& key) const;

 private:
  bool readable();
  Result<void> prepare();
  bool read_only() const { return mode_ == Mode::off || mode_ == Mode::ro; }
  Result<std::int64_t> publish(const Entry& entry);
  Result<std::int64_t> try_publish(const Entry& entry);
  void sweep();
  Pruned remove(std::vector<Listed> entries, const PruneLimits& limits);
  void write_counts();
  void turn_off_writing(const Failure& why);
  void refuse(const Digest& key, const std::string& why);

  std::filesystem::path root_;
  Mode mode_;
  std::function<void(const std::string&)> warn_;
  std::uint64_t max_bytes_;
  Counters counters_;
  Ledger ledger_;

  std::mutex mutex_;  // guards the two changes of state, never an entry's reading or writing
  std::atomic<bool> root_checked_{false};  // by the first find() that sees a root
  std::atomic<bool> reads_off_{false};     // the root is not safe
  std::atomic<bool> prepared_{false};      // by the first store()
  std::atomic<bool> writes_off_{false};    // a store failed
};

/// ATTUNE_CACHE_DIR, else $XDG_CACHE_HOME/attune, else $HOME/.cache/attune; nothing when none is set.
std::optional<std::filesystem::path> default_root();

}  // namespace attune::cache
