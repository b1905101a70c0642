#include "cache/store.h"

#include "base/env.h"
#include "base/file.h"

#include <fmt/format.h>

#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <system_error>
#include <utility>

namespace attune::cache {
namespace {

namespace fs = std::filesystem;

/// A temporary file this old was left by a process that died: no store takes longer.
constexpr std::chrono::hours kStaleAfter{1};

/// https://bford.info/cachedir/: backup programs skip a folder with this file.
constexpr std::string_view kCacheDirTag =
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# This folder holds compiled attention kernels. Attune makes them again when they are missing.\n";

fs::path without_trailing_slash(const fs::path& path) {
  fs::path normal = path.lexically_normal();  // "dir/" would make open() follow a symlink that "dir" refuses
  return normal.has_filename() ? normal : normal.parent_path();
}

fs::path objects_in(const fs::path& root) {
  return root / "v1" / "objects";
}
fs::path temporary_in(const fs::path& root) {
  return root / "v1" / "tmp";
}
fs::path quarantine_in(const fs::path& root) {
  return root / "v1" / "quarantine";
}

/// Best effort: a file that can't be removed today is found again by the next process.
void sweep_stale(const fs::path& folder) {
  std::error_code error;
  const auto limit = fs::file_time_type::clock::now() - kStaleAfter;
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
    std::error_code one_file;
    const auto modified = at->last_write_time(one_file);
    if (!one_file && modified < limit) fs::remove(at->path(), one_file);
  }
}

Result<void> write_cache_dir_tag(const fs::path& root) {
  const fs::path tag = root / "CACHEDIR.TAG";
  std::error_code error;
  if (fs::exists(tag, error)) return done();
  return write_file_atomic(tag, std::as_bytes(std::span(kCacheDirTag)), temporary_in(root));
}

/// The file at objects/<folder>/<name>, if its name is a key's.
std::optional<Listed> listed_file(const fs::path& path) {
  const auto key = Digest::from_hex(path.parent_path().filename().string() + path.filename().string());
  struct stat info {};
  if (!key || ::lstat(path.c_str(), &info) != 0 || !S_ISREG(info.st_mode)) return std::nullopt;
  return Listed{.key = *key,
                .path = path,
                .bytes = static_cast<std::uint64_t>(info.st_size),
                .modified_unix = info.st_mtim.tv_sec};
}

}  // namespace

Store::Store(const fs::path& root, Mode mode, std::function<void(const std::string&)> warn)
    : root_(without_trailing_slash(root)), mode_(mode), warn_(std::move(warn)) {}

fs::path Store::path_of(const Digest& key) const {
  const std::string hex = key.hex();
  return objects_in(root_) / hex.substr(0, 2) / hex.substr(2);
}

// ---- Reading ----

std::optional<Entry> Store::find(const Digest& key) {
  if (!readable()) return std::nullopt;
  auto bytes = read_private_file(path_of(key));
  if (bytes.ok() && bytes->has_value()) {
    auto entry = decode(**bytes, key);
    if (entry.ok()) {
      counters_.hits.fetch_add(1, std::memory_order_relaxed);
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
  return std::nullopt;
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
  warn_(fmt::format("{} ({}); the kernel is compiled again", why, path_of(key).string()));
}

Result<Entry> Store::inspect(const Digest& key) const {
  const fs::path path = path_of(key);
  ATTUNE_ASSIGN(bytes, read_private_file(path));
  if (!bytes) return environment_failure(fmt::format("{} is not in the cache {}", key.hex(), root_.string()));
  return decode(*bytes, key);
}

bool Store::quarantine(const Digest& key) {
  if (mode_ == Mode::off || mode_ == Mode::ro) return false;
  if (!check_private_directory(root_).ok() || !make_private_directory(quarantine_in(root_)).ok())
    return false;
  std::error_code error;
  fs::rename(path_of(key), quarantine_in(root_) / key.hex(), error);
  return !error;
}

// ---- Writing ----

void Store::store(const Entry& entry) {
  if (!writable()) return;
  if (const auto published = publish(entry); !published.ok()) {
    counters_.store_errors.fetch_add(1, std::memory_order_relaxed);
    turn_off_writing(published.failure());
    return;
  }
  counters_.stores.fetch_add(1, std::memory_order_relaxed);
}

bool Store::writable() {
  if (mode_ == Mode::off || mode_ == Mode::ro || writes_off_.load(std::memory_order_relaxed)) return false;
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
  sweep_stale(temporary_in(root_));
  return write_cache_dir_tag(root_);
}

Result<void> Store::publish(const Entry& entry) {
  const fs::path path = path_of(entry.key);
  ATTUNE_TRY(make_private_directory(path.parent_path()));
  return write_file_atomic(path, encode(entry), temporary_in(root_));
}

void Store::turn_off_writing(const Failure& why) {
  if (writes_off_.exchange(true, std::memory_order_relaxed)) return;
  warn_(fmt::format("kernels are kept in memory only: {}", why.message));
}

// ---- Listing ----

std::vector<Listed> Store::list() const {
  std::vector<Listed> found;
  std::error_code error;
  for (fs::directory_iterator folder(objects_in(root_), error), end; !error && folder != end;
       folder.increment(error)) {
    std::error_code inner;
    if (folder->is_symlink(inner)) continue;
    for (fs::directory_iterator file(folder->path(), inner); !inner && file != end; file.increment(inner)) {
      if (auto listed = listed_file(file->path())) found.push_back(std::move(*listed));
    }
  }
  std::ranges::sort(found, {}, &Listed::key);
  return found;
}

std::uint64_t Store::bytes_on_disk() const {
  std::uint64_t total = 0;
  for (const Listed& file : list()) total += file.bytes;
  return total;
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
