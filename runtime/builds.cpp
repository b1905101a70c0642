#include "runtime/builds.h"

#include <nlohmann/json.hpp>

#include <algorithm>

namespace attune::runtime {
namespace {

using nlohmann::json;

void add(const json& object, std::vector<Build>& builds) {
  const auto field = [&](const char* name) { return object.value(name, json()); };
  const json target = field("target"), compiler = field("compiler"), options = field("options");
  if (!target.is_string() || !compiler.is_string() || !options.is_array()) return;
  if (!std::ranges::all_of(options, &json::is_string)) return;
  Build build{target, {compiler, options}};
  const bool known = std::ranges::any_of(builds, [&](const Build& other) {
    return other.target == build.target && other.compiler.name == build.compiler.name &&
           other.compiler.options == build.compiler.options;
  });
  if (!known) builds.push_back(std::move(build));
}

}  // namespace

std::vector<Build> builds_in(const std::vector<std::string>& descriptions) {
  std::vector<Build> builds;
  for (const std::string& description : descriptions) {
    const json object = json::parse(description, nullptr, /*allow_exceptions=*/false);
    if (!object.is_object()) continue;
    const json listed = object.value("builds", json());
    if (!listed.is_array()) {
      add(object, builds);
      continue;
    }
    for (const json& build : listed) {
      if (build.is_object()) add(build, builds);
    }
  }
  return builds;
}

}  // namespace attune::runtime
