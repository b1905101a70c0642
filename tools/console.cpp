#include "tools/console.h"

#include "base/env.h"

#include <fmt/format.h>

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>

namespace attune::tools {
namespace {

constexpr std::chrono::seconds kLineInterval{10};
constexpr std::size_t kNameWidth = 40;
constexpr int kBarWidth = 20;
constexpr int kWideTerminal = 200;
constexpr const char* kEraseLine = "\r\x1b[K";

bool is_terminal(Stream stream) {
  return isatty(stream == Stream::out ? STDOUT_FILENO : STDERR_FILENO) == 1;
}

const char* code_of(Colour colour) {
  switch (colour) {
    case Colour::red: return "31";
    case Colour::green: return "32";
    case Colour::yellow: return "33";
  }
  return "0";
}

}  // namespace

std::string paint(std::string_view text, Colour colour, Stream stream) {
  static const bool no_color = env("NO_COLOR").has_value();
  if (no_color || !is_terminal(stream)) return std::string(text);
  return fmt::format("\x1b[{}m{}\x1b[0m", code_of(colour), text);
}

int terminal_columns() {
  winsize size{};
  if (!is_terminal(Stream::out) || ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) {
    return kWideTerminal;
  }
  return size.ws_col;
}

std::string bytes_text(std::uint64_t bytes) {
  if (bytes < 1000) return fmt::format("{} B", bytes);
  double value = static_cast<double>(bytes);
  constexpr std::array kUnits{"kB", "MB", "GB", "TB"};
  std::size_t unit = 0;
  for (value /= 1000; value >= 999.5 && unit + 1 < kUnits.size(); value /= 1000) ++unit;
  return fmt::format("{:.{}f} {}", value, value < 99.95 ? 1 : 0, kUnits[unit]);
}

std::string duration_text(std::chrono::duration<double> time) {
  const double seconds = time.count();
  if (seconds < 1) return fmt::format("{:.0f} ms", seconds * 1000);
  if (seconds < 60) return fmt::format("{:.1f} s", seconds);
  const auto whole = static_cast<std::int64_t>(seconds);
  return fmt::format("{} min {} s", whole / 60, whole % 60);
}

std::string age_text(std::int64_t seconds) {
  if (seconds < 60) return fmt::format("{} s", seconds);
  if (seconds < 60 * 60) return fmt::format("{} min", seconds / 60);
  if (seconds < 48 * 60 * 60) return fmt::format("{} h", seconds / (60 * 60));
  return fmt::format("{} days", seconds / (24 * 60 * 60));
}

Progress::Progress(std::size_t total, double work)
    : total_(total),
      work_(work),
      terminal_(is_terminal(Stream::err)),
      begin_(Clock::now()),
      last_line_(begin_) {}

Progress::~Progress() {
  if (terminal_ && finished_ > 0) fmt::print(stderr, "{}", kEraseLine);
}

void Progress::advance(std::string_view what, double work) {
  const std::lock_guard lock(mutex_);
  ++finished_;
  work_done_ += work;
  const auto now = Clock::now();
  if (terminal_) {
    fmt::print(stderr, "{}{}", kEraseLine, line(what, now));
  } else if (now - last_line_ >= kLineInterval) {
    last_line_ = now;
    fmt::print(stderr, "{}\n", line(what, now));
  }
}

std::string Progress::line(std::string_view what, Clock::time_point now) const {
  const std::size_t total = std::max(total_, finished_);  // a total may be an estimate
  const double done = work_done_ >= work_ ? 1 : work_done_ / work_;
  const std::chrono::duration<double> elapsed = now - begin_;
  const std::string left = done > 0 ? duration_text(elapsed * (1 / done - 1)) + " left" : "";
  const auto filled = static_cast<std::size_t>(done * kBarWidth);
  const std::string bar = terminal_ ? fmt::format(" {:.<{}}", std::string(filled, '#'), kBarWidth) : "";
  return fmt::format("[{}/{}]{} {}  {}", finished_, total, bar, what.substr(0, kNameWidth), left);
}

}  // namespace attune::tools
