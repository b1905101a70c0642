#include "base/file.h"

#include "os_faults.h"
#include "tests/support/temp_dir.h"

#include <doctest/doctest.h>

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <string>

namespace attune {
namespace {

namespace fs = std::filesystem;
using test::Call;
using test::FailingCall;
using test::TempDir;

std::vector<std::byte> bytes_of(const std::string& text) {
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

void put(const fs::path& path, const std::string& text, mode_t mode = 0600) {
  std::ofstream(path, std::ios::binary) << text;
  REQUIRE(::chmod(path.c_str(), mode) == 0);
}

mode_t mode_of(const fs::path& path) {
  struct stat info {};
  REQUIRE(::lstat(path.c_str(), &info) == 0);
  return info.st_mode & 07777U;
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST_CASE("read_file reads every size") {
  const TempDir dir;
  for (const std::size_t size : {0, 1, 4095, 4096, 4097, 1000000}) {
    std::string text(size, 'x');
    if (size > 0) text.back() = '\0';
    put(dir.path() / "file", text);
    const auto read = read_file(dir.path() / "file");
    REQUIRE(read.ok());
    CHECK(*read == bytes_of(text));
  }
}

TEST_CASE("read_file reads a file that does not know its size") {
  const auto read = read_file("/proc/self/status");
  REQUIRE(read.ok());
  CHECK(read->size() > 100);
}

TEST_CASE("read_file's failures name the path and the reason") {
  const TempDir dir;
  const auto missing = read_file(dir.path() / "missing");
  REQUIRE_FALSE(missing.ok());
  CHECK(missing.failure().kind == ErrorKind::environment);
  CHECK(missing.failure().message ==
        "cannot open " + (dir.path() / "missing").string() + ": No such file or directory");

  CHECK(read_file(dir.path()).failure().message == dir.path().string() + " is not a regular file");
  const fs::path pipe = dir.path() / "pipe";
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  CHECK(read_file(pipe).failure().message == pipe.string() + " is not a regular file");  // and does not wait
}

TEST_CASE("read_file follows a symlink unless told not to") {
  const TempDir dir;
  put(dir.path() / "file", "text");
  fs::create_symlink("file", dir.path() / "link");
  CHECK(read_file(dir.path() / "link").ok());
  CHECK_FALSE(read_file(dir.path() / "link", /*no_follow=*/true).ok());
  CHECK(read_file(dir.path() / "file", /*no_follow=*/true).ok());
}

TEST_CASE("read_private_file takes only what we alone can have written") {
  const TempDir dir;
  const fs::path file = dir.path() / "file";
  put(file, "text");
  CHECK(read_private_file(file).value() == bytes_of("text"));
  CHECK_FALSE(read_private_file(dir.path() / "missing").value().has_value());
  CHECK_FALSE(read_private_file(file / "below a file").value().has_value());

  fs::create_symlink("file", dir.path() / "link");
  CHECK(contains(read_private_file(dir.path() / "link").failure().message, "symbolic links"));
  for (const mode_t mode : {0620, 0602, 0666}) {
    put(file, "text", mode);
    CHECK(contains(read_private_file(file).failure().message, "chmod go-w it"));
  }
  put(file, "text", 0644);
  CHECK(read_private_file(file).ok());
}

TEST_CASE("read_private_file refuses another user's file") {
  const TempDir dir;
  put(dir.path() / "file", "text");
  if (::chown((dir.path() / "file").c_str(), ::geteuid() + 1, static_cast<gid_t>(-1)) != 0) {
    MESSAGE("skipped: only root can give a file away");
    return;
  }
  CHECK(contains(read_private_file(dir.path() / "file").failure().message, "belongs to user"));
}

TEST_CASE("write_file_atomic writes and replaces") {
  const TempDir dir;
  const fs::path file = dir.path() / "file";
  for (const std::string& text : {std::string("first"), std::string(), std::string(300000, 'x')}) {
    REQUIRE(write_file_atomic(file, bytes_of(text), dir.path()).ok());
    CHECK(read_file(file).value() == bytes_of(text));
    CHECK(mode_of(file) == 0600);
  }
}

TEST_CASE("write_file_atomic finishes an interrupted and a partial write") {
  const TempDir dir;
  const std::string text(1000, 'x');
  {
    const FailingCall interrupted(Call::write, EINTR, 3);
    REQUIRE(write_file_atomic(dir.path() / "a", bytes_of(text), dir.path()).ok());
    CHECK(interrupted.failures() == 3);
  }
  const test::ShortWrites partial(7);
  REQUIRE(write_file_atomic(dir.path() / "b", bytes_of(text), dir.path()).ok());
  CHECK(read_file(dir.path() / "a").value() == bytes_of(text));
  CHECK(read_file(dir.path() / "b").value() == bytes_of(text));
}

TEST_CASE("a failing disk leaves the old file and nothing else") {
  const TempDir dir;
  const fs::path file = dir.path() / "file";
  const fs::path temporary = dir.path() / "tmp";
  fs::create_directory(temporary);
  put(file, "old");
  struct Fault {
    Call call;
    int error;
    const char* text;
  };
  for (const Fault& fault :
       {Fault{Call::write, ENOSPC, "No space left on device"},
        Fault{Call::write, EDQUOT, "Disk quota exceeded"}, Fault{Call::fsync, EIO, "Input/output error"},
        Fault{Call::rename, EROFS, "Read-only file system"}}) {
    const FailingCall failing(fault.call, fault.error);
    const auto written = write_file_atomic(file, bytes_of("new"), temporary);
    REQUIRE_FALSE(written.ok());
    CHECK(failing.failures() > 0);
    CHECK(written.failure().kind == ErrorKind::environment);
    CHECK(contains(written.failure().message, fault.text));
    CHECK(contains(written.failure().message, dir.path().string()));
    CHECK(read_file(file).value() == bytes_of("old"));
    CHECK(fs::is_empty(temporary));
  }
}

TEST_CASE("write_file_atomic says which folder it can't write to") {
  const TempDir dir;
  const auto written = write_file_atomic(dir.path() / "file", bytes_of("x"), dir.path() / "missing");
  CHECK(written.failure().message ==
        "cannot create a file in " + (dir.path() / "missing").string() + ": No such file or directory");
}

TEST_CASE("make_private_directory creates the missing part of a path") {
  const TempDir dir;
  const fs::path deep = dir.path() / "a" / "b" / "c";
  REQUIRE(make_private_directory(deep).ok());
  CHECK(make_private_directory(deep).ok());
  CHECK(mode_of(dir.path() / "a") == 0700);
  CHECK(mode_of(deep) == 0700);
  CHECK(make_private_directory(dir.path() / std::string(200, 'd') / std::string(200, 'e')).ok());
}

TEST_CASE("make_private_directory refuses what others control") {
  const TempDir dir;
  const fs::path own = dir.path() / "own";
  REQUIRE(make_private_directory(own).ok());

  fs::create_directory_symlink("own", dir.path() / "link");
  CHECK(make_private_directory(dir.path() / "link").failure().message ==
        (dir.path() / "link").string() + " is a symbolic link");

  for (const mode_t mode : {0720, 0702, 0777, 01777}) {
    REQUIRE(::chmod(own.c_str(), mode) == 0);
    CHECK(contains(make_private_directory(own).failure().message, "others may write to " + own.string()));
  }
  // Our folder in one where anyone may rename it, and in one with the sticky bit, such as /tmp.
  const fs::path inner = own / "inner";
  REQUIRE(::mkdir(inner.c_str(), 0700) == 0);
  REQUIRE(::chmod(own.c_str(), 0777) == 0);
  CHECK(contains(make_private_directory(inner).failure().message, "anyone may replace"));
  REQUIRE(::chmod(own.c_str(), 01777) == 0);
  CHECK(make_private_directory(inner).ok());
}

TEST_CASE("make_private_directory refuses a file and what would be below one") {
  const TempDir dir;
  put(dir.path() / "file", "");
  CHECK(contains(make_private_directory(dir.path() / "file").failure().message, "Not a directory"));
  CHECK(
      contains(make_private_directory(dir.path() / "file" / "a" / "b").failure().message, "Not a directory"));
}

}  // namespace
}  // namespace attune
