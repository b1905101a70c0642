// Files: whole reads, atomic writes, safe folders. Every failure is an environment failure with the path and
// errno's text.
#pragma once

#include "base/descriptor.h"
#include "base/result.h"

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace attune {

/// The whole regular file; never follows a symlink at the last component when `no_follow`.
Result<std::vector<std::byte>> read_file(const std::filesystem::path& path, bool no_follow = false);

/// read_file for what only we may have written: refuses a symlink, another user's file and one that others
/// may write. Nothing when there is no such file. The time of the last access stays as it is.
Result<std::optional<std::vector<std::byte>>> read_private_file(const std::filesystem::path& path);

/// The same for a file that one of these users may have written.
Result<std::optional<std::vector<std::byte>>> read_file_of(const std::filesystem::path& path,
                                                           std::initializer_list<uid_t> owners);

/// Opens a file for reading and writing under the same conditions. Makes it, with mode 0600, when there is
/// none.
Result<Descriptor> open_private_file(const std::filesystem::path& path);

/// A regular file that stays open and is read in pieces, by any thread.
class OpenFile {
 public:
  /// Never follows a symlink at the last component.
  static Result<OpenFile> open(const std::filesystem::path& path);

  /// Fails unless the file is ours or the superuser's, and nobody else may write it.
  Result<void> check_trusted_owner() const;
  /// How long it was when it was opened.
  std::uint64_t size() const { return size_; }
  /// Exactly `count` bytes; fails where the file has become shorter.
  Result<std::vector<std::byte>> read(std::uint64_t offset, std::size_t count) const;

 private:
  OpenFile(Descriptor file, std::filesystem::path path, std::uint64_t size)
      : file_(std::move(file)), path_(std::move(path)), size_(size) {}

  Descriptor file_;
  std::filesystem::path path_;
  std::uint64_t size_;
};

/// Writes to a new file of mode 0600 in `temp_dir` (same filesystem), fsyncs it, renames it over `path` and
/// fsyncs the folder. On failure no temporary file is left behind, and `path` holds the old or the new bytes,
/// whole.
Result<void> write_file_atomic(const std::filesystem::path& path, std::span<const std::byte> bytes,
                               const std::filesystem::path& temp_dir);

/// Creates the folder and its parents with mode 0700 where they are missing, then check_private_directory().
Result<void> make_private_directory(const std::filesystem::path& path);

/// Checks that the path is a real folder (no symlink), ours, not writable by others, and not in a folder
/// where anyone could replace it.
Result<void> check_private_directory(const std::filesystem::path& path);

/// Checks a folder of somebody else, behind a symlink or not: not writable by others than its owner, not
/// where anyone could replace it, and nobody's but ours or the superuser's where anyone could have made it.
/// Returns its owner.
Result<uid_t> check_shared_directory(const std::filesystem::path& path);

}  // namespace attune
