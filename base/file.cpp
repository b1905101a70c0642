#include "base/file.h"

#include <fmt/format.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <system_error>
#include <utility>

namespace attune {
namespace {

namespace fs = std::filesystem;

constexpr mode_t kWritableByOthers = S_IWGRP | S_IWOTH;
constexpr uid_t kSuperuser = 0;

Failure os_failure(const char* verb, const fs::path& path, int error) {
  return environment_failure(
      fmt::format("cannot {} {}: {}", verb, path.string(), std::generic_category().message(error)));
}

Result<std::vector<std::byte>> read_all(const Descriptor& file, const fs::path& path, off_t expected) {
  // One byte more than expected, so that the read which fills the buffer also sees the end.
  std::vector<std::byte> bytes(static_cast<std::size_t>(expected) + 1);
  std::size_t used = 0;
  while (true) {
    const ssize_t count = ::read(file.get(), bytes.data() + used, bytes.size() - used);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return os_failure("read", path, errno);
    if (count == 0) break;
    used += static_cast<std::size_t>(count);
    if (used == bytes.size()) bytes.resize(2 * used);
  }
  bytes.resize(used);
  return bytes;
}

/// fstat of a regular file: reading anything else (a pipe, a terminal) could wait for ever.
Result<struct stat> stat_regular(const Descriptor& file, const fs::path& path) {
  struct stat info {};
  if (::fstat(file.get(), &info) != 0) return os_failure("stat", path, errno);
  if (!S_ISREG(info.st_mode)) return environment_failure(path.string() + " is not a regular file");
  return info;
}

Result<void> check_not_writable_by_others(const struct stat& info, const fs::path& path) {
  if ((info.st_mode & kWritableByOthers) == 0) return done();
  return environment_failure(fmt::format("others may write to {} (mode {:04o}); chmod go-w it", path.string(),
                                         info.st_mode & 07777U));
}

/// Who may have written it: these users and nobody else.
Result<void> check_owner(const struct stat& info, const fs::path& path, std::initializer_list<uid_t> owners) {
  if (std::ranges::find(owners, info.st_uid) == owners.end()) {
    return environment_failure(fmt::format("{} belongs to user {}, not to user {}", path.string(),
                                           info.st_uid, fmt::join(owners, " or ")));
  }
  return check_not_writable_by_others(info, path);
}

Result<void> check_private(const struct stat& info, const fs::path& path) {
  return check_owner(info, path, {::geteuid()});
}

/// The folder that this open folder is in.
Result<struct stat> stat_parent(const Descriptor& folder, const fs::path& path) {
  struct stat info {};
  if (::fstatat(folder.get(), "..", &info, 0) != 0) return os_failure("stat the parent of", path, errno);
  return info;
}

/// In a folder that anyone may write to, only the sticky bit keeps others from renaming ours away.
Result<void> check_not_replaceable(const struct stat& parent, const fs::path& path) {
  if ((parent.st_mode & S_IWOTH) == 0 || (parent.st_mode & S_ISVTX) != 0) return done();
  return environment_failure(fmt::format("anyone may replace {}: its parent has mode {:04o}", path.string(),
                                         parent.st_mode & 07777U));
}

/// Opens for reading without changing the time of the last access, which the cache keeps for itself. Only the
/// owner of a file may ask for that.
Descriptor open_quietly(const fs::path& path) {
  constexpr int kFlags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW;
  const int fd = ::open(path.c_str(), kFlags | O_NOATIME);
  return Descriptor(fd < 0 && errno == EPERM ? ::open(path.c_str(), kFlags) : fd);
}

Result<void> write_all(const Descriptor& file, const fs::path& path, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::write(file.get(), bytes.data(), bytes.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return os_failure("write", path, errno);
    bytes = bytes.subspan(static_cast<std::size_t>(count));
  }
  return done();
}

Result<void> write_and_sync(Descriptor& file, const fs::path& path, std::span<const std::byte> bytes) {
  ATTUNE_TRY(write_all(file, path, bytes));
  if (::fsync(file.get()) != 0) return os_failure("fsync", path, errno);
  if (!file.close()) return os_failure("close", path, errno);
  return done();
}

fs::path folder_of(const fs::path& path) {
  return path.has_parent_path() ? path.parent_path() : fs::path(".");
}

Result<void> sync_folder(const fs::path& folder) {
  const Descriptor file(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!file.valid()) return os_failure("open", folder, errno);
  // EINVAL: a filesystem without this operation. What it then promises after a power cut is all that there is
  // to have.
  if (::fsync(file.get()) != 0 && errno != EINVAL) return os_failure("fsync", folder, errno);
  return done();
}

Result<void> create_folders(const fs::path& path) {
  if (::mkdir(path.c_str(), 0700) == 0 || errno == EEXIST) return done();
  if (errno != ENOENT || !path.has_relative_path()) return os_failure("create", path, errno);
  ATTUNE_TRY(create_folders(folder_of(path)));
  if (::mkdir(path.c_str(), 0700) == 0 || errno == EEXIST) return done();
  return os_failure("create", path, errno);
}

}  // namespace

Result<std::vector<std::byte>> read_file(const fs::path& path, bool no_follow) {
  // O_NONBLOCK: opening a named pipe must not wait for a writer; it does nothing to a regular file.
  const int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | (no_follow ? O_NOFOLLOW : 0);
  const Descriptor file(::open(path.c_str(), flags));
  if (!file.valid()) return os_failure("open", path, errno);
  ATTUNE_ASSIGN(info, stat_regular(file, path));
  return read_all(file, path, info.st_size);
}

Result<std::optional<std::vector<std::byte>>> read_private_file(const fs::path& path) {
  return read_file_of(path, {::geteuid()});
}

Result<std::optional<std::vector<std::byte>>> read_file_of(const fs::path& path,
                                                           std::initializer_list<uid_t> owners) {
  const Descriptor file = open_quietly(path);
  if (!file.valid() && (errno == ENOENT || errno == ENOTDIR)) return std::optional<std::vector<std::byte>>();
  if (!file.valid()) return os_failure("open", path, errno);
  ATTUNE_ASSIGN(info, stat_regular(file, path));
  ATTUNE_TRY(check_owner(info, path, owners));
  ATTUNE_ASSIGN(bytes, read_all(file, path, info.st_size));
  return std::optional(std::move(bytes));
}

Result<Descriptor> open_private_file(const fs::path& path) {
  Descriptor file(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW, 0600));
  if (!file.valid()) return os_failure("open", path, errno);
  ATTUNE_ASSIGN(info, stat_regular(file, path));
  ATTUNE_TRY(check_private(info, path));
  return file;
}

