#include "cache/folder.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <string>
#include <system_error>

namespace attune::cache {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kDay = 24 * 60 * 60;

}  // namespace

fs::path objects_in(const fs::path& root) {
  return root / "v1" / "objects";
}
fs::path temporary_in(const fs::path& root) {
  return root / "v1" / "tmp";
}
fs::path quarantine_in(const fs::path& root) {
  return root / "v1" / "quarantine";
}
fs::path counters_in(const fs::path& root) {
  return root / "v1" / "counters";
}
fs::path hits_in(const fs::path& root) {
  return root / "v1" / "hits";
}
fs::path locks_in(const fs::path& root) {
  return root / "v1" / "locks";
}
fs::path object_in(const fs::path& root, const Digest& key) {
  const std::string hex = key.hex();
  return objects_in(root) / hex.substr(0, 2) / hex.substr(2);
}

std::optional<Listed> listed_file(const fs::path& path) {
  const auto key = Digest::from_hex(path.parent_path().filename().string() + path.filename().string());
  struct stat info {};
  if (!key || ::lstat(path.c_str(), &info) != 0 || !S_ISREG(info.st_mode)) return std::nullopt;
  return Listed{.key = *key,
                .path = path,
                .bytes = static_cast<std::uint64_t>(info.st_size),
                .modified_unix = info.st_mtim.tv_sec,
                .used_unix = info.st_atim.tv_sec,
                .inode = info.st_ino,
                .changed_nanoseconds = info.st_ctim.tv_sec * 1'000'000'000 + info.st_ctim.tv_nsec};
}

std::vector<Listed> list_objects(const fs::path& root) {
  std::vector<Listed> found;
  std::error_code error;
  for (fs::directory_iterator folder(objects_in(root), error), end; !error && folder != end;
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

void touch(const fs::path& path) {
  struct stat info {};
  if (::lstat(path.c_str(), &info) != 0 || std::abs(::time(nullptr) - info.st_atim.tv_sec) < kDay) return;
  // The time of the last access is the last use; that of the last change stays the time of the store.
  constexpr timespec kTimes[2] = {{0, UTIME_NOW}, {0, UTIME_OMIT}};
  ::utimensat(AT_FDCWD, path.c_str(), kTimes, AT_SYMLINK_NOFOLLOW);
}

}  // namespace attune::cache
