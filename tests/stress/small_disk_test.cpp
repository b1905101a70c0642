// A store on a real disk that is full, then read-only: a tmpfs of its own, in a mount namespace of its own.
#include "cache/store.h"
#include "tests/support/temp_dir.h"

#include <doctest/doctest.h>

#include <sched.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

namespace attune::cache {
namespace {

namespace fs = std::filesystem;

constexpr int kCannotMount = 77;

Entry entry_of(int number) {
  return {.key = sha256(std::to_string(number)),
          .metadata_json = "{}",
          .payload = std::vector<std::byte>(20'000, static_cast<std::byte>(number))};
}

/// Mounts need no rights in a user namespace of one's own, where the system allows those.
bool mount_disk(const fs::path& folder, const char* options) {
  if (::unshare(CLONE_NEWNS) != 0) {
    const uid_t user = ::geteuid();
    if (::unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) return false;
    std::ofstream("/proc/self/uid_map") << user << ' ' << user << " 1";
  }
  return ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
         ::mount("tmpfs", folder.c_str(), "tmpfs", 0, options) == 0;
}

/// Runs the body in a process of its own, with a disk of 512 KiB at the path that it is given. The body
/// returns what went wrong.
void on_a_small_disk(const std::function<std::string(const fs::path&)>& body) {
  const test::TempDir dir;
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    if (!mount_disk(dir.path(), "size=512k,mode=0755")) ::_exit(kCannotMount);
    const std::string wrong = body(dir.path());
    std::fputs(wrong.c_str(), stderr);
    std::fflush(stderr);
    ::_exit(wrong.empty() ? 0 : 1);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  if (WIFEXITED(status) && WEXITSTATUS(status) == kCannotMount) {
    MESSAGE("skipped: this system lets us mount nothing");
    return;
  }
  CHECK(status == 0);
}

Store open(const fs::path& disk, std::vector<std::string>& warnings) {
  return Store(disk / "cache", Mode::rw, [&warnings](const std::string& line) { warnings.push_back(line); });
}

std::string only_warning(const std::vector<std::string>& warnings, const std::string& part) {
  if (warnings.size() == 1 && warnings[0].find(part) != std::string::npos) return "";
  std::string text = "expected one warning of \"" + part + "\", got:\n";
  for (const std::string& line : warnings) text += line + "\n";
  return text;
}

/// Stores until the disk is full. How many entries it took.
int fill(Store& store) {
  int number = 0;
  while (store.counters().store_errors == 0 && number < 100) store.store(entry_of(number++));
  return number - 1;
}

TEST_CASE("a full disk costs one warning; what is there is whole, and half a file is not") {
  on_a_small_disk([](const fs::path& disk) -> std::string {
    std::vector<std::string> warnings;
    Store store = open(disk, warnings);
    const int stored = fill(store);
    store.store(entry_of(1000));
    if (stored < 10 || stored > 25) return "stored " + std::to_string(stored);
    if (store.list().size() != static_cast<std::size_t>(stored)) return "not all are listed";
    for (int number = 0; number < stored; ++number) {
      const auto found = store.find(entry_of(number).key);
      if (!found || found->payload != entry_of(number).payload) return "lost " + std::to_string(number);
    }
    if (!fs::is_empty(disk / "cache" / "v1" / "tmp")) return "a temporary file is left";
    if (store.totals()->stores != static_cast<std::uint64_t>(stored)) return "the counters are wrong";
    return only_warning(warnings, "No space left on device");
  });
}

TEST_CASE("a disk that was full takes entries again once there is room") {
  on_a_small_disk([](const fs::path& disk) -> std::string {
    std::vector<std::string> warnings;
    Store full = open(disk, warnings);
    const int stored = fill(full);
    if (!full.prune({.max_bytes = 100'000}).ok()) return "cannot prune";
    Store next = open(disk, warnings);
    next.store(entry_of(stored));
    if (!next.find(entry_of(stored).key)) return "not stored";
    return only_warning(warnings, "No space left on device");
  });
}

TEST_CASE("a disk that becomes read-only is still read") {
  on_a_small_disk([](const fs::path& disk) -> std::string {
    std::vector<std::string> warnings;
    open(disk, warnings).store(entry_of(1));
    if (::mount(nullptr, disk.c_str(), nullptr, MS_REMOUNT | MS_RDONLY, nullptr) != 0)
      return "cannot remount";
    Store store = open(disk, warnings);
    if (!store.find(entry_of(1).key)) return "not found";
    store.store(entry_of(2));
    store.store(entry_of(3));
    if (store.prune({.max_bytes = 0})->kept != 1) return "removed from a disk that is only read";
    return only_warning(warnings, "Read-only file system");
  });
}

}  // namespace
}  // namespace attune::cache
