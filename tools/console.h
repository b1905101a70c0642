// The terminal: colour and progress, each only where someone watches.
#pragma once

#include "base/result.h"

#include <chrono>
#include <cstddef>
#include <mutex>
#include <string>
#include <string_view>

namespace attune::tools {

enum class Stream { out, err };
enum class Colour { red, green, yellow };

/// The text in colour if the stream is a terminal and NO_COLOR is not set, else as it is.
std::string paint(std::string_view text, Colour colour, Stream stream);

/// Text from a file, for people: control characters, which a terminal would obey, and bytes that are no UTF-8
/// are spelled "\\x1b". A message may keep its lines.
enum class Lines { one, many };
std::string printable(std::string_view text, Lines lines = Lines::one);

/// How many columns stdout has where it is a terminal; else as many as a wide one.
int terminal_columns();

/// "1.4 MB"
std::string bytes_text(std::uint64_t bytes);
/// "850 ms", "12.3 s", "4 min 10 s"
std::string duration_text(std::chrono::duration<double> time);
/// "5 min", "3 h", "12 days"
std::string age_text(std::int64_t seconds);
/// "90", "90s", "5min", "3h", "12d". Fails with invalid_argument.
Result<std::chrono::seconds> parse_age(std::string_view text);

/// Progress of long work on stderr: a bar that is drawn over on a terminal, else a line every ten seconds.
/// Thread-safe. The destructor clears the line.
class Progress {
 public:
  /// Pieces that are alike.
  explicit Progress(std::size_t total) : Progress(total, static_cast<double>(total)) {}
  /// Pieces that come to so much work together, in any unit: the time left goes by that.
  Progress(std::size_t total, double work);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// One more piece is done; `what` names it.
  void advance(std::string_view what, double work = 1);

 private:
  using Clock = std::chrono::steady_clock;

  std::string line(std::string_view what, Clock::time_point now) const;

  const std::size_t total_;
  const double work_;
  const bool terminal_;
  const Clock::time_point begin_;
  std::mutex mutex_;
  std::size_t finished_ = 0;
  double work_done_ = 0;
  Clock::time_point last_line_;
};

}  // namespace attune::tools
