// Turns: of the processes of this machine that miss the same key at the same time one makes the entry, and
// the others wait for it. In one process it is SingleFlight that does so.
#pragma once

#include "cache/lock.h"
#include "cache/store.h"

#include <chrono>
#include <optional>

namespace attune::cache {

/// Long enough for the slowest compile on a busy machine. Who has waited in vain, because the one ahead hangs
/// or was stopped, compiles for itself.
inline constexpr std::chrono::seconds kPatience{20};

/// Either another process has stored the entry, or it is the caller's turn to make it. Others wait while this
/// lives, or don't: where locks don't work everybody has a turn at once, and all that costs is work.
struct Turn {
  std::optional<Entry> entry;
  std::optional<Lock> lock;
};

/// After a miss. Returns at once unless another process is at this key, or at one that shares its lock.
Turn take_turn(Store& store, const Digest& key, std::chrono::milliseconds patience = kPatience);

}  // namespace attune::cache
