#include "codegen/problem.h"

#include "codegen/names.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace attune::codegen {
namespace {

/// Every field's name and text, in order.
std::vector<std::pair<std::string_view, std::string>> fields_of(const Problem& problem) {
  std::vector<std::pair<std::string_view, std::string>> fields;
  for_each_problem_field(
      problem, [&](std::string_view name, const auto& value) { fields.emplace_back(name, text_of(value)); });
  return fields;
}

Result<void> set_field(Problem& problem, std::string_view name, std::string_view value) {
  bool known = false;
  bool good = false;
  for_each_problem_field(problem, [&](std::string_view field_name, auto& field) {
    if (field_name != name) return;
    known = true;
    good = parse_text(value, field);
  });
  if (!known) return invalid_argument(fmt::format("problem: unknown field '{}'", name));
  if (!good) return invalid_argument(fmt::format("problem: '{}' is no value of {}", value, name));
  return done();
}

bool names(const std::vector<std::string_view>& fields, std::string_view name) {
  return std::ranges::find(fields, name) != fields.end();
}

}  // namespace

std::string to_string(const Problem& problem) {
  Problem defaults;
  defaults.head_dim_v = problem.head_dim;
  defaults.output_dtype = problem.dtype;
  const auto default_fields = fields_of(defaults);
  std::string text;
  for (std::size_t i = 0; const auto& [name, value] : fields_of(problem)) {
    const bool at_default = value == default_fields[i++].second;
    if (at_default && name != "dtype" && (name != "head_dim" || problem.head_dim == 0)) continue;
    text += fmt::format("{}{}={}", text.empty() ? "" : " ", name, value);
  }
  return text;
}

Result<Problem> parse_problem(std::string_view text) {
  Problem problem;
  std::vector<std::string_view> named;
  while (!text.empty()) {
    const std::size_t begin = text.find_first_not_of(" \t\r\n");
    if (begin == std::string_view::npos) break;
    text.remove_prefix(begin);
    const std::string_view word = text.substr(0, text.find_first_of(" \t\r\n"));
    text.remove_prefix(word.size());
    const std::size_t equals = word.find('=');
    if (equals == std::string_view::npos) {
      return invalid_argument(fmt::format("problem: '{}' is not name=value", word));
    }
    const std::string_view name = word.substr(0, equals);
    ATTUNE_TRY(set_field(problem, name, word.substr(equals + 1)));
    if (names(named, name)) return invalid_argument(fmt::format("problem: {} is there twice", name));
    named.push_back(name);
  }
  if (!names(named, "output_dtype")) problem.output_dtype = problem.dtype;
  if (merges(problem.operation)) {
    if (problem.head_dim_v == 0) return invalid_argument("problem: head_dim_v=N is missing");
    return problem;
  }
  if (problem.head_dim == 0) return invalid_argument("problem: head_dim=N is missing");
  if (problem.head_dim_v == 0) problem.head_dim_v = problem.head_dim;
  return problem;
}

}  // namespace attune::codegen
