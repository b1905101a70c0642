// Single flight: of the callers who want the same thing at the same time, one makes it and all get it.
#pragma once

#include "base/result.h"

#include <unistd.h>

#include <exception>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace attune::cache {

/// Remembers nothing: once a flight has landed, well or badly, the next caller of its key starts another.
/// Keys need `<`. A forked child meets none of its parent's flights, whose threads it has not got.
template <typename Key, typename T>
class SingleFlight {
 public:
  using Outcome = Result<std::shared_ptr<T>>;

  /// Calls `fn` outside any lock, unless another thread's call for `key` is under way: then waits and returns
  /// what that one returned, value or failure (or throws what it threw). `fn` must not run the same key
  /// again.
  template <typename Fn>
  Outcome run(const Key& key, Fn&& fn) {
    std::promise<Outcome> promise;
    const Here here{getpid(), key};
    {
      std::unique_lock lock(mutex_);
      if (const auto flight = flights_.find(here); flight != flights_.end()) {
        const std::shared_future<Outcome> shared = flight->second;
        lock.unlock();
        return shared.get();
      }
      flights_.emplace(here, promise.get_future().share());
    }
    try {
      Outcome outcome = std::forward<Fn>(fn)();
      forget(here);
      promise.set_value(outcome);
      return outcome;
    } catch (...) {
      forget(here);
      promise.set_exception(std::current_exception());
      throw;
    }
  }

 private:
  using Here = std::pair<pid_t, Key>;

  /// Before the waiters wake, so that one who tries again after a failure does not meet that failure again.
  void forget(const Here& here) {
    const std::lock_guard lock(mutex_);
    flights_.erase(here);
  }

  std::mutex mutex_;
  std::map<Here, std::shared_future<Outcome>> flights_;
};

}  // namespace attune::cache
