#include "base/env.h"

#include <doctest/doctest.h>

#include <stdlib.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <vector>

namespace attune {
namespace {

namespace fs = std::filesystem;

const fs::path kSource = ATTUNE_SOURCE_DIR;

std::string text_of(const fs::path& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

/// "a|b" as the table of docs/environment.md has it: `a`, `b`
std::string documented_values(const std::string& values) {
  if (values.find('|') == std::string::npos) return values;
  std::string text = "`";
  for (const char c : values) c == '|' ? text += "`, `" : text += c;
  return text + "`";
}

std::vector<std::string> documented_rows() {
  std::istringstream lines(text_of(kSource / "docs/environment.md"));
  std::vector<std::string> rows;
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("| `")) rows.push_back(line);
  }
  return rows;
}

void add_names(const std::string& text, std::set<std::string>& names) {
  const std::string call = "env(\"";
  for (std::size_t at = text.find(call); at != std::string::npos; at = text.find(call, at)) {
    at += call.size();
    names.insert(text.substr(at, text.find('"', at) - at));
  }
}

/// The names in env("...") of all sources.
std::set<std::string> names_in_sources() {
  std::set<std::string> names;
  for (const char* module : {"base", "cache", "codegen", "runtime", "tools"}) {
    for (const auto& file : fs::recursive_directory_iterator(kSource / module)) {
      const fs::path extension = file.path().extension();
      if (extension == ".cpp" || extension == ".h") add_names(text_of(file.path()), names);
    }
  }
  return names;
}

TEST_CASE("a variable is its value, or nothing when unset or empty") {
  REQUIRE(::setenv("ATTUNE_TEST_VARIABLE", "value", 1) == 0);
  CHECK(env("ATTUNE_TEST_VARIABLE") == "value");
  REQUIRE(::setenv("ATTUNE_TEST_VARIABLE", "", 1) == 0);
  CHECK_FALSE(env("ATTUNE_TEST_VARIABLE"));
  REQUIRE(::unsetenv("ATTUNE_TEST_VARIABLE") == 0);
  CHECK_FALSE(env("ATTUNE_TEST_VARIABLE"));
}

TEST_CASE("docs/environment.md has the table's rows, in its order") {
  std::vector<std::string> expected;
  for (const EnvVariable& variable : env_variables()) {
    expected.push_back(std::string("| `") + variable.name + "` | " + documented_values(variable.values) +
                       " | " + variable.fallback + " | `" + variable.read_in + "` | " + variable.effect +
                       " |");
  }
  CHECK(documented_rows() == expected);
}

TEST_CASE("the table is sorted and names each variable once") {
  const auto all = env_variables();
  CHECK(std::ranges::adjacent_find(all, [](const EnvVariable& a, const EnvVariable& b) {
          return std::string_view(a.name) >= b.name;
        }) == all.end());
}

TEST_CASE("each variable is asked for where the table says") {
  for (const EnvVariable& variable : env_variables()) {
    CAPTURE(variable.name);
    CAPTURE(variable.read_in);
    CHECK(text_of(kSource / variable.read_in).find('"' + std::string(variable.name) + '"') !=
          std::string::npos);
  }
}

TEST_CASE("no source asks for a variable that the table lacks") {
  const std::set<std::string> asked = names_in_sources();
  CHECK(asked.contains("ATTUNE_CACHE_DIR"));  // the search does find calls
  for (const std::string& name : asked) {
    CAPTURE(name);
    CHECK(std::ranges::any_of(env_variables(), [&](const EnvVariable& known) { return known.name == name; }));
  }
}

}  // namespace
}  // namespace attune
