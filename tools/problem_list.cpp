#include "tools/problem_list.h"

#include "base/file.h"
#include "runtime/backward.h"
#include "runtime/split_keys.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <utility>

namespace attune::tools {
namespace {

using nlohmann::json;

constexpr std::string_view kSpaces = " \t\r\n";
constexpr std::string_view kWholePass = "operation=backward";
constexpr std::string_view kSplitCall = "operation=split";

/// A problem's text with the place that it came from.
using Line = std::pair<std::string, std::string>;

std::vector<Line> plain_lines(std::string_view text, const std::string& origin) {
  std::vector<Line> lines;
  for (std::size_t number = 1; !text.empty(); ++number) {
    const std::string_view whole = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(whole.size() + 1, text.size()));
    const std::string_view line = whole.substr(0, whole.find('#'));
    if (line.find_first_not_of(kSpaces) == std::string_view::npos) continue;
    lines.emplace_back(line, fmt::format("{}:{}", origin, number));
  }
  return lines;
}

/// {"dtype": "f16", "head_dim": 64} as "dtype=f16 head_dim=64".
std::string line_of(const json& object) {
  std::string line;
  for (const auto& [name, value] : object.items()) {
    line += fmt::format("{}={} ", name, value.is_string() ? value.get<std::string>() : value.dump());
  }
  return line;
}

Result<std::vector<Line>> elements_of(std::string_view text, const std::string& origin) {
  const json array = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!array.is_array()) return invalid_argument(fmt::format("{}: not a valid JSON array", origin));
  std::vector<Line> lines;
  for (std::size_t i = 0; i < array.size(); ++i) {
    std::string place = fmt::format("{}: element {}", origin, i);
    if (!array[i].is_string() && !array[i].is_object()) {
      return invalid_argument(fmt::format("{} is neither text nor an object", place));
    }
    lines.emplace_back(array[i].is_string() ? array[i].get<std::string>() : line_of(array[i]),
                       std::move(place));
  }
  return lines;
}

Result<std::vector<Line>> lines_of(std::string_view text, const std::string& origin) {
  const std::size_t begin = text.find_first_not_of(kSpaces);
  if (begin != std::string_view::npos && text[begin] == '[') return elements_of(text, origin);
  return plain_lines(text, origin);
}

std::vector<std::string_view> words_of(std::string_view text) {
  std::vector<std::string_view> words;
  for (;;) {
    text.remove_prefix(std::min(text.find_first_not_of(kSpaces), text.size()));
    if (text.empty()) return words;
    words.push_back(text.substr(0, text.find_first_of(kSpaces)));
    text.remove_prefix(words.back().size());
  }
}

}  // namespace

std::string problem_help() {
  std::string fields;
  codegen::Problem problem;
  codegen::for_each_problem_field(problem, [&](std::string_view name, const auto&) {
    fields += fmt::format("{}{}", fields.empty() ? "" : " ", name);
  });
  return "\"dtype=f16 head_dim=64 window_right=bounded lse=write\"; the fields are " + fields +
         "; boxes=1 says that strides are multiples of 16 bytes, which sm90 needs; operation=backward stands "
         "for the kernels of a backward pass, with query_gradient=ordered of a deterministic one, "
         "operation=split for those of a call whose keys are split over blocks";
}

Result<std::vector<codegen::Problem>> parse_problems(std::string_view text, const codegen::Arch& arch) {
  std::vector<std::string_view> words = words_of(text);
  const bool whole_pass = std::erase(words, kWholePass) > 0;
  const bool split_call = std::erase(words, kSplitCall) > 0;
  ATTUNE_ASSIGN(problem, codegen::parse_problem(fmt::format("{}", fmt::join(words, " "))));
  if (split_call) {
    if (!runtime::splits_keys(arch)) return std::vector<codegen::Problem>();
    return std::vector{runtime::problem_of_parts(problem), runtime::problem_of_merge(problem)};
  }
  if (!whole_pass) return std::vector{problem};
  const bool deterministic = problem.query_gradient == kernel::QueryGradient::ordered;
  problem.query_gradient = kernel::QueryGradient::apart;
  return runtime::problems_of_pass(problem, arch, deterministic);
}

Result<std::string> read_list(const std::string& path) {
  auto bytes = read_file(path);
  if (!bytes.ok()) return invalid_argument(bytes.failure().message);
  return std::string(reinterpret_cast<const char*>(bytes->data()), bytes->size());
}

Result<std::vector<std::string>> problem_lines(std::string_view text, const std::string& origin) {
  ATTUNE_ASSIGN(lines, lines_of(text, origin));
  std::vector<std::string> words;
  for (const auto& [line, place] : lines) words.push_back(fmt::format("{}", fmt::join(words_of(line), " ")));
  return words;
}

Result<std::vector<codegen::Problem>> parse_problem_list(std::string_view text, const std::string& origin,
                                                         const codegen::Arch& arch) {
  ATTUNE_ASSIGN(lines, lines_of(text, origin));
  std::vector<codegen::Problem> problems;
  for (const auto& [line, place] : lines) {
    const auto parsed = parse_problems(line, arch);
    if (!parsed.ok()) return invalid_argument(fmt::format("{}: {}", place, parsed.failure().message));
    for (const codegen::Problem& problem : *parsed) {
      if (std::ranges::find(problems, problem) == problems.end()) problems.push_back(problem);
    }
  }
  return problems;
}

}  // namespace attune::tools
