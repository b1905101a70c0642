#include "cache/turn.h"

#include "cache/folder.h"

#include <algorithm>
#include <thread>
#include <utility>

namespace attune::cache {

Turn take_turn(Store& store, const Digest& key, std::chrono::milliseconds patience) {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::milliseconds kLongestPause{20};
  if (store.mode() != Mode::rw || !store.writable()) return {};  // others would wait for what never comes
  const Clock::time_point deadline = Clock::now() + patience;
  for (std::chrono::milliseconds pause{1};; pause = std::min(2 * pause, kLongestPause)) {
    auto lock = try_lock(store.root(), key_slot(key));
    if (!lock.ok()) return {};
    // Look again even with the lock: its last holder may have stored the entry since the caller's miss.
    if (listed_file(store.path_of(key))) {
      if (auto entry = store.find(key)) return {.entry = std::move(entry)};
    }
    if (lock->has_value() || Clock::now() >= deadline) return {.lock = std::move(*lock)};
    std::this_thread::sleep_for(pause);
  }
}

}  // namespace attune::cache
