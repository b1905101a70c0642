#include "cache/turn.h"

#include "cache_entries.h"
#include "os_faults.h"

#include <doctest/doctest.h>

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <thread>

namespace attune::cache {
namespace {

using attune::test::Call;
using attune::test::FailingCall;
using test::entry_of;
using test::Folder;
using namespace std::chrono_literals;

/// A "compiler" that takes a while and leaves a byte in a file for each run. (The store's own totals are no
/// proof: a process that ends while the counters are in use loses its count.)
class Compiler {
 public:
  explicit Compiler(const Folder& f) : runs_(f.dir.path() / "runs") {}

  void run() const {
    std::this_thread::sleep_for(50ms);
    const int file = ::open(runs_.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
    REQUIRE(::write(file, "x", 1) == 1);
    REQUIRE(::close(file) == 0);
  }

  std::uintmax_t runs() const { return std::filesystem::file_size(runs_); }

 private:
  std::filesystem::path runs_;
};

/// What a process does on a miss.
Entry obtain(Store& store, const Compiler& compiler, const std::string& name) {
  const Digest key = sha256(name);
  if (auto entry = store.find(key)) return *entry;
  Turn turn = take_turn(store, key);
  if (turn.entry) return *turn.entry;
  compiler.run();
  Entry made = entry_of(name, 5000);
  store.store(made);
  return made;
}

/// Starts the processes, lets them all go at once, and counts those that got another entry than they should.
template <typename Body>
int count_wrong(int processes, Body body) {
  int gate[2];
  REQUIRE(::pipe(gate) == 0);
  std::vector<pid_t> children;
  for (int p = 0; p < processes; ++p) {
    children.push_back(::fork());
    REQUIRE(children.back() >= 0);
    if (children.back() != 0) continue;
    ::close(gate[1]);
    char byte = 0;
    while (::read(gate[0], &byte, 1) > 0) {}
    ::_exit(body(p) ? 0 : 1);
  }
  ::close(gate[0]);
  ::close(gate[1]);
  int wrong = 0;
  for (const pid_t child : children) {
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    if (status != 0) ++wrong;
  }
  return wrong;
}

bool obtains(Folder& f, const std::string& name) {
  Store store = f.open();
  const Entry entry = obtain(store, Compiler(f), name);
  return entry.key == sha256(name) && entry.payload == entry_of(name, 5000).payload && f.warnings.empty();
}

TEST_CASE("64 processes that miss one key compile it once") {
  Folder f;
  CHECK(count_wrong(64, [&](int) { return obtains(f, "a"); }) == 0);
  CHECK(Compiler(f).runs() == 1);
  CHECK(f.open().list().size() == 1);
}

TEST_CASE("64 processes that miss 8 keys compile each once") {
  Folder f;
  CHECK(count_wrong(64, [&](int p) { return obtains(f, std::to_string(p % 8)); }) == 0);
  CHECK(Compiler(f).runs() == 8);
  CHECK(f.open().list().size() == 8);
}

TEST_CASE("where locks don't work every process gets its entry, by its own work") {
  Folder f;
  const FailingCall failing(Call::lock, ENOLCK);
  CHECK(count_wrong(16, [&](int) { return obtains(f, "a"); }) == 0);
  CHECK(f.open().list().size() == 1);
  CHECK(f.open().inspect(sha256("a")).ok());
  CHECK(f.warnings.empty());
}

TEST_CASE("a store that can't be waited for gives a turn at once") {
  Folder f;
  f.open().store(entry_of("other"));
  const auto held = try_lock(f.root, key_slot(sha256("a")));
  REQUIRE(held->has_value());
  for (const Mode mode : {Mode::ro, Mode::off, Mode::refresh}) {
    Store store = f.open(0, mode);
    const Turn turn = take_turn(store, sha256("a"), 1h);
    CHECK_FALSE(turn.entry);
    CHECK_FALSE(turn.lock);
  }
}

TEST_CASE("patience ends: who hangs with the lock delays the others, and that is all") {
  Folder f;
  Store store = f.open();
  REQUIRE(store.writable());
  const auto held = try_lock(f.root, key_slot(sha256("a")));
  REQUIRE(held->has_value());
  const auto begin = std::chrono::steady_clock::now();
  const Turn turn = take_turn(store, sha256("a"), 30ms);
  CHECK(std::chrono::steady_clock::now() - begin >= 30ms);
  CHECK_FALSE(turn.entry);
  CHECK_FALSE(turn.lock);
  store.store(entry_of("a"));
  CHECK(take_turn(store, sha256("a"), 1h).entry);  // it is there, whoever holds the lock
}

TEST_CASE("a process that dies in its turn gives it to the next") {
  Folder f;
  Store store = f.open();
  REQUIRE(store.writable());
  int ready[2];
  REQUIRE(::pipe(ready) == 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const Turn turn = take_turn(store, sha256("a"));
    static_cast<void>(::write(ready[1], "x", 1));
    ::pause();
  }
  char byte = 0;
  REQUIRE(::read(ready[0], &byte, 1) == 1);
  CHECK_FALSE(take_turn(store, sha256("a"), 0ms).lock);
  REQUIRE(::kill(child, SIGKILL) == 0);
  REQUIRE(::waitpid(child, nullptr, 0) == child);
  const Turn turn = take_turn(store, sha256("a"), 1h);
  CHECK(turn.lock);
}

TEST_CASE("a miss is counted once, however long the wait is") {
  Folder f;
  Store store = f.open();
  obtain(store, Compiler(f), "a");
  CHECK(store.counters().misses == 1);
  CHECK(store.counters().hits == 0);
}

}  // namespace
}  // namespace attune::cache
