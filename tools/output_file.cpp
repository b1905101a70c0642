#include "tools/output_file.h"

#include "base/file.h"

#include <fmt/format.h>

#include <sys/stat.h>

namespace attune::tools {
namespace fs = std::filesystem;

namespace {

/// 0666 without the process's umask, which can only be read by setting it.
fs::perms new_file_permissions() {
  const mode_t mask = ::umask(0);
  ::umask(mask);
  return static_cast<fs::perms>(0666U & ~mask);
}

}  // namespace

Result<void> write_output_file(const fs::path& path, std::span<const std::byte> bytes, fs::perms most) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (fs::exists(status) && !fs::is_regular_file(status)) {
    return invalid_argument(fmt::format("{} exists and is not a regular file", path.string()));
  }
  const fs::path folder = path.parent_path();
  ATTUNE_TRY(write_file_atomic(path, bytes, folder.empty() ? "." : folder));
  fs::permissions(path, new_file_permissions() & most, error);
  if (error) return environment_failure(fmt::format("cannot chmod {}: {}", path.string(), error.message()));
  return done();
}

}  // namespace attune::tools
