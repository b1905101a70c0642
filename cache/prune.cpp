#include "cache/prune.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <ctime>
#include <system_error>
#include <tuple>

namespace attune::cache {
namespace {

namespace fs = std::filesystem;

/// A time that has not come yet is from a clock gone wrong. It counts as now, and touch() makes it so where
/// it is far off: else its entry would be the newest one for years.
void put_right(Listed& entry) {
  touch(entry.path);
  if (const auto touched = listed_file(entry.path)) entry = *touched;
}

/// Another process may have stored or used it since it was listed. Between the look and the removal there is
/// time for one more store: that one is lost, so its kernel is compiled again, nothing worse.
bool remove(const Listed& entry) {
  const auto present = listed_file(entry.path);
  if (!present) return true;  // another sweep was here
  if (present->inode != entry.inode || present->changed_nanoseconds != entry.changed_nanoseconds)
    return false;
  return ::unlink(entry.path.c_str()) == 0 || errno == ENOENT;
}

}  // namespace

Pruned prune(std::vector<Listed> entries, const PruneLimits& limits) {
  const std::int64_t now = ::time(nullptr);
  Pruned result;
  for (Listed& entry : entries) {
    if (entry.used_unix > now && !limits.dry_run) put_right(entry);
    entry.used_unix = std::min(entry.used_unix, now);
    result.kept_bytes += entry.bytes;
  }
  result.kept = entries.size();
  std::ranges::sort(entries, {}, [](const Listed& entry) {
    return std::tuple(entry.used_unix, entry.modified_unix, entry.key);
  });
  for (Listed& entry : entries) {
    const bool too_old = limits.max_age && now - entry.used_unix > limits.max_age->count();
    const bool too_many = limits.max_bytes && result.kept_bytes > *limits.max_bytes;
    if (!too_old && !too_many) break;  // those that follow are younger
    if (!limits.dry_run && !remove(entry)) continue;
    --result.kept;
    result.kept_bytes -= entry.bytes;
    result.removed_bytes += entry.bytes;
    result.removed.push_back(std::move(entry));
  }
  return result;
}

void remove_older(const fs::path& folder, std::chrono::seconds age) {
  std::error_code error;
  const auto now = fs::file_time_type::clock::now();
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
    std::error_code one_file;
    const auto modified = at->last_write_time(one_file);
    if (one_file) continue;
    if (modified < now - age) fs::remove(at->path(), one_file);
    // From a clock gone wrong. It starts to age today.
    if (modified > now + age) fs::last_write_time(at->path(), now, one_file);
  }
}

}  // namespace attune::cache
