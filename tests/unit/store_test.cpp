#include "cache/store.h"

#include "os_faults.h"
#include "tests/support/temp_dir.h"

#include <doctest/doctest.h>

#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <fstream>
#include <sstream>

namespace attune::cache {
namespace {

namespace fs = std::filesystem;
using test::Call;
using test::FailingCall;
using test::TempDir;

Entry sample(const std::string& key) {
  const auto payload = std::as_bytes(std::span(key));
  return {.key = sha256(key), .metadata_json = "{}", .payload = {payload.begin(), payload.end()}};
}

/// A store in a fresh folder, with its warnings.
struct Fixture {
  TempDir dir;
  fs::path root = dir.path() / "cache" / "attune";
  std::vector<std::string> warnings;

  Store open(Mode mode = Mode::rw) {
    return Store(root, mode, [this](const std::string& line) { warnings.push_back(line); });
  }
  bool warned(const std::string& part) const {
    return warnings.size() == 1 && warnings[0].find(part) != std::string::npos;
  }
};

std::string text_of(const fs::path& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

void put(const fs::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

mode_t mode_of(const fs::path& path) {
  struct stat info {};
  REQUIRE(::lstat(path.c_str(), &info) == 0);
  return info.st_mode & 07777U;
}

TEST_CASE("what one store publishes another one finds") {
  Fixture f;
  Store first = f.open();
  CHECK_FALSE(first.find(sha256("a")));
  CHECK_FALSE(fs::exists(f.root));  // looking creates nothing
  first.store(sample("a"));
  CHECK(first.counters().misses == 1);
  CHECK(first.counters().stores == 1);

  Store second = f.open();
  const auto entry = second.find(sha256("a"));
  REQUIRE(entry);
  CHECK(entry->payload == sample("a").payload);
  CHECK(second.counters().hits == 1);
  CHECK(second.counters().misses == 0);
  CHECK(f.warnings.empty());
}

TEST_CASE("the layout and its modes") {
  Fixture f;
  Store store = f.open();
  store.store(sample("a"));
  const std::string hex = sha256("a").hex();
  const fs::path object = f.root / "v1" / "objects" / hex.substr(0, 2) / hex.substr(2);
  CHECK(store.path_of(sha256("a")) == object);
  CHECK(mode_of(object) == 0600);
  for (const fs::path& folder : {f.root, f.root / "v1", f.root / "v1" / "tmp", object.parent_path()}) {
    CHECK(mode_of(folder) == 0700);
  }
  CHECK(text_of(f.root / "CACHEDIR.TAG").starts_with("Signature: 8a477f597d28d172789f06886806bc55\n"));
  CHECK(fs::is_empty(f.root / "v1" / "tmp"));
}

TEST_CASE("modes") {
  Fixture f;
  f.open().store(sample("old"));

  SUBCASE("ro finds and does not write") {
    Store store = f.open(Mode::ro);
    CHECK(store.find(sha256("old")));
    store.store(sample("new"));
    CHECK_FALSE(fs::exists(store.path_of(sha256("new"))));
  }
  SUBCASE("ro leaves a defective file where it is") {
    Store store = f.open(Mode::ro);
    put(store.path_of(sha256("old")), "broken");
    CHECK_FALSE(store.find(sha256("old")));
    CHECK(store.counters().defects == 1);
    CHECK(fs::exists(store.path_of(sha256("old"))));
    CHECK_FALSE(store.quarantine(sha256("old")));
  }
  SUBCASE("off does neither") {
    Store store = f.open(Mode::off);
    CHECK_FALSE(store.find(sha256("old")));
    store.store(sample("new"));
    CHECK_FALSE(fs::exists(store.path_of(sha256("new"))));
    CHECK(store.counters().misses == 0);
  }
  SUBCASE("refresh writes over and does not read") {
    Store store = f.open(Mode::refresh);
    CHECK_FALSE(store.find(sha256("old")));
    Entry entry = sample("old");
    entry.metadata_json = "{\"new\": true}";
    store.store(entry);
    CHECK(f.open().find(sha256("old"))->metadata_json == "{\"new\": true}");
  }
}

TEST_CASE("a defective entry is a miss, a warning and a quarantined file; the next store heals it") {
  const std::string good = [] {
    const auto bytes = encode(sample("a"));
    return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }();
  const auto foreign_bytes = encode(sample("b"));
  std::string flipped = good;
  flipped.back() ^= 1;
  const std::string foreign(reinterpret_cast<const char*>(foreign_bytes.data()), foreign_bytes.size());
  for (const std::string& broken :
       {std::string(), good.substr(0, good.size() - 1), good.substr(0, 100), flipped, foreign, good + "x"}) {
    Fixture f;
    Store store = f.open();
    store.store(sample("a"));
    put(store.path_of(sha256("a")), broken);
    CHECK_FALSE(store.find(sha256("a")));
    CHECK(store.counters().defects == 1);
    CHECK(store.counters().misses == 1);
    CHECK(f.warned("cache entry refused"));
    CHECK(f.warned(store.path_of(sha256("a")).string()));
    CHECK_FALSE(fs::exists(store.path_of(sha256("a"))));
    CHECK(text_of(f.root / "v1" / "quarantine" / sha256("a").hex()) == broken);

    store.store(sample("a"));
    CHECK(store.find(sha256("a")));
  }
}

TEST_CASE("an entry that is not to be trusted is a miss until the next store replaces it") {
  Fixture f;
  Store store = f.open();
  store.store(sample("a"));
  const fs::path path = store.path_of(sha256("a"));

  SUBCASE("a symlink, though to a good entry") {
    fs::rename(path, f.dir.path() / "elsewhere");
    fs::create_symlink(f.dir.path() / "elsewhere", path);
  }
  SUBCASE("writable by others") {
    REQUIRE(::chmod(path.c_str(), 0666) == 0);
  }
  SUBCASE("another user's") {
    if (::chown(path.c_str(), ::geteuid() + 1, static_cast<gid_t>(-1)) != 0) {
      MESSAGE("skipped: only root can give a file away");
      return;
    }
  }
  SUBCASE("a named pipe") {
    fs::remove(path);
    REQUIRE(::mkfifo(path.c_str(), 0600) == 0);
  }
  CHECK_FALSE(store.find(sha256("a")));
  CHECK(store.counters().defects == 1);
  CHECK(f.warned(path.string()));
  store.store(sample("a"));
  CHECK(store.find(sha256("a")));
}

TEST_CASE("an unsafe root is neither read nor written, for one warning") {
  Fixture f;
  f.open().store(sample("a"));
  std::string expected;
  SUBCASE("writable by a group") {
    REQUIRE(::chmod(f.root.c_str(), 0770) == 0);
    expected = "others may write to";
  }
  SUBCASE("writable by all") {
    REQUIRE(::chmod(f.root.c_str(), 0777) == 0);
    expected = "others may write to";
  }
  SUBCASE("a symlink") {
    fs::rename(f.root, f.dir.path() / "elsewhere");
    fs::create_directory_symlink(f.dir.path() / "elsewhere", f.root);
    expected = "is a symbolic link";
  }
  SUBCASE("a symlink behind a trailing slash") {
    fs::rename(f.root, f.dir.path() / "elsewhere");
    fs::create_directory_symlink(f.dir.path() / "elsewhere", f.root);
    f.root /= "";
    expected = "is a symbolic link";
  }
  Store store = f.open();
  for (int i = 0; i < 2; ++i) {
    CHECK_FALSE(store.find(sha256("a")));
    store.store(sample("b"));
  }
  CHECK(f.warned(expected));
  CHECK(f.warned("kernels are kept in memory only"));
  CHECK_FALSE(store.quarantine(sha256("a")));
  CHECK(store.counters().stores == 0);
}

TEST_CASE("a disk that can't be written costs one warning, and what is there is still read") {
  struct Fault {
    Call call;
    int error;
    const char* text;
  };
  for (const Fault& fault :
       {Fault{Call::write, ENOSPC, "No space left on device"},
        Fault{Call::write, EDQUOT, "Disk quota exceeded"}, Fault{Call::fsync, EIO, "Input/output error"},
        Fault{Call::fsync, EDQUOT, "Disk quota exceeded"},
        Fault{Call::rename, EROFS, "Read-only file system"}}) {
    Fixture f;
    f.open().store(sample("old"));
    Store store = f.open();
    {
      const FailingCall failing(fault.call, fault.error);
      store.store(sample("a"));
      store.store(sample("b"));  // not even tried
      CHECK(failing.failures() == 1);
    }
    store.store(sample("c"));
    CHECK(store.counters().stores == 0);
    CHECK(store.counters().store_errors == 1);
    CHECK(f.warned(fault.text));
    CHECK(store.find(sha256("old")));
    CHECK(fs::is_empty(f.root / "v1" / "tmp"));
    CHECK(store.list().size() == 1);
  }
}

TEST_CASE("a full disk before the first store costs one warning") {
  Fixture f;
  Store store = f.open();
  const FailingCall failing(Call::write, ENOSPC);
  store.store(sample("a"));
  store.store(sample("a"));
  CHECK(f.warned("No space left on device"));
  CHECK(store.counters().store_errors == 1);
}

TEST_CASE("a root whose path is long is like any other") {
  Fixture f;
  f.root = f.dir.path() / std::string(150, 'a') / std::string(150, 'b') / std::string(150, 'c');
  Store store = f.open();
  store.store(sample("a"));
  CHECK(store.find(sha256("a")));
  CHECK(store.prune({.max_bytes = 0})->removed.size() == 1);
  CHECK(f.warnings.empty());
}

TEST_CASE("a folder that somebody clears is made again") {
  Fixture f;
  Store store = f.open();
  store.store(sample("a"));
  fs::remove_all(f.root);
  CHECK_FALSE(store.find(sha256("a")));
  store.store(sample("b"));
  CHECK(store.find(sha256("b")));
  CHECK(fs::exists(f.root / "CACHEDIR.TAG"));
  fs::remove_all(f.root / "v1" / "objects");
  store.store(sample("c"));
  CHECK(store.list().size() == 1);
  CHECK(store.counters().store_errors == 0);
  CHECK(f.warnings.empty());
}

TEST_CASE("a root that can't be made costs one warning") {
  Fixture f;
  put(f.dir.path() / "cache", "a file where a folder should be");
  Store store = f.open();
  CHECK_FALSE(store.find(sha256("a")));
  store.store(sample("a"));
  store.store(sample("a"));
  CHECK(f.warned("Not a directory"));
  CHECK(store.counters().defects == 0);
  CHECK(store.counters().store_errors == 1);
}

TEST_CASE("the first store sweeps temporary files of dead processes, and only those") {
  Fixture f;
  f.open().store(sample("a"));
  const fs::path stale = f.root / "v1" / "tmp" / "new-stale";
  const fs::path fresh = f.root / "v1" / "tmp" / "new-fresh";
  put(stale, "x");
  put(fresh, "x");
  fs::last_write_time(stale, fs::file_time_type::clock::now() - std::chrono::minutes(61));
  Store store = f.open();
  CHECK(store.find(sha256("a")));
  CHECK(fs::exists(stale));
  store.store(sample("b"));
  CHECK_FALSE(fs::exists(stale));
  CHECK(fs::exists(fresh));
}

TEST_CASE("list gives entries by key and nothing else") {
  Fixture f;
  Store store = f.open();
  CHECK(store.list().empty());
  CHECK(store.bytes_on_disk() == 0);
  for (const char* key : {"a", "b", "c", "d", "e"}) store.store(sample(key));
  put(store.path_of(sha256("a")).parent_path() / "notes.txt", "not an entry");
  fs::create_directories(store.path_of(sha256("link")).parent_path());
  fs::create_symlink(store.path_of(sha256("a")), store.path_of(sha256("link")));

  const auto listed = store.list();
  REQUIRE(listed.size() == 5);
  CHECK(std::is_sorted(listed.begin(), listed.end(),
                       [](const Listed& a, const Listed& b) { return a.key < b.key; }));
  for (const Listed& file : listed) {
    CHECK(file.path == store.path_of(file.key));
    CHECK(file.bytes == fs::file_size(file.path));
    CHECK(std::abs(file.modified_unix - ::time(nullptr)) < 600);
    CHECK(store.inspect(file.key).ok());
  }
  CHECK(store.bytes_on_disk() == 5 * (kPayloadOffset + 1));
}

TEST_CASE("inspect reports and moves nothing") {
  Fixture f;
  Store store = f.open();
  store.store(sample("a"));
  CHECK(store.inspect(sha256("b")).failure().message ==
        sha256("b").hex() + " is not in the cache " + f.root.string());
  put(store.path_of(sha256("a")), "broken");
  CHECK(store.inspect(sha256("a")).failure().message ==
        "cache entry refused: 6 bytes are less than its header's 128");
  CHECK(fs::exists(store.path_of(sha256("a"))));
  CHECK(store.quarantine(sha256("a")));
  CHECK_FALSE(store.quarantine(sha256("a")));
}

struct Environment {
  static void set(const char* name, const char* value) {
    REQUIRE((value ? ::setenv(name, value, 1) : ::unsetenv(name)) == 0);
  }
  Environment(const char* own, const char* xdg, const char* home) {
    set("ATTUNE_CACHE_DIR", own);
    set("XDG_CACHE_HOME", xdg);
    set("HOME", home);
  }
};

TEST_CASE("the default root") {
  const auto root = [](const char* own, const char* xdg, const char* home) {
    const Environment environment(own, xdg, home);
    return default_root();
  };
  CHECK(root("/own", "/xdg", "/home/u") == fs::path("/own"));
  CHECK(root(nullptr, "/xdg", "/home/u") == fs::path("/xdg/attune"));
  CHECK(root("", "", "/home/u") == fs::path("/home/u/.cache/attune"));
  CHECK(root(nullptr, "relative", "/home/u") == fs::path("/home/u/.cache/attune"));
  CHECK(root("relative", nullptr, nullptr) == fs::current_path() / "relative");
  CHECK_FALSE(root(nullptr, nullptr, nullptr));
}

}  // namespace
}  // namespace attune::cache
