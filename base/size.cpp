#include "base/size.h"

#include <fmt/format.h>

#include <charconv>
#include <limits>

namespace attune {

Result<std::uint64_t> parse_size(std::string_view text) {
  constexpr std::string_view kUnits = "KMGT";
  std::uint64_t number = 0;
  const char* const last = text.data() + text.size();
  const auto [end, error] = std::from_chars(text.data(), last, number);
  std::string_view unit(end, static_cast<std::size_t>(last - end));
  if (unit.size() == 3 && unit.ends_with("iB")) unit.remove_suffix(2);    // GiB is as good as G
  const std::size_t power = unit.empty() ? 0 : kUnits.find(unit[0]) + 1;  // find gives npos, so 0, in vain
  const unsigned shift = 10 * static_cast<unsigned>(power);
  if (error != std::errc() || unit.size() > 1 || (power == 0 && !unit.empty()) ||
      number > std::numeric_limits<std::uint64_t>::max() >> shift) {
    return invalid_argument(fmt::format("{}: expected a size such as 500M or 2G", text));
  }
  return number << shift;
}

}  // namespace attune
