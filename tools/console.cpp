#include "tools/console.h"

#include "base/env.h"

#include <fmt/format.h>

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <utility>

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

/// Bytes of the character that the text begins with; 0 for one that is not to be printed: a control
/// character, of C1 ("\xc2\x9b" begins a command, too) as well, or no UTF-8.
std::size_t printable_size(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  if (byte(0) < 0x80) return byte(0) >= 0x20 && byte(0) != 0x7f ? 1 : 0;
  const std::size_t size = byte(0) >= 0xf0 ? 4 : byte(0) >= 0xe0 ? 3 : 2;
  if (byte(0) < 0xc2 || byte(0) > 0xf4 || text.size() < size) return 0;
  for (std::size_t i = 1; i < size; ++i) {
    if ((byte(i) & 0xc0u) != 0x80u) return 0;
  }
  const bool overlong = (byte(0) == 0xe0 && byte(1) < 0xa0) || (byte(0) == 0xf0 && byte(1) < 0x90);
  const bool c1 = byte(0) == 0xc2 && byte(1) < 0xa0;
  return overlong || c1 ? 0 : size;
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

std::string printable(std::string_view text, Lines lines) {
  std::string shown;
  while (!text.empty()) {
    const std::size_t size = printable_size(text);
    const bool keep = size > 0 || (lines == Lines::many && (text[0] == '\n' || text[0] == '\t'));
    if (keep) {
      shown += text.substr(0, std::max<std::size_t>(size, 1));
    } else {
      shown += fmt::format("\\x{:02x}", static_cast<unsigned char>(text[0]));
    }
    text.remove_prefix(std::max<std::size_t>(size, 1));
  }
  return shown;
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

Result<std::chrono::seconds> parse_age(std::string_view text) {
  constexpr std::array<std::pair<std::string_view, std::int64_t>, 5> kUnits{
      {{"", 1}, {"s", 1}, {"min", 60}, {"h", 3600}, {"d", 86400}}};
  constexpr std::int64_t kMost = std::int64_t{1} << 32;  // 136 years
  std::int64_t number = 0;
  const char* const last = text.data() + text.size();
  const auto [end, error] = std::from_chars(text.data(), last, number);
  const std::string_view name(end, static_cast<std::size_t>(last - end));
  const auto* unit = std::ranges::find(kUnits, name, &std::pair<std::string_view, std::int64_t>::first);
  if (error != std::errc() || unit == kUnits.end() || number < 0 || number > kMost / unit->second) {
    return invalid_argument(fmt::format("{}: expected a time such as 90s, 5min, 3h or 12d", text));
  }
  return std::chrono::seconds(number * unit->second);
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
