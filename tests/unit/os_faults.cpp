#include "os_faults.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstddef>
#include <cstdio>

namespace attune::test {
namespace {

std::atomic<int> failing_call{-1};
std::atomic<int> failing_error{0};
std::atomic<int> failures_left{0};
std::atomic<int> failure_count{0};
std::atomic<int> deadly_call{-1};
std::atomic<int> calls_to_live{0};
std::atomic<std::size_t> write_limit{std::numeric_limits<std::size_t>::max()};

bool fails(Call call) {
  if (deadly_call == static_cast<int>(call) && --calls_to_live == 0) ::kill(::getpid(), SIGKILL);
  if (failing_call != static_cast<int>(call) || failures_left.fetch_sub(1) <= 0) return false;
  ++failure_count;
  errno = failing_error;
  return true;
}

template <typename Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

FailingCall::FailingCall(Call call, int error, int times) {
  failing_error = error;
  failures_left = times;
  failure_count = 0;
  failing_call = static_cast<int>(call);
}

FailingCall::~FailingCall() {
  failing_call = -1;
}

int FailingCall::failures() const {
  return failure_count;
}

void die_at(Call call, int nth) {
  calls_to_live = nth;
  deadly_call = static_cast<int>(call);
}

ShortWrites::ShortWrites(int bytes) {
  write_limit = static_cast<std::size_t>(bytes);
}

ShortWrites::~ShortWrites() {
  write_limit = std::numeric_limits<std::size_t>::max();
}

}  // namespace attune::test

// The executable's own definitions come before the C library's, so the library under test needs no seam.
extern "C" {

ssize_t write(int fd, const void* data, size_t size) {
  static auto* const real = attune::test::next<decltype(write)>("write");
  if (attune::test::fails(attune::test::Call::write)) return -1;
  return real(fd, data, std::min(size, attune::test::write_limit.load()));
}

int fsync(int fd) {
  static auto* const real = attune::test::next<decltype(fsync)>("fsync");
  return attune::test::fails(attune::test::Call::fsync) ? -1 : real(fd);
}

int rename(const char* from, const char* to) noexcept {
  static auto* const real = attune::test::next<decltype(rename)>("rename");
  return attune::test::fails(attune::test::Call::rename) ? -1 : real(from, to);
}

int statfs(const char* path, struct statfs* info) noexcept {
  static auto* const real = attune::test::next<int(const char*, struct statfs*)>("statfs");
  return attune::test::fails(attune::test::Call::statfs) ? -1 : real(path, info);
}

int fcntl(int fd, int command, ...) {
  static auto* const real = attune::test::next<int(int, int, void*)>("fcntl");
  std::va_list arguments;
  va_start(arguments, command);
  void* const argument = va_arg(arguments, void*);
  va_end(arguments);
  const bool taken = command == F_OFD_SETLK && static_cast<struct flock*>(argument)->l_type == F_WRLCK;
  return taken && attune::test::fails(attune::test::Call::lock) ? -1 : real(fd, command, argument);
}
}
