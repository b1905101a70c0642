#include "cache/prune.h"

#include "cache/lock.h"
#include "cache_entries.h"
#include "os_faults.h"

#include <doctest/doctest.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <fstream>
#include <set>

namespace attune::cache {
namespace {

namespace fs = std::filesystem;
using attune::test::Call;
using attune::test::FailingCall;
using test::entry_of;
using test::Folder;
using test::kDay;
using test::set_times;
using test::used_ago;

constexpr std::uint64_t kEntry = kPayloadOffset + 1000;

/// Entries a, b, c, d of the same size: a was used four days ago, d yesterday. They were stored the other way
/// round.
struct Four : Folder {
  Four() {
    Store store = open();
    int age = 4;
    for (const char* name : {"a", "b", "c", "d"}) {
      store.store(entry_of(name, 1000));
      set_times(store.path_of(sha256(name)), -age * kDay, -(10 - age) * kDay);
      --age;
    }
  }
  std::string names() {
    std::string found;
    for (const char* name : {"a", "b", "c", "d", "e", "f"}) {
      if (fs::exists(open().path_of(sha256(name)))) found += name;
    }
    return found;
  }
};

TEST_CASE("a use is noted once a day, and is not the time of the store") {
  Four f;
  Store store = f.open();
  const fs::path path = store.path_of(sha256("a"));
  const auto stored = listed_file(path)->modified_unix;
  REQUIRE(store.find(sha256("a")));
  CHECK(used_ago(path) < 600);
  CHECK(listed_file(path)->modified_unix == stored);
  CHECK(::time(nullptr) - listed_file(path)->used_unix < 600);

  set_times(path, -kDay + 600, -kDay);
  REQUIRE(store.find(sha256("a")));
  CHECK(used_ago(path) > kDay - 700);
}

TEST_CASE("looking is no use: neither of a list, nor of inspect, nor of a cache that is only read") {
  Four f;
  const fs::path path = f.open().path_of(sha256("a"));
  REQUIRE(f.open().inspect(sha256("a")).ok());
  REQUIRE(f.open().list().size() == 4);
  REQUIRE(f.open(0, Mode::ro).find(sha256("a")));
  CHECK(used_ago(path) > 3 * kDay);
}

TEST_CASE("the least recently used go first, until the rest fits") {
  Four f;
  const auto pruned = f.open().prune({.max_bytes = 2 * kEntry + 5});
  REQUIRE(pruned.ok());
  CHECK(f.names() == "cd");
  REQUIRE(pruned->removed.size() == 2);
  CHECK(pruned->removed[0].key == sha256("a"));
  CHECK(pruned->removed_bytes == 2 * kEntry);
  CHECK(pruned->kept == 2);
  CHECK(pruned->kept_bytes == 2 * kEntry);
  CHECK(f.open().totals()->evictions == 2);
}

TEST_CASE("what was not used for long goes") {
  Four f;
  CHECK(f.open().prune({.max_age = std::chrono::hours(60)})->removed.size() == 2);
  CHECK(f.names() == "cd");
  CHECK(f.open().prune({})->removed.empty());
  CHECK(f.open().prune({.max_bytes = 0})->kept == 0);
  CHECK(f.names().empty());
}

TEST_CASE("a dry run tells the same and changes nothing") {
  Four f;
  const auto dry = f.open().prune({.max_bytes = kEntry, .dry_run = true});
  CHECK(dry->removed.size() == 3);
  CHECK(dry->kept_bytes == kEntry);
  CHECK(f.names() == "abcd");
  CHECK(f.open(0, Mode::ro).prune({.max_bytes = 0, .dry_run = true})->removed.size() == 4);
}

TEST_CASE("prune says why it can't") {
  Four f;
  CHECK(f.open(0, Mode::ro).prune({.max_bytes = 0}).failure().message ==
        "the cache " + f.root.string() + " is open for reading only");
  {
    const auto sweep = try_lock(f.root, sweep_slot);
    REQUIRE(sweep->has_value());
    CHECK(f.open().prune({.max_bytes = 0}).failure().message ==
          "another process prunes " + f.root.string() + " now; try again");
  }
  REQUIRE(::chmod(f.root.c_str(), 0777) == 0);
  CHECK(f.open().prune({.max_bytes = 0}).failure().message.find("others may write to") != std::string::npos);
  CHECK(f.names() == "abcd");
  Folder empty;
  CHECK(empty.open().prune({.max_bytes = 0})->removed.empty());
  CHECK_FALSE(fs::exists(empty.root));
}

TEST_CASE("the writer that passes the bound sweeps to 80 percent") {
  Four f;
  Store store = f.open(5 * kEntry);
  store.store(entry_of("e", 1000));
  CHECK(f.names() == "abcde");
  store.store(entry_of("f", 1000));
  CHECK(f.names() == "cdef");
  CHECK(store.counters().evictions == 2);
  CHECK(store.totals()->evictions == 2);
  CHECK(f.warnings.empty());
}

TEST_CASE("bytes that other processes store count, those that they replace don't") {
  Four f;
  Store early = f.open(5 * kEntry);
  early.store(entry_of("d", 1000));
  for (int i = 0; i < 10; ++i) f.open(5 * kEntry).store(entry_of("d", 1000));
  CHECK(f.names() == "abcd");
  f.open(0).store(entry_of("e", 1000));  // 0 is no bound
  f.open(0).store(entry_of("f", 1000));
  CHECK(f.names() == "abcdef");
  early.store(entry_of("d", 1000));
  CHECK(f.names() == "cdef");
}

TEST_CASE("a cache of a version that kept no ledger is measured at the first store") {
  Four f;
  fs::remove(f.root / "v1" / "counters");
  f.open(3 * kEntry).store(entry_of("e", 1000));
  CHECK(f.names() == "de");
}

TEST_CASE("the list counts, not the ledger: what somebody deleted makes room") {
  Four f;
  Store store = f.open(5 * kEntry);
  store.store(entry_of("e", 1000));
  fs::remove(store.path_of(sha256("a")));
  store.store(entry_of("f", 1000));
  CHECK(f.names() == "bcdef");
}

TEST_CASE("an entry larger than the bound does not stay, and is no trouble") {
  Folder f;
  Store store = f.open(1000);
  store.store(entry_of("a"));
  store.store(entry_of("b"));
  CHECK(store.list().empty());
  CHECK(store.counters().stores == 2);
  CHECK(f.warnings.empty());
}

TEST_CASE("while one process sweeps the others go on") {
  Four f;
  const auto sweep = try_lock(f.root, sweep_slot);
  REQUIRE(sweep->has_value());
  f.open(kEntry).store(entry_of("e", 1000));
  CHECK(f.names() == "abcde");
}

TEST_CASE("where locks don't work it sweeps all the same") {
  Four f;
  const FailingCall failing(Call::lock, ENOLCK);
  f.open(3 * kEntry).store(entry_of("e", 1000));
  CHECK(f.names() == "de");
}

TEST_CASE("what was replaced or used since it was listed stays") {
  Four f;
  Store store = f.open();
  const auto listed = store.list();
  store.store(entry_of("a", 1000));
  REQUIRE(store.find(sha256("b")));
  fs::remove(store.path_of(sha256("c")));  // another sweep was here
  const Pruned pruned = prune(listed, {.max_bytes = 0});
  CHECK(f.names() == "ab");
  CHECK(pruned.removed.size() == 2);
  CHECK(pruned.kept_bytes == 2 * kEntry);
}

TEST_CASE("an entry that is being read is read to its end") {
  Folder f;
  Store store = f.open();
  store.store(entry_of("a", 100'000));
  const int file = ::open(store.path_of(sha256("a")).c_str(), O_RDONLY | O_CLOEXEC);
  REQUIRE(file >= 0);
  std::vector<std::byte> bytes(kPayloadOffset + 100'000);
  REQUIRE(::read(file, bytes.data(), 1000) == 1000);
  REQUIRE(store.prune({.max_bytes = 0})->removed.size() == 1);
  CHECK_FALSE(fs::exists(store.path_of(sha256("a"))));
  const auto rest = static_cast<ssize_t>(bytes.size() - 1000);
  CHECK(::read(file, bytes.data() + 1000, bytes.size() - 1000) == rest);
  CHECK(decode(bytes, sha256("a")).ok());
  ::close(file);
}

TEST_CASE("times in the future count as now and are put right") {
  Four f;
  Store store = f.open();
  const fs::path a = store.path_of(sha256("a"));
  set_times(a, 1000 * kDay, 1000 * kDay);
  SUBCASE("by a use") {
    REQUIRE(store.find(sha256("a")));
    CHECK(std::abs(used_ago(a)) < 600);
  }
  SUBCASE("by a sweep, so that it ages from today") {
    CHECK(store.prune({.max_bytes = 3 * kEntry})->removed[0].key == sha256("b"));
    CHECK(std::abs(used_ago(a)) < 600);
  }
  SUBCASE("not by a dry run") {
    CHECK(store.prune({.max_bytes = 3 * kEntry, .dry_run = true})->removed[0].key == sha256("b"));
    CHECK(used_ago(a) < -900 * kDay);
  }
}

TEST_CASE("files in tmp/ from the future age from today, and refused entries are kept for a month") {
  Four f;
  const fs::path future = f.root / "v1" / "tmp" / "new-future";
  std::ofstream(future) << "x";
  set_times(future, 1000 * kDay, 1000 * kDay);
  const fs::path quarantine = f.root / "v1" / "quarantine";
  fs::create_directory(quarantine);
  for (const int days : {29, 31}) {
    std::ofstream(quarantine / std::to_string(days)) << "x";
    set_times(quarantine / std::to_string(days), -days * kDay, -days * kDay);
  }
  f.open(kEntry).store(entry_of("e", 1000));
  struct stat info {};
  REQUIRE(::stat(future.c_str(), &info) == 0);
  CHECK(std::abs(::time(nullptr) - info.st_mtim.tv_sec) < 600);
  CHECK(fs::exists(quarantine / "29"));
  CHECK_FALSE(fs::exists(quarantine / "31"));
}

}  // namespace
}  // namespace attune::cache
