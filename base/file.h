// Files: whole reads, atomic writes, safe folders. Every failure is an environment failure with the path and errno's text.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"

namespace attune {

/// The whole file; never follows a symlink at the last component when `no_follow`.
Result<std::vector<std::byte>> read_file(const std::filesystem::path& path, bool no_follow = false);

/// Writes to a new file in `temp_dir` (same filesystem), fsyncs it, renames it over `path` and fsyncs the folder. On failure
/// nothing is left behind.
Result<void> write_file_atomic(const std::filesystem::path& path, std::span<const std::byte> bytes,
                               const std::filesystem::path& temp_dir);

/// Creates the folder and its parents with mode 0700, then checks that it is a real folder (no symlink), ours, and not writable
/// by others.
Result<void> make_private_directory(const std::filesystem::path& path);

}  // namespace attune
