// Locks between the processes of one machine. Nothing is right only because of a lock: each saves work that
// two would do, so who can't have one goes on without.
#pragma once

#include "base/descriptor.h"
#include "base/digest.h"
#include "base/result.h"

#include <filesystem>
#include <optional>

namespace attune::cache {

/// A byte of the lock file. The first 256 are for keys, by their first byte.
enum LockSlot : int { counters_slot = 256, sweep_slot = 257 };

inline int key_slot(const Digest& key) {
  return key.bytes[0];
}

/// A byte of the lock file while it is ours. Goes with its process, however that ends.
class Lock {
 public:
  Lock(Descriptor file, int slot) : file_(std::move(file)), slot_(slot) {}
  ~Lock();
  Lock(Lock&&) = default;

 private:
  Descriptor file_;
  int slot_;
};

/// The slot, or nothing while another process or thread has it. Fails where locks don't work: the cache is on
/// a file system of a network, or can't be written, and there is no $XDG_RUNTIME_DIR.
Result<std::optional<Lock>> try_lock(const std::filesystem::path& root, int slot);

}  // namespace attune::cache
