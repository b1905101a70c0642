#include "cache/store.h"

#include "base/env.h"
#include "base/file.h"
#include "cache/lock.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <system_error>
#include <utility>

namespace attune::cache {
namespace {

namespace fs = std::filesystem;

/// A temporary file this old was left by a process that died: no store takes longer.
constexpr std::chrono::hours kStaleAfter{1};
/// A refused entry this old will not be reported any more.
constexpr std::chrono::hours kQuarantineFor{30 * 24};

/// https://bford.info/cachedir/: backup programs skip a folder with this file.
constexpr std::string_view kCacheDirTag =
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# This folder holds compiled attention kernels. Attune makes them again when they are missing.\n";

fs::path without_trailing_slash(const fs::path& path) {
  fs::path normal = path.lexically_normal();  // "dir/" would make open() follow a symlink that "dir" refuses
  return normal.has_filename() ? normal : normal.parent_path();
}

Result<void> write_cache_dir_tag(const fs::path& root) {
  const fs::path tag = root / "CACHEDIR.TAG";
  std::error_code error;
  if (fs::exists(tag, error)) return done();
  return write_file_atomic(tag, std::as_bytes(std::span(kCacheDirTag)), temporary_in(root));
}

std::uint64_t total_bytes(const std::vector<Listed>& entries) {
  std::uint64_t total = 0;
  for (const Listed& entry : entries) total += entry.bytes;
  return total;
}

}  // namespace

Store::Store(const fs::path& root, Mode mode, std::function<void(const std::string&)> warn,
             std::uint64_t max_bytes)
    : root_(without_trailing_slash(root)),
      mode_(mode),
      warn_(std::move(warn)),
      max_bytes_(max_bytes),
      ledger_(root_) {}

fs::path Store::path_of(const Digest& key) const {
  return object_in(root_, key);
}

// ---- Reading ----

std::optional<Entry> Store::find(const Digest& key) {
  if (!readable()) return std::nullopt;
  auto bytes = read_private_file(path_of(key));
  if (bytes.ok() && bytes->has_value()) {
    auto entry = decode(**bytes, key);
    if (entry.ok()) {
      if (mode_ == Mode::rw) touch(path_of(key));
      counters_.hits.fetch_add(1, std::memory_order_relaxed);
      ledger_.note_hit(key);
      write_counts();
      return std::move(*entry);
    }
    refuse(key, entry.failure().message);
    // Another process may have replaced the defective file by a good one since it was read. Then that one
    // moves: an entry more to compile, nothing worse.
    quarantine(key);
  } else if (!bytes.ok()) {
    refuse(key, bytes.failure().message);
  }
  counters_.misses.fetch_add(1, std::memory_order_relaxed);
  ledger_.note({.misses = 1});
  write_counts();
  return std::nullopt;
}

bool Store::may_have(const Digest& key) {
  std::error_code error;
  return readable() && fs::exists(fs::symlink_status(path_of(key), error));
}

/// Whether find() may look. Checks the root once, when there is one: what others can write to is not read.
bool Store::readable() {
  if (mode_ == Mode::off || mode_ == Mode::refresh) return false;
  if (root_checked_.load(std::memory_order_acquire)) return !reads_off_.load(std::memory_order_relaxed);
  std::error_code error;
  if (!fs::exists(fs::symlink_status(root_, error))) return true;
  const std::lock_guard lock(mutex_);
  if (!root_checked_.load(std::memory_order_relaxed)) {
    const auto checked = check_private_directory(root_);
    if (!checked.ok()) {
      reads_off_.store(true, std::memory_order_relaxed);
      turn_off_writing(checked.failure());
    }
    root_checked_.store(true, std::memory_order_release);
  }
  return !reads_off_.load(std::memory_order_relaxed);
}

void Store::refuse(const Digest& key, const std::string& why) {
  counters_.defects.fetch_add(1, std::memory_order_relaxed);
  ledger_.note({.defects = 1});
  warn_(fmt::format("{} ({}); the kernel is compiled again", why, path_of(key).string()));
}

Result<Entry> Store::inspect(const Digest& key) const {
  const fs::path path = path_of(key);
  ATTUNE_ASSIGN(bytes, read_private_file(path));
  if (!bytes) return environment_failure(fmt::format("{} is not in the cache {}", key.hex(), root_.string()));
  return decode(*bytes, key);
}

bool Store::quarantine(const Digest& key) {
  if (read_only()) return false;
  if (!check_private_directory(root_).ok() || !make_private_directory(quarantine_in(root_)).ok())
    return false;
  std::error_code error;
  fs::rename(path_of(key), quarantine_in(root_) / key.hex(), error);
  return !error;
}

// ---- Writing ----

void Store::store(const Entry& entry) {
  if (!writable()) return;
  const auto replaced = listed_file(path_of(entry.key));
  const auto published = publish(entry);
  if (!published.ok()) {
    counters_.store_errors.fetch_add(1, std::memory_order_relaxed);
    turn_off_writing(published.failure());
    return;
  }
  counters_.stores.fetch_add(1, std::memory_order_relaxed);
  ledger_.note({.stores = 1}, *published - static_cast<std::int64_t>(replaced ? replaced->bytes : 0));
  const auto bytes = ledger_.write(Ledger::kStorePatience);
  if (max_bytes_ != 0 && bytes.ok() && bytes->value_or(max_bytes_ + 1) > max_bytes_) sweep();
}

bool Store::writable() {
  if (read_only() || writes_off_.load(std::memory_order_relaxed)) return false;
  if (prepared_.load(std::memory_order_acquire)) return true;
  const std::lock_guard lock(mutex_);
  if (prepared_.load(std::memory_order_relaxed)) return true;
  if (writes_off_.load(std::memory_order_relaxed)) return false;
  if (const auto ready = prepare(); !ready.ok()) {
    counters_.store_errors.fetch_add(1, std::memory_order_relaxed);
    turn_off_writing(ready.failure());
    return false;
  }
  prepared_.store(true, std::memory_order_release);
  return true;
}

Result<void> Store::prepare() {
  ATTUNE_TRY(make_private_directory(root_));
  ATTUNE_TRY(make_private_directory(objects_in(root_)));
  ATTUNE_TRY(make_private_directory(temporary_in(root_)));
  remove_older(temporary_in(root_), kStaleAfter);
  return write_cache_dir_tag(root_);
}

/// The bytes that were written.
Result<std::int64_t> Store::publish(const Entry& entry) {
  auto published = try_publish(entry);
  std::error_code error;
  if (published.ok() || fs::exists(temporary_in(root_), error)) return published;
  ATTUNE_TRY(prepare());  // somebody has cleared the cache while we ran
  return try_publish(entry);
}

Result<std::int64_t> Store::try_publish(const Entry& entry) {
  const fs::path path = path_of(entry.key);
  const auto bytes = encode(entry);
  ATTUNE_TRY(make_private_directory(path.parent_path()));
  ATTUNE_TRY(write_file_atomic(path, bytes, temporary_in(root_)));
  return static_cast<std::int64_t>(bytes.size());
}

void Store::turn_off_writing(const Failure& why) {
  if (writes_off_.exchange(true, std::memory_order_relaxed)) return;
  warn_(fmt::format("kernels are kept in memory only: {}", why.message));
}

// ---- Eviction ----

/// By the writer that passed the bound, unless another is at it. The ledger's bytes may be wrong: it is the
/// list that counts.
void Store::sweep() {
  const auto lock =
      try_lock(root_, sweep_slot);  // where locks don't work, two sweeps choose the same entries
  if (lock.ok() && !lock->has_value()) return;
  remove_older(temporary_in(root_), kStaleAfter);
  remove_older(quarantine_in(root_), kQuarantineFor);
  auto entries = list();
  const bool too_large = total_bytes(entries) > max_bytes_;
  remove(std::move(entries), too_large ? PruneLimits{.max_bytes = max_bytes_ / 5 * 4} : PruneLimits{});
}

Pruned Store::remove(std::vector<Listed> entries, const PruneLimits& limits) {
  Pruned pruned = cache::prune(std::move(entries), limits);
  if (limits.dry_run) return pruned;
  counters_.evictions.fetch_add(pruned.removed.size(), std::memory_order_relaxed);
  ledger_.note({.evictions = pruned.removed.size()});
  static_cast<void>(ledger_.write_bytes(pruned.kept_bytes));  // stays noted if it can't be written now
  return pruned;
}

Result<Pruned> Store::prune(const PruneLimits& limits) {
  if (limits.dry_run) return remove(list(), limits);
  if (read_only())
    return environment_failure(fmt::format("the cache {} is open for reading only", root_.string()));
  std::error_code error;
  if (!fs::exists(fs::symlink_status(root_, error))) return Pruned{};
  ATTUNE_TRY(check_private_directory(root_));
  const auto lock = try_lock(root_, sweep_slot);
  if (lock.ok() && !lock->has_value()) {
    return environment_failure(fmt::format("another process prunes {} now; try again", root_.string()));
  }
  return remove(list(), limits);
}

// ---- Counting ----

void Store::compiled() {
  ledger_.note({.compiles = 1});
}

/// At once, so that a process may die at any time. It makes a hit on disk a quarter slower, and hot calls
/// never come here.
void Store::write_counts() {
  const bool safe =
      root_checked_.load(std::memory_order_acquire) || prepared_.load(std::memory_order_acquire);
  if (!safe || read_only() || writes_off_.load(std::memory_order_relaxed)) return;
  static_cast<void>(ledger_.write());  // stays noted if it can't be written now
}

// ---- Listing ----

std::vector<Listed> Store::list() const {
  return list_objects(root_);
}

std::uint64_t Store::bytes_on_disk() const {
  return total_bytes(list());
}

std::optional<fs::path> default_root() {
  if (const auto own = env("ATTUNE_CACHE_DIR")) {
    std::error_code error;
    fs::path root = fs::absolute(*own, error);  // now: the program may change its folder later
    return error ? fs::path(*own) : root;
  }
  // The XDG base directory specification says to ignore a relative path.
  if (const auto xdg = env("XDG_CACHE_HOME"); xdg && fs::path(*xdg).is_absolute())
    return fs::path(*xdg) / "attune";
  if (const auto home = env("HOME")) return fs::path(*home) / ".cache" / "attune";
  return std::nullopt;
}

}  // namespace attune::cache
