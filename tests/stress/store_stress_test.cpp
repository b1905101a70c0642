// Many threads and processes on one cache folder, some of which die in the middle of a store. Whoever looks
// finds whole entries or none. `--cases N` kills N processes in the test that kills at random.
#define DOCTEST_CONFIG_IMPLEMENT
#include "cache/store.h"
#include "tests/support/random.h"
#include "tests/support/temp_dir.h"
#include "tests/unit/os_faults.h"

#include <doctest/doctest.h>

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <thread>
#include <vector>

namespace attune::cache {
namespace {

namespace fs = std::filesystem;
using test::Call;
using test::Random;

constexpr int kKeys = 12;

int case_count = 40;

/// The entry of a key number; large ones take several pages, so that a half-written one is possible.
Entry entry_of(int number) {
  Entry entry{.key = sha256(std::to_string(number)),
              .metadata_json = "{\"number\": " + std::to_string(number) + "}",
              .payload = std::vector<std::byte>(1000 + 9000 * static_cast<std::size_t>(number))};
  std::ranges::fill(entry.payload, static_cast<std::byte>(number));
  return entry;
}

bool same(const Entry& a, const Entry& b) {
  return a.key == b.key && a.metadata_json == b.metadata_json && a.payload == b.payload;
}

/// Finds and stores at random. The number of entries that were found, but not as they were stored.
int work(Store& store, Random random, int rounds) {
  int wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    const Entry expected = entry_of(random.integer(0, kKeys - 1));
    const auto found = store.find(expected.key);
    if (found && !same(*found, expected)) ++wrong;
    if (!found || random.chance(0.3)) store.store(expected);
  }
  return wrong;
}

Store open(const fs::path& root, std::vector<std::string>* warnings = nullptr) {
  return Store(root, Mode::rw, [warnings](const std::string& line) {
    if (warnings != nullptr) warnings->push_back(line);
  });
}

/// Runs in a child process: two threads on one store. The exit status tells whether all that they saw was
/// right.
[[noreturn]] void child(const fs::path& root, std::uint64_t seed, std::uint64_t stream, int rounds) {
  Store store = open(root);
  int wrong[2] = {0, 0};
  std::thread other([&] { wrong[1] = work(store, Random(seed, 2 * stream + 1), rounds); });
  wrong[0] = work(store, Random(seed, 2 * stream), rounds);
  other.join();
  const Counters& counters = store.counters();
  ::_exit(wrong[0] + wrong[1] == 0 && counters.defects == 0 && counters.store_errors == 0 ? 0 : 1);
}

int wait_for(pid_t process) {
  int status = 0;
  while (::waitpid(process, &status, 0) < 0) REQUIRE(errno == EINTR);
  return status;
}

/// All that is there is whole, and every key can be stored and found.
void check_readable(const fs::path& root) {
  std::vector<std::string> warnings;
  Store store = open(root, &warnings);
  for (const Listed& file : store.list()) {
    const auto entry = store.inspect(file.key);
    CHECK_MESSAGE(entry.ok(), file.path.string());
  }
  for (int number = 0; number < kKeys; ++number) {
    const Entry expected = entry_of(number);
    if (const auto found = store.find(expected.key)) {
      CHECK(same(*found, expected));
    } else {
      store.store(expected);
    }
    const auto again = store.find(expected.key);
    REQUIRE(again);
    CHECK(same(*again, expected));
  }
  CHECK(store.list().size() == kKeys);
  CHECK(store.counters().defects == 0);
  CHECK(warnings.empty());
}

TEST_CASE("eight threads on one store") {
  const std::uint64_t seed = test::test_seed();
  const test::TempDir dir;
  Store store = open(dir.path() / "cache");
  std::vector<int> wrong(8);
  {
    std::vector<std::jthread> threads;
    for (std::size_t t = 0; t < wrong.size(); ++t) {
      threads.emplace_back([&, t] { wrong[t] = work(store, Random(seed, t), 100); });
    }
  }
  CHECK(std::ranges::count(wrong, 0) == 8);
  const Counters& counters = store.counters();
  CHECK(counters.hits + counters.misses == 800);
  CHECK(counters.defects == 0);
  CHECK(counters.store_errors == 0);
  CHECK(counters.stores >= kKeys);
  CHECK(fs::is_empty(dir.path() / "cache" / "v1" / "tmp"));
  check_readable(dir.path() / "cache");
}

TEST_CASE("processes that nobody kills see only whole entries") {
  const std::uint64_t seed = test::test_seed();
  const test::TempDir dir;
  std::vector<pid_t> processes;
  for (std::uint64_t p = 0; p < 6; ++p) {
    const pid_t process = ::fork();
    REQUIRE(process >= 0);
    if (process == 0) child(dir.path() / "cache", seed, 100 + p, 60);
    processes.push_back(process);
  }
  for (const pid_t process : processes) CHECK(wait_for(process) == 0);
  check_readable(dir.path() / "cache");
}

/// Stores for ever, large entries in small pieces, into a cache that has no room for all of them: so that
/// most moments are in the middle of a store, and some in a sweep.
[[noreturn]] void victim(const fs::path& root, std::uint64_t seed, std::uint64_t stream) {
  Store store(
      root, Mode::rw, [](const std::string&) {}, 400'000);
  const test::ShortWrites pieces(4096);
  while (true) work(store, Random(seed, stream), 1 << 30);
}

/// Entries that are there and not as they were stored.
int count_torn(const fs::path& root) {
  const Store store = open(root);
  int torn = 0;
  for (int number = 0; number < kKeys; ++number) {
    const auto found = store.inspect(entry_of(number).key);
    const bool absent =
        !found.ok() && found.failure().message.find("is not in the cache") != std::string::npos;
    if (!absent && !(found.ok() && same(*found, entry_of(number)))) ++torn;
  }
  return torn;
}

TEST_CASE("processes that are killed at any moment leave a readable store to the others") {
  const std::uint64_t seed = test::test_seed();
  const test::TempDir dir;
  const fs::path root = dir.path() / "cache";
  Random random(seed, 1000);
  const pid_t survivor = ::fork();
  REQUIRE(survivor >= 0);
  if (survivor == 0) child(root, seed, 200, 10 * case_count);
  int torn = 0;
  for (int number = 0; number < case_count; ++number) {
    const pid_t process = ::fork();
    REQUIRE(process >= 0);
    if (process == 0) victim(root, seed, 300 + static_cast<std::uint64_t>(number));
    std::this_thread::sleep_for(std::chrono::microseconds(random.integer(500, 30000)));
    REQUIRE(::kill(process, SIGKILL) == 0);
    CHECK(WIFSIGNALED(wait_for(process)));
    torn += count_torn(root);
  }
  CHECK(torn == 0);
  CHECK(wait_for(survivor) == 0);
  const auto halves = std::distance(fs::directory_iterator(root / "v1" / "tmp"), fs::directory_iterator());
  MESSAGE(case_count << " processes were killed, " << halves << " of them in the middle of a file");
  check_readable(root);
}

TEST_CASE("a death at each step of a store leaves the old entry or the new one") {
  struct Step {
    Call call;
    int nth;
    bool published;
  };
  // The first store of a process also writes CACHEDIR.TAG, so these come after one that went well. A store
  // is: write, fsync the file, rename, fsync the folder.
  for (const Step& step :
       {Step{Call::write, 1, false}, Step{Call::write, 5, false}, Step{Call::fsync, 1, false},
        Step{Call::rename, 1, false}, Step{Call::fsync, 2, true}}) {
    const test::TempDir dir;
    const fs::path root = dir.path() / "cache";
    const pid_t process = ::fork();
    REQUIRE(process >= 0);
    if (process == 0) {
      Store store = open(root);
      store.store(entry_of(0));
      const test::ShortWrites pieces(4096);  // so that there is a half-written file
      test::die_at(step.call, step.nth);
      store.store(entry_of(5));
      ::_exit(0);
    }
    const int status = wait_for(process);
    REQUIRE(WIFSIGNALED(status));
    CHECK(WTERMSIG(status) == SIGKILL);

    Store store = open(root);
    CHECK(store.find(entry_of(0).key));
    CHECK(store.find(entry_of(5).key).has_value() == step.published);
    CHECK(store.counters().defects == 0);
    CHECK(fs::is_empty(root / "v1" / "tmp") == step.published);

    // An hour later, the next process to store something sweeps what the dead one left.
    for (const auto& file : fs::directory_iterator(root / "v1" / "tmp")) {
      fs::last_write_time(file.path(), fs::file_time_type::clock::now() - std::chrono::minutes(61));
    }
    check_readable(root);
    CHECK(fs::is_empty(root / "v1" / "tmp"));
  }
}

}  // namespace
}  // namespace attune::cache

int main(int argc, char** argv) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::strcmp(argv[i], "--cases") == 0) attune::cache::case_count = std::max(1, std::atoi(argv[i + 1]));
  }
  return doctest::Context(argc, argv).run();
}
