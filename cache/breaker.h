// A circuit breaker: what fails again and again is left alone for a while. The caller brings the time.
#pragma once

#include <chrono>
#include <mutex>

namespace attune::cache {

class Breaker {
 public:
  using Time = std::chrono::steady_clock::time_point;
  static constexpr int kFailures = 3;  // in a row turn it off
  static constexpr std::chrono::seconds kPause{60};

  /// Whether to try. After a pause one caller may; the others wait for what becomes of it, or for another
  /// pause.
  bool allows(Time now) {
    const std::lock_guard lock(mutex_);
    if (failures_ < kFailures) return true;
    if (now < off_until_) return false;
    off_until_ = now + kPause;
    return true;
  }

  void succeeded() {
    const std::lock_guard lock(mutex_);
    failures_ = 0;
  }

  /// True when it is off now.
  bool failed(Time now) {
    const std::lock_guard lock(mutex_);
    if (failures_ < kFailures) ++failures_;
    if (failures_ < kFailures) return false;
    off_until_ = now + kPause;
    return true;
  }

 private:
  std::mutex mutex_;
  int failures_ = 0;
  Time off_until_{};
};

}  // namespace attune::cache
