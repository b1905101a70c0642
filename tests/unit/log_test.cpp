#include "base/log.h"

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace attune {
namespace {

struct Restore {
  ~Restore() {
    set_log_sink({});
    set_log_level(LogLevel::warn);
  }
};

/// What this executable's hidden case below writes to stderr under a value of ATTUNE_LOG.
std::string stderr_under(const std::string& attune_log) {
  const std::string self = std::filesystem::read_symlink("/proc/self/exe").string();
  const std::string command = "ATTUNE_LOG='" + attune_log + "' '" + self +
                              "' --no-skip --test-case='hidden: one line of each level' 2>&1 >/dev/null";
  std::FILE* pipe = popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  std::string text;
  std::array<char, 256> buffer{};
  while (std::fgets(buffer.data(), buffer.size(), pipe) != nullptr) text += buffer.data();
  CHECK(pclose(pipe) == 0);
  return text;
}

TEST_CASE("hidden: one line of each level" * doctest::skip()) {
  log(LogLevel::error, "e");
  log(LogLevel::warn, "w");
  log(LogLevel::info, "i");
  log(LogLevel::debug, "d");
}

TEST_CASE("ATTUNE_LOG chooses what goes to stderr") {
  CHECK(stderr_under("") == "attune: error: e\nattune: warn: w\n");
  CHECK(stderr_under("error") == "attune: error: e\n");
  CHECK(stderr_under("debug") == "attune: error: e\nattune: warn: w\nattune: info: i\nattune: debug: d\n");
  CHECK(stderr_under("loud") ==
        "attune: warn: ATTUNE_LOG=loud: expected error, warn, info or debug\n"
        "attune: error: e\nattune: warn: w\n");
}

TEST_CASE("a sink gets the lines at or above the level") {
  const Restore restore;
  std::vector<std::string> lines;
  set_log_sink([&](LogLevel, const std::string& line) { lines.push_back(line); });
  set_log_level(LogLevel::info);
  CHECK(log_enabled(LogLevel::info));
  CHECK_FALSE(log_enabled(LogLevel::debug));
  log(LogLevel::info, "seen");
  log(LogLevel::debug, "not seen");
  CHECK(lines == std::vector<std::string>{"seen"});
}

TEST_CASE("a sink may log, replace itself and throw") {
  const Restore restore;
  auto count = std::make_shared<int>(0);
  set_log_sink([count](LogLevel level, const std::string&) {
    ++*count;
    if (level == LogLevel::error) log(LogLevel::warn, "from the sink");
    set_log_sink([count](LogLevel, const std::string&) {
      ++*count;
      throw std::runtime_error("full");
    });
  });
  log(LogLevel::error, "first");  // then, from within, the second line to whichever sink is there
  CHECK(*count == 2);
  log(LogLevel::warn, "the sink throws; this line goes to stderr");
  CHECK(*count == 3);
}

TEST_CASE("threads log while another changes the sink") {
  const Restore restore;
  std::atomic<int> seen{0};
  const auto sink = [&](LogLevel, const std::string&) { ++seen; };
  set_log_sink(sink);
  std::vector<std::jthread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([] {
      for (int i = 0; i < 500; ++i) log(LogLevel::warn, "line");
    });
  }
  for (int i = 0; i < 200; ++i) set_log_sink(sink);
  threads.clear();
  CHECK(seen == 2000);
}

}  // namespace
}  // namespace attune
