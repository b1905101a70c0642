#include "cache/layers.h"

#include "cache_entries.h"
#include "pack_bytes.h"
#include "pem_keys.h"

#include <doctest/doctest.h>

#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <map>

namespace attune::cache {
namespace {

namespace fs = std::filesystem;
using test::entry_of;
using test::Folder;

constexpr uid_t kStranger = 12345;

/// The user's cache and two shared ones, one/ and two/.
struct Shared : Folder {
  fs::path one = dir.path() / "one";
  fs::path two = dir.path() / "two";
  Store own = open();
  Layers layers = Layers(own, {one, two}, [this](const std::string& line) { warnings.push_back(line); });

  static void put(const fs::path& root, const std::string& name, const std::string& metadata = "{}") {
    Entry entry = entry_of(name);
    entry.metadata_json = metadata;
    Store(root, Mode::rw, [](const std::string& line) { FAIL(line); }).store(entry);
  }
  Shared() {
    put(one, "a", "\"one\"");
    put(two, "a", "\"two\"");
    put(two, "b", "\"two\"");
  }
  std::string found(const std::string& name) {
    const auto found = layers.find(sha256(name));
    return found ? found->entry.metadata_json + " in " + found->layer : "nothing";
  }
  bool warned(const std::string& part) const {
    return warnings.size() == 1 && warnings[0].find(part) != std::string::npos;
  }
};

/// Every file under a folder with its bytes and its time of the last change.
std::map<std::string, std::string> snapshot(const fs::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& file : fs::recursive_directory_iterator(folder)) {
    struct stat info {};
    REQUIRE(::lstat(file.path().c_str(), &info) == 0);
    files[file.path().string()] =
        std::to_string(info.st_ctim.tv_sec) + "." + std::to_string(info.st_ctim.tv_nsec);
  }
  return files;
}

TEST_CASE("the user's cache comes first, then the folders in their order") {
  Shared f;
  CHECK(f.found("a") == "\"one\" in " + f.one.string());
  CHECK(f.found("b") == "\"two\" in " + f.two.string());
  CHECK(f.found("c") == "nothing");
  CHECK(f.layers.shared_hits() == 2);
  CHECK(f.layers.misses() == 1);
  Shared::put(f.root, "a", "\"own\"");
  CHECK(f.found("a") == "\"own\" in " + f.root.string());
  CHECK(f.layers.shared_hits() == 2);
  CHECK(f.warnings.empty());
}

TEST_CASE("a shared folder is never written to, and what it has is not copied") {
  Shared f;
  const auto before = snapshot(f.dir.path());
  f.found("a");
  f.found("c");
  f.layers.locate(sha256("a"));
  CHECK(snapshot(f.dir.path()) == before);
  f.layers.store(entry_of("c"));
  CHECK(f.found("c") == "{} in " + f.root.string());
  for (const auto& [path, changed] : before) CHECK(snapshot(f.dir.path()).at(path) == changed);
}

TEST_CASE("locate tells what find would, and counts nothing") {
  Shared f;
  CHECK(f.layers.locate(sha256("a")) == f.one.string());
  CHECK_FALSE(f.layers.locate(sha256("c")));
  Shared::put(f.root, "a");
  CHECK(f.layers.locate(sha256("a")) == f.root.string());
  CHECK(f.layers.shared_hits() == 0);
  CHECK(f.layers.misses() == 0);
  CHECK(f.own.counters().hits == 0);
}

TEST_CASE("a shared entry that is defective or not to be trusted is passed over, with a warning") {
  Shared f;
  const fs::path path = object_in(f.one, sha256("a"));
  std::string expected;
  SUBCASE("a flipped bit") {
    std::ofstream(path, std::ios::app) << 'x';
    expected = "cache entry refused";
  }
  SUBCASE("writable by others") {
    REQUIRE(::chmod(path.c_str(), 0664) == 0);
    expected = "others may write to";
  }
  SUBCASE("a stranger's") {
    if (::chown(path.c_str(), kStranger, static_cast<gid_t>(-1)) != 0) {
      MESSAGE("skipped: only root can give a file away");
      return;
    }
    expected = "belongs to user 12345";
  }
  SUBCASE("a symlink") {
    fs::rename(path, f.dir.path() / "elsewhere");
    fs::create_symlink(f.dir.path() / "elsewhere", path);
    expected = "symbolic links";
  }
  CHECK(f.found("a") == "\"two\" in " + f.two.string());
  CHECK(f.warned(expected));
  CHECK(fs::exists(fs::symlink_status(path)));  // not ours to move
}

TEST_CASE("what the folder's owner stored is trusted") {
  Shared f;
  const fs::path path = object_in(f.one, sha256("a"));
  if (::chown(path.c_str(), kStranger, static_cast<gid_t>(-1)) != 0 ||
      ::chown(f.one.c_str(), kStranger, static_cast<gid_t>(-1)) != 0) {
    MESSAGE("skipped: only root can give a file away");
    return;
  }
  CHECK(f.found("a") == "\"one\" in " + f.one.string());
  CHECK(f.warnings.empty());
}

TEST_CASE("a folder that is unsafe or absent costs one warning, and the next one serves") {
  Shared f;
  std::string expected;
  SUBCASE("absent") {
    fs::remove_all(f.one);
    expected = "No such file or directory";
  }
  SUBCASE("a file") {
    fs::remove_all(f.one);
    std::ofstream(f.one) << "x";
    expected = "pack refused: 1 bytes are less than";
  }
  SUBCASE("writable by a group") {
    REQUIRE(::chmod(f.one.c_str(), 0775) == 0);
    expected = "others may write to";
  }
  SUBCASE("where anyone may replace it") {
    fs::create_directory(f.dir.path() / "open");
    fs::rename(f.one, f.dir.path() / "open" / "one");
    REQUIRE(::chmod((f.dir.path() / "open").c_str(), 0777) == 0);
    fs::create_symlink(f.dir.path() / "open" / "one", f.one);
    expected = "anyone may replace";
  }
  SUBCASE("a stranger's where anyone could have made it") {
    fs::create_directory(f.dir.path() / "sticky");
    fs::rename(f.one, f.dir.path() / "sticky" / "one");
    REQUIRE(::chmod((f.dir.path() / "sticky").c_str(), 01777) == 0);
    fs::create_symlink(f.dir.path() / "sticky" / "one", f.one);
    if (::chown((f.dir.path() / "sticky" / "one").c_str(), kStranger, static_cast<gid_t>(-1)) != 0) {
      MESSAGE("skipped: only root can give a file away");
      return;
    }
    expected = "belongs to user 12345";
  }
  CHECK(f.found("a") == "\"two\" in " + f.two.string());
  CHECK(f.found("b") == "\"two\" in " + f.two.string());
  CHECK(f.warned("ATTUNE_CACHE_PATH: "));
  CHECK(f.warned(expected));
}

TEST_CASE("the name of a folder may be a symlink: who named it chose it") {
  Shared f;
  fs::rename(f.one, f.dir.path() / "v7");
  fs::create_directory_symlink(f.dir.path() / "v7", f.one);
  CHECK(f.found("a") == "\"one\" in " + f.one.string());
  CHECK(f.warnings.empty());
}

TEST_CASE("without a cache of its own a process still reads the folders") {
  Shared f;
  Store off(fs::path(), Mode::off, [](const std::string& line) { FAIL(line); });
  Layers layers(off, {f.one}, [](const std::string& line) { FAIL(line); });
  CHECK(layers.find(sha256("a")));
  CHECK_FALSE(layers.find(sha256("b")));
  CHECK(layers.misses() == 1);
  Layers none(off, {}, [](const std::string& line) { FAIL(line); });
  CHECK_FALSE(none.find(sha256("a")));
  CHECK(none.misses() == 0);
}

TEST_CASE("ATTUNE_CACHE_PATH is a list") {
  REQUIRE(::setenv("ATTUNE_CACHE_PATH", "/opt/attune::relative:/srv/kernels:", 1) == 0);
  CHECK(shared_paths() ==
        std::vector<fs::path>{"/opt/attune", fs::current_path() / "relative", "/srv/kernels"});
  REQUIRE(::unsetenv("ATTUNE_CACHE_PATH") == 0);
  CHECK(shared_paths().empty());
}

/// A pack at `path` with one kernel.
void pack(const fs::path& path, const std::string& name, const std::string& metadata,
          const SigningKey* key = nullptr) {
  Entry entry = entry_of(name);
  entry.metadata_json = metadata;
  const attune::test::Bytes bytes = attune::test::pack_of({entry}, "{}", key);
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

TEST_CASE("may_have is true of everything that find would look at, and counts nothing") {
  Shared f;
  const fs::path path = f.dir.path() / "the.pack";
  pack(path, "packed", "{}");
  Layers layers(f.own, {f.one, path}, [](const std::string& line) { FAIL(line); });
  CHECK(layers.may_have(sha256("packed")));
  CHECK(layers.may_have(sha256("a")));
  CHECK_FALSE(layers.may_have(sha256("own")));
  Shared::put(f.root, "own");
  CHECK(layers.may_have(sha256("own")));
  std::ofstream(object_in(f.root, sha256("own"))) << "a defect";
  CHECK(layers.may_have(sha256("own")));
  CHECK(fs::exists(object_in(f.root, sha256("own"))));
  CHECK(layers.shared_hits() + layers.misses() + f.own.counters().hits == 0);
}

TEST_CASE("packs come before the user's own cache, folders after it") {
  Shared f;
  const fs::path first = f.dir.path() / "first.pack";
  const fs::path second = f.dir.path() / "second.pack";
  pack(first, "c", "\"first\"");
  pack(second, "c", "\"second\"");
  Layers layers(f.own, {f.one, first, second}, [](const std::string& line) { FAIL(line); });
  f.own.store(entry_of("c"));
  f.own.store(entry_of("a"));
  const auto layer_of = [&](const char* name) {
    const auto found = layers.find(sha256(name));
    CHECK(layers.locate(sha256(name)) == (found ? std::optional(found->layer) : std::nullopt));
    return found ? found->layer : "nothing";
  };
  CHECK(layer_of("c") == first.string());
  CHECK(layers.find(sha256("c"))->entry.metadata_json == "\"first\"");
  CHECK(layer_of("a") == f.own.root().string());
  CHECK(layer_of("b") == "nothing");
  Shared::put(f.one, "b");
  CHECK(layer_of("b") == f.one.string());
  CHECK(layers.shared_hits() == 3);
  CHECK(layers.misses() == 1);
}

TEST_CASE("a pack that is refused is a warning and costs no other layer") {
  Shared f;
  const fs::path path = f.dir.path() / "the.pack";
  pack(path, "a", "\"pack\"");
  const auto find = [&] {
    f.warnings.clear();
    Layers layers(f.own, {path, f.one}, [&](const std::string& line) { f.warnings.push_back(line); });
    const auto found = layers.find(sha256("a"));
    return found ? found->entry.metadata_json : "nothing";
  };
  CHECK(find() == "\"pack\"");
  CHECK(f.warnings.empty());

  std::fstream(path, std::ios::binary | std::ios::in | std::ios::out).seekp(-1, std::ios::end).put('\0');
  CHECK(find() == "\"one\"");
  CHECK(f.warned("pack entry " + sha256("a").hex() + " refused: checksum"));
  fs::resize_file(path, 100);
  CHECK(find() == "\"one\"");
  CHECK(f.warned("ATTUNE_CACHE_PATH: " + path.string() + ": pack refused: 100 bytes are less than"));
}

TEST_CASE("where a key is named only packs with its signature are read") {
  Shared f;
  const fs::path key_path = f.dir.path() / "key.pub.pem";
  const auto key = attune::test::ed25519(sha256("ours"));
  const auto signing_key = SigningKey::from_pem(attune::test::private_pem(key.get()));
  REQUIRE(signing_key.ok());
  std::ofstream(key_path) << attune::test::public_pem(key.get());
  pack(f.dir.path() / "signed.pack", "a", "\"signed\"", &*signing_key);
  pack(f.dir.path() / "unsigned.pack", "a", "\"unsigned\"");
  const auto find = [&] {
    f.warnings.clear();
    Layers layers(f.own, {f.dir.path() / "unsigned.pack", f.dir.path() / "signed.pack"},
                  [&](const std::string& line) { f.warnings.push_back(line); });
    const auto found = layers.find(sha256("a"));
    return found ? found->entry.metadata_json : "nothing";
  };
  CHECK(find() == "\"unsigned\"");
  REQUIRE(::setenv("ATTUNE_PACK_KEY", key_path.c_str(), 1) == 0);
  CHECK(find() == "\"signed\"");
  CHECK(f.warned("unsigned.pack: pack refused: it is not signed"));
  fs::remove(key_path);  // no key can be read: no pack can be believed
  CHECK(find() == "nothing");
  CHECK(f.warnings.size() == 2);
  REQUIRE(::unsetenv("ATTUNE_PACK_KEY") == 0);
}

}  // namespace
}  // namespace attune::cache
