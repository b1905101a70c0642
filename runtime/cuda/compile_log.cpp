#include "runtime/cuda/compile_log.h"

#include <cctype>
#include <charconv>

namespace attune::runtime {
namespace {

/// The sum of the numbers that stand right before every occurrence of `words`: "16 bytes spill stores".
int sum_before(std::string_view log, std::string_view words) {
  int sum = 0;
  for (std::size_t at = log.find(words); at != std::string_view::npos; at = log.find(words, at + 1)) {
    std::size_t begin = at;
    while (begin > 0 && std::isdigit(static_cast<unsigned char>(log[begin - 1])) != 0) --begin;
    int value = 0;
    std::from_chars(log.data() + begin, log.data() + at, value);
    sum += value;
  }
  return sum;
}

/// "Compile time = 5.944 ms"
double assembly_milliseconds(std::string_view log) {
  constexpr std::string_view kWords = "Compile time = ";
  const std::size_t at = log.find(kWords);
  double milliseconds = 0;
  if (at != std::string_view::npos) {
    std::from_chars(log.data() + at + kWords.size(), log.data() + log.size(), milliseconds);
  }
  return milliseconds;
}

}  // namespace

CompileFacts read_compile_log(std::string_view log) {
  return {.registers = sum_before(log, " registers"),
          .spill_bytes = sum_before(log, " bytes spill stores") + sum_before(log, " bytes spill loads"),
          .stack_bytes = sum_before(log, " bytes stack frame"),
          .static_shared_bytes = sum_before(log, " bytes smem"),
          .assembly_milliseconds = assembly_milliseconds(log)};
}

}  // namespace attune::runtime
