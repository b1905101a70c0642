#include "base/log.h"

#include "base/env.h"

#include <fmt/format.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <memory>
#include <mutex>
#include <optional>

namespace attune {
namespace {

constexpr std::array kLevelNames{"error", "warn", "info", "debug"};

const char* name_of(LogLevel level) {
  return kLevelNames[static_cast<std::size_t>(level)];
}

void write_to_stderr(LogLevel level, const std::string& message) {
  // One write for one line, so that threads do not mix; a closed stderr is nobody's to report.
  const std::string line = fmt::format("attune: {}: {}\n", name_of(level), message);
  std::fwrite(line.data(), 1, line.size(), stderr);
}

struct Logger {
  Logger() {
    const auto text = env("ATTUNE_LOG");
    if (!text) return;
    for (std::size_t i = 0; i < kLevelNames.size(); ++i) {
      if (*text == kLevelNames[i]) {
        level = static_cast<LogLevel>(i);
        return;
      }
    }
    write_to_stderr(LogLevel::warn, fmt::format("ATTUNE_LOG={}: expected error, warn, info or debug", *text));
  }

  std::atomic<LogLevel> level{LogLevel::warn};
  std::mutex mutex;
  std::shared_ptr<const LogSink> sink;  // null: stderr
};

Logger& logger() {
  static Logger& instance = *new Logger;  // never destroyed: other threads may log while the process exits
  return instance;
}

}  // namespace

void set_log_sink(LogSink sink) {
  auto shared = sink ? std::make_shared<const LogSink>(std::move(sink)) : nullptr;
  const std::lock_guard lock(logger().mutex);
  logger().sink.swap(shared);
}

void set_log_level(LogLevel level) {
  logger().level.store(level, std::memory_order_relaxed);
}

bool log_enabled(LogLevel level) {
  return level <= logger().level.load(std::memory_order_relaxed);
}

void log(LogLevel level, const std::string& message) {
  if (!log_enabled(level)) return;
  std::shared_ptr<const LogSink> sink;
  {
    const std::lock_guard lock(logger().mutex);
    sink = logger().sink;
  }
  // Called without the lock, so that a sink may log or replace itself.
  if (!sink) {
    write_to_stderr(level, message);
    return;
  }
  try {
    (*sink)(level, message);
  } catch (...) {  // the application's trouble must not become the failure of an attention call
    write_to_stderr(level, message);
  }
}

}  // namespace attune
