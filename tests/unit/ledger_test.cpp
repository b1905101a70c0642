#include "cache/ledger.h"

#include "base/file.h"
#include "cache_entries.h"
#include "os_faults.h"

#include <doctest/doctest.h>

#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <vector>

namespace attune::cache {
namespace {

namespace fs = std::filesystem;
using attune::test::Call;
using attune::test::FailingCall;
using test::entry_of;
using test::Folder;

/// A folder that counters may be written to.
struct Counted {
  attune::test::TempDir dir;
  Counted() { fs::create_directory(dir.path() / "v1"); }
};

TEST_CASE("what several stores do adds up") {
  Folder f;
  CHECK(*f.open().totals() == Totals{});
  {
    Store store = f.open();
    store.find(sha256("a"));  // there is no folder yet: the miss is written with the store
    store.compiled();
    store.store(entry_of("a"));
  }
  Store store = f.open();
  store.find(sha256("a"));
  store.find(sha256("b"));
  CHECK(*store.totals() == Totals{.hits = 1, .misses = 2, .stores = 1, .compiles = 1});
  std::ofstream(store.path_of(sha256("a"))) << "broken";
  store.find(sha256("a"));
  CHECK(*f.open().totals() == Totals{.hits = 1, .misses = 3, .defects = 1, .stores = 1, .compiles = 1});
}

TEST_CASE("each kernel's hits are counted") {
  Folder f;
  CHECK(f.open().kernel_hits()->of(sha256("a")) == 0);
  f.open().store(entry_of("a"));
  f.open().store(entry_of("b"));
  for (int i = 0; i < 3; ++i) f.open().find(sha256("a"));
  Store store = f.open();
  for (int i = 0; i < 2; ++i) store.find(sha256("b"));
  store.find(sha256("c"));
  const KernelHits hits = *store.kernel_hits();
  CHECK(hits.of(sha256("a")) == 3);
  CHECK(hits.of(sha256("b")) == 2);
  CHECK(hits.of(sha256("c")) == 0);
}

TEST_CASE("where there is no room for another kernel's hits, the least used one's go") {
  const attune::test::TempDir dir;
  const Descriptor file = *open_private_file(dir.path() / "hits");
  const auto key_of = [](std::uint8_t last) {
    Digest key;  // all of one row
    key.bytes.back() = last;
    return key;
  };
  const auto hits = [&] { return KernelHits(**read_private_file(dir.path() / "hits")); };
  for (std::uint8_t key = 1; key <= 8; ++key) {
    for (int i = 0; i <= key % 5; ++i) REQUIRE(add_hit(file, key_of(key)));
  }
  for (std::uint8_t key = 1; key <= 8; ++key) CHECK(hits().of(key_of(key)) == key % 5 + 1);
  REQUIRE(add_hit(file, key_of(9)));
  CHECK(hits().of(key_of(9)) == 1);
  CHECK(hits().of(key_of(5)) == 0);
  CHECK(hits().of(key_of(4)) == 5);
}

TEST_CASE("a table of hits that is cut off anywhere is read and written") {
  const attune::test::TempDir dir;
  const Descriptor file = *open_private_file(dir.path() / "hits");
  const Digest key = sha256("a");
  REQUIRE(add_hit(file, key));
  const auto whole = **read_private_file(dir.path() / "hits");
  REQUIRE(whole.size() > 200);
  std::vector<std::size_t> sizes{0, 1, whole.size() / 2};
  for (std::size_t missing = 0; missing <= 200; ++missing) {  // of its row and the one before
    sizes.push_back(whole.size() - missing);
  }
  for (const std::size_t size : sizes) {
    REQUIRE(ftruncate(file.get(), static_cast<off_t>(size)) == 0);
    CHECK(KernelHits({whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)}).of(key) <= 1);
    CHECK(add_hit(file, key));
  }
  CHECK(KernelHits().of(key) == 0);
}

TEST_CASE("a cache that is only read counts nothing") {
  Folder f;
  f.open().store(entry_of("a"));
  for (const Mode mode : {Mode::ro, Mode::off}) {
    Store store = f.open(0, mode);
    store.find(sha256("a"));
    store.find(sha256("b"));
    CHECK(*store.totals() == Totals{.stores = 1});
  }
}

TEST_CASE("processes that count at the same time lose nothing, and neither does one that is killed") {
  const Counted folder;
  constexpr int kProcesses = 8;
  constexpr int kRounds = 100;
  std::vector<pid_t> processes;
  for (int p = 0; p < kProcesses; ++p) {
    processes.push_back(::fork());
    REQUIRE(processes.back() >= 0);
    if (processes.back() != 0) continue;
    Ledger ledger(folder.dir.path());
    for (int round = 0; round < kRounds; ++round) {
      ledger.note({.hits = 1}, 10);
      while (!ledger.write().ok()) {}
    }
    ::kill(::getpid(), SIGKILL);
  }
  for (const pid_t process : processes) REQUIRE(::waitpid(process, nullptr, 0) == process);
  CHECK(Ledger(folder.dir.path()).totals()->hits == kProcesses * kRounds);
}

TEST_CASE("bytes are unknown until somebody has looked") {
  const Counted folder;
  Ledger ledger(folder.dir.path());
  ledger.note({.stores = 1}, 100);
  CHECK_FALSE(ledger.write()->has_value());
  CHECK(**ledger.write_bytes(5000) == 5000);
  ledger.note({}, 100);
  CHECK(**ledger.write() == 5100);
  ledger.note({}, -6000);
  CHECK(**ledger.write() == 0);  // it was wrong: not the reason to be wrong by 2^64
  CHECK(ledger.totals()->stores == 1);
}

TEST_CASE("what cannot be written now is written later") {
  const Counted folder;
  Ledger ledger(folder.dir.path());
  ledger.note({.hits = 3});
  fs::rename(folder.dir.path() / "v1", folder.dir.path() / "away");
  CHECK_FALSE(ledger.write().ok());
  fs::rename(folder.dir.path() / "away", folder.dir.path() / "v1");
  ledger.note({.hits = 4});
  CHECK(ledger.write().ok());
  CHECK(ledger.totals()->hits == 7);
  CHECK(ledger.write().ok());
  CHECK(ledger.totals()->hits == 7);
}

TEST_CASE("where locks don't work it counts all the same") {
  const Counted folder;
  Ledger ledger(folder.dir.path());
  ledger.note({.hits = 1});
  const FailingCall failing(Call::lock, ENOLCK);
  CHECK(ledger.write().ok());
  CHECK(ledger.totals()->hits == 1);
}

TEST_CASE("a damaged file starts again from zero") {
  const Counted folder;
  const fs::path file = folder.dir.path() / "v1" / "counters";
  for (const std::string& text :
       {std::string(), std::string(63, 'x'), std::string(64, 'x'), std::string(65, 'x')}) {
    std::ofstream(file, std::ios::binary) << text;
    fs::permissions(file, fs::perms::owner_read | fs::perms::owner_write);
    Ledger ledger(folder.dir.path());
    CHECK(*ledger.totals() == Totals{});
    ledger.note({.hits = 1});
    REQUIRE(ledger.write().ok());
    CHECK(*ledger.totals() == Totals{.hits = 1});
  }
}

}  // namespace
}  // namespace attune::cache
