// The folder of a cache: what lies where under its root. docs/cache_format.md has the picture.
#pragma once

#include "base/digest.h"

#include <cstdint>
#include <filesystem>
#include <optional>
#include <vector>

namespace attune::cache {

std::filesystem::path objects_in(const std::filesystem::path& root);
std::filesystem::path temporary_in(const std::filesystem::path& root);
std::filesystem::path quarantine_in(const std::filesystem::path& root);
std::filesystem::path counters_in(const std::filesystem::path& root);
std::filesystem::path hits_in(const std::filesystem::path& root);
std::filesystem::path locks_in(const std::filesystem::path& root);
/// <root>/v1/objects/ab/cdef...
std::filesystem::path object_in(const std::filesystem::path& root, const Digest& key);

/// A file under objects/.
struct Listed {
  Digest key;
  std::filesystem::path path;
  std::uint64_t bytes = 0;
  std::int64_t modified_unix = 0;  // when it was stored
  std::int64_t used_unix = 0;      // when it was last found, to a day
  std::uint64_t inode = 0;         // these two tell whether it was replaced or used since
  std::int64_t changed_nanoseconds = 0;
};

/// The file at this path, if its name is a key's and it is a regular file.
std::optional<Listed> listed_file(const std::filesystem::path& path);
/// All of them, sorted by key.
std::vector<Listed> list_objects(const std::filesystem::path& root);

/// Notes in the file that it is used now, at most once a day. Works where reading leaves no trace (noatime),
/// and puts a time right that comes from a clock gone wrong.
void touch(const std::filesystem::path& path);

}  // namespace attune::cache