Result<OpenFile> OpenFile::open(const fs::path& path) {
  Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW));
  if (!file.valid()) return os_failure("open", path, errno);
  ATTUNE_ASSIGN(info, stat_regular(file, path));
  return OpenFile(std::move(file), path, static_cast<std::uint64_t>(info.st_size));
}

Result<void> OpenFile::check_trusted_owner() const {
  ATTUNE_ASSIGN(info, stat_regular(file_, path_));
  return check_owner(info, path_, {::geteuid(), kSuperuser});
}

Result<std::vector<std::byte>> OpenFile::read(std::uint64_t offset, std::size_t count) const {
  std::vector<std::byte> bytes(count);
  for (std::size_t used = 0; used < count;) {
    const ssize_t got =
        ::pread(file_.get(), bytes.data() + used, count - used, static_cast<off_t>(offset + used));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return os_failure("read", path_, errno);
    if (got == 0) return environment_failure(path_.string() + " has become shorter");
    used += static_cast<std::size_t>(got);
  }
  return bytes;
}

Result<void> write_file_atomic(const fs::path& path, std::span<const std::byte> bytes,
                               const fs::path& temp_dir) {
  std::string temporary = (temp_dir / "new-XXXXXX").string();
  Descriptor file(::mkostemp(temporary.data(), O_CLOEXEC));
  if (!file.valid()) return os_failure("create a file in", temp_dir, errno);
  auto written = write_and_sync(file, temporary, bytes);
  if (written.ok() && std::rename(temporary.c_str(), path.c_str()) != 0) {
    written = os_failure("rename a new file to", path, errno);
  }
  if (!written.ok()) {
    ::unlink(temporary.c_str());
    return written;
  }
  return sync_folder(folder_of(path));
}

Result<void> make_private_directory(const fs::path& path) {
  ATTUNE_TRY(create_folders(path));
  return check_private_directory(path);
}

Result<void> check_private_directory(const fs::path& path) {
  const Descriptor folder(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!folder.valid()) {
    const int error = errno;  // ENOTDIR for a symbolic link too
    std::error_code ignored;
    if (fs::is_symlink(path, ignored)) return environment_failure(path.string() + " is a symbolic link");
    return os_failure("open the folder", path, error);
  }
  struct stat info {};
  if (::fstat(folder.get(), &info) != 0) return os_failure("stat", path, errno);
  ATTUNE_TRY(check_private(info, path));
  ATTUNE_ASSIGN(parent, stat_parent(folder, path));
  return check_not_replaceable(parent, path);
}

Result<uid_t> check_shared_directory(const fs::path& path) {
  const Descriptor folder(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder.valid()) return os_failure("open the folder", path, errno);
  struct stat info {};
  if (::fstat(folder.get(), &info) != 0) return os_failure("stat", path, errno);
  ATTUNE_TRY(check_not_writable_by_others(info, path));
  ATTUNE_ASSIGN(parent, stat_parent(folder, path));
  ATTUNE_TRY(check_not_replaceable(parent, path));
  // Anyone could have made a folder in /tmp before the one who was meant to.
  if ((parent.st_mode & S_IWOTH) != 0) ATTUNE_TRY(check_owner(info, path, {::geteuid(), kSuperuser}));
  return info.st_uid;
}

}  // namespace attune
