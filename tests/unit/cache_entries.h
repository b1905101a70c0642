// Entries for tests of the cache, and a folder to keep them in.
#pragma once

#include "cache/store.h"
#include "tests/support/temp_dir.h"

#include <doctest/doctest.h>

#include <fcntl.h>
#include <sys/stat.h>

#include <ctime>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace attune::cache::test {

/// The entry of a name: 4096 bytes of header, then `bytes` of payload.
inline Entry entry_of(const std::string& name, std::size_t bytes = 0) {
  return {.key = sha256(name), .metadata_json = "{}", .payload = std::vector<std::byte>(bytes)};
}

/// Stores in one fresh folder, with their warnings.
struct Folder {
  attune::test::TempDir dir;
  std::filesystem::path root = dir.path() / "cache";
  std::vector<std::string> warnings;

  Store open(std::uint64_t max_bytes = kDefaultMaxBytes, Mode mode = Mode::rw) {
    return Store(
        root, mode, [this](const std::string& line) { warnings.push_back(line); }, max_bytes);
  }
};

constexpr std::int64_t kDay = 24 * 60 * 60;

/// Sets the times of an entry: of its last use and of its store, in seconds from now.
inline void set_times(const std::filesystem::path& path, std::int64_t used, std::int64_t stored) {
  const std::int64_t now = ::time(nullptr);
  const timespec times[2] = {{now + used, 0}, {now + stored, 0}};
  REQUIRE(::utimensat(AT_FDCWD, path.c_str(), times, 0) == 0);
}

inline std::int64_t used_ago(const std::filesystem::path& path) {
  struct stat info {};
  REQUIRE(::stat(path.c_str(), &info) == 0);
  return ::time(nullptr) - info.st_atim.tv_sec;
}

}  // namespace attune::cache::test
