// A broken disk on demand: system calls of this executable that fail, fail a few times, or write only a part.
#pragma once

#include <limits>

namespace attune::test {

enum class Call { write, fsync, rename, lock, statfs };

/// While it lives, the call fails with `error` for `times` calls, then works again. One at a time.
class FailingCall {
 public:
  FailingCall(Call call, int error, int times = std::numeric_limits<int>::max());
  ~FailingCall();
  FailingCall(const FailingCall&) = delete;
  FailingCall& operator=(const FailingCall&) = delete;

  /// How often it has failed.
  int failures() const;
};

/// The process dies, as by a power cut or `kill -9`, on entering the call for the n-th time from now (1: the
/// next time).
void die_at(Call call, int nth);

/// While it lives, a write() takes at most `bytes`.
class ShortWrites {
 public:
  explicit ShortWrites(int bytes);
  ~ShortWrites();
  ShortWrites(const ShortWrites&) = delete;
  ShortWrites& operator=(const ShortWrites&) = delete;
};

}  // namespace attune::test
