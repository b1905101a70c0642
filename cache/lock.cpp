#include "cache/lock.h"

#include "base/env.h"
#include "base/file.h"
#include "cache/folder.h"

#include <fmt/format.h>

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/vfs.h>

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <system_error>

namespace attune::cache {
namespace {

namespace fs = std::filesystem;

/// File systems that one kernel alone writes to. Any other may be a network's, where a lock can hang, be lost
/// or mean nothing.
constexpr unsigned kLocal[]{EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC,     F2FS_SUPER_MAGIC,
                            TMPFS_MAGIC,      RAMFS_MAGIC,     OVERLAYFS_SUPER_MAGIC, REISERFS_SUPER_MAGIC,
                            0x2fc12fc1,   // ZFS
                            0xca451a4e,   // bcachefs
                            0x3153464a};  // JFS

bool is_local(const fs::path& folder) {
  struct statfs info {};
  return ::statfs(folder.c_str(), &info) == 0 &&
         std::ranges::find(kLocal, static_cast<unsigned>(info.f_type)) != std::end(kLocal);
}

/// In the cache's own folder all its processes meet, whatever their environment is. Else where the session
/// keeps what lives as long as the machine runs; all caches share that file, which costs a wait now and then.
std::optional<fs::path> lock_file(const fs::path& root) {
  const fs::path own = locks_in(root);
  if (is_local(own.parent_path())) return own;
  static const auto runtime = env("XDG_RUNTIME_DIR");
  if (runtime && fs::path(*runtime).is_absolute() && is_local(*runtime))
    return fs::path(*runtime) / "attune.locks";
  return std::nullopt;
}

/// Open-file-description locks: unlike POSIX's, closing another descriptor of the file does not drop them,
/// and threads exclude each other, too.
int set_lock(const Descriptor& file, short type, int slot) {
  struct flock range {};
  range.l_type = type;
  range.l_whence = SEEK_SET;
  range.l_start = slot;
  range.l_len = 1;
  return ::fcntl(file.get(), F_OFD_SETLK, &range);
}

}  // namespace

/// Closing is not enough: a child that was forked meanwhile has the open file, too.
Lock::~Lock() {
  if (file_.valid()) set_lock(file_, F_UNLCK, slot_);
}

Result<std::optional<Lock>> try_lock(const fs::path& root, int slot) {
  const auto path = lock_file(root);
  if (!path)
    return environment_failure(fmt::format("no locks for {}: it is not on a local disk", root.string()));
  ATTUNE_ASSIGN(file, open_private_file(*path));
  if (set_lock(file, F_WRLCK, slot) == 0) return std::optional<Lock>(std::in_place, std::move(file), slot);
  if (errno == EAGAIN || errno == EACCES) return std::optional<Lock>();
  return environment_failure(
      fmt::format("cannot lock {}: {}", path->string(), std::generic_category().message(errno)));
}

}  // namespace attune::cache
