// What the parser alone would let pass: integers beyond their type, which it clamps, and empty values, which
// it takes for 0 or for none.
#pragma once

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <charconv>
#include <limits>
#include <string>
#include <system_error>

namespace attune::tools {

/// A check for decimal integers of this type that are not less than `least`.
template <typename Integer>
CLI::Validator integer_from(Integer least) {
  const auto fault = [least](const std::string& text) -> std::string {
    Integer value{};
    const char* const end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    if (error == std::errc() && stop == end && value >= least) return "";
    return fmt::format("{} is no integer from {} to {}", text, least, std::numeric_limits<Integer>::max());
  };
  return {fault, ""};  // a description would be printed as part of the option's type
}

/// A check for any integer of this type.
template <typename Integer>
CLI::Validator any_integer() {
  return integer_from(std::numeric_limits<Integer>::min());
}

/// Refuses empty values of every option of the command and of those below it.
inline void refuse_empty_values(CLI::App& app) {
  for (CLI::Option* option : app.get_options()) {
    option->check(
        [](const std::string& text) { return std::string(text.empty() ? "the value is empty" : ""); });
  }
  for (CLI::App* command : app.get_subcommands([](CLI::App*) { return true; })) refuse_empty_values(*command);
}

}  // namespace attune::tools
