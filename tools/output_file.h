// Files that the command writes for its user.
#pragma once

#include "base/result.h"

#include <cstddef>
#include <filesystem>
#include <span>

namespace attune::tools {

/// Writes atomically, with the permissions that a new file of the user has, as far as `most` allows. Fails
/// with invalid_argument when `path` is there and no regular file: a rename would replace a device such as
/// /dev/null.
Result<void> write_output_file(const std::filesystem::path& path, std::span<const std::byte> bytes,
                               std::filesystem::perms most = static_cast<std::filesystem::perms>(0666));

}  // namespace attune::tools
