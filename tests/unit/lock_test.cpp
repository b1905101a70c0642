#include "cache/lock.h"

#include "cache/folder.h"
#include "os_faults.h"
#include "tests/support/temp_dir.h"

#include <doctest/doctest.h>

#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>

namespace attune::cache {
namespace {

namespace fs = std::filesystem;
using attune::test::Call;
using attune::test::FailingCall;

/// The root of a cache that has been stored to.
struct Root {
  attune::test::TempDir dir;
  Root() { fs::create_directory(dir.path() / "v1"); }

  bool free(int slot) const {
    const auto lock = try_lock(dir.path(), slot);
    REQUIRE_MESSAGE(lock.ok(), lock.failure().message);
    return lock->has_value();
  }
};

/// Runs in a process of its own, as the environment is read once.
template <typename Body>
bool in_child(Body body) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(body() ? 0 : 1);
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return status == 0;
}

TEST_CASE("a slot has one holder at a time, and its neighbours another") {
  const Root root;
  {
    const auto lock = try_lock(root.dir.path(), 7);
    REQUIRE(lock.ok());
    REQUIRE(lock->has_value());
    CHECK_FALSE(root.free(7));  // to this process, too
    CHECK(root.free(6));
    CHECK(root.free(sweep_slot));
    CHECK(in_child([&] { return !root.free(7); }));
  }
  CHECK(root.free(7));
  CHECK(fs::exists(locks_in(root.dir.path())));  // never unlinked: others may be waiting on it
}

TEST_CASE("a lock ends with its holder, whatever a forked child keeps open") {
  const Root root;
  int pipe[2];
  REQUIRE(::pipe(pipe) == 0);
  pid_t child = 0;
  {
    const auto lock = try_lock(root.dir.path(), 1);
    child = ::fork();
    if (child == 0) {
      char wait = 0;
      static_cast<void>(::read(pipe[0], &wait, 1));  // until it is killed
      ::_exit(0);
    }
    CHECK_FALSE(root.free(1));
  }
  CHECK(root.free(1));
  REQUIRE(::kill(child, SIGKILL) == 0);
  REQUIRE(::waitpid(child, nullptr, 0) == child);
}

TEST_CASE("a process that is killed leaves no lock behind") {
  const Root root;
  int ready[2];
  REQUIRE(::pipe(ready) == 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const auto lock = try_lock(root.dir.path(), 3);
    static_cast<void>(::write(ready[1], "x", 1));
    ::pause();
  }
  char byte = 0;
  REQUIRE(::read(ready[0], &byte, 1) == 1);
  CHECK_FALSE(root.free(3));
  REQUIRE(::kill(child, SIGKILL) == 0);
  REQUIRE(::waitpid(child, nullptr, 0) == child);
  CHECK(root.free(3));
}

TEST_CASE("a cache on no local disk has its locks in the session's folder") {
  const Root root;
  const attune::test::TempDir session;
  CHECK(in_child([&] {
    ::setenv("XDG_RUNTIME_DIR", session.path().c_str(), 1);
    const FailingCall failing(Call::statfs, EIO, 1);  // of the cache's folder; the session's comes next
    const auto lock = try_lock(root.dir.path(), 5);
    return lock.ok() && lock->has_value();
  }));
  CHECK(fs::exists(session.path() / "attune.locks"));
  CHECK_FALSE(fs::exists(locks_in(root.dir.path())));
}

TEST_CASE("where locks don't work that is a failure, not a wait") {
  const Root root;
  SUBCASE("the kernel has none left") {
    const FailingCall failing(Call::lock, ENOLCK);
    CHECK(try_lock(root.dir.path(), 0).failure().message.find("No locks available") != std::string::npos);
  }
  SUBCASE("the file system is not known to be local") {
    CHECK(in_child([&] {
      ::unsetenv("XDG_RUNTIME_DIR");
      const FailingCall failing(Call::statfs, EIO);
      const auto lock = try_lock(root.dir.path(), 0);
      return !lock.ok() && lock.failure().message.find("it is not on a local disk") != std::string::npos;
    }));
    CHECK_FALSE(fs::exists(locks_in(root.dir.path())));
  }
  SUBCASE("others may write to the file") {
    REQUIRE(root.free(0));
    REQUIRE(::chmod(locks_in(root.dir.path()).c_str(), 0666) == 0);
    CHECK(try_lock(root.dir.path(), 0).failure().message.find("others may write to") != std::string::npos);
  }
}

}  // namespace
}  // namespace attune::cache
