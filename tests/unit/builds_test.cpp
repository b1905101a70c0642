// The compilers that descriptions of the cache's layers name.
#include "runtime/builds.h"

#include <doctest/doctest.h>

#include <string>
#include <vector>

using attune::runtime::Build;
using attune::runtime::builds_in;

namespace {

std::string names_of(const std::vector<Build>& builds) {
  std::string names;
  for (const Build& build : builds) {
    names += build.target + ":" + build.compiler.name;
    for (const std::string& option : build.compiler.options) names += " " + option;
    names += ";";
  }
  return names;
}

constexpr const char* kEntry =
    R"({"target": "sm_90a", "compiler": "nvrtc 13", "options": ["-a", "-b"], "spec": {}})";

}  // namespace

TEST_CASE("entries name their own build, manifests theirs; each is named once") {
  const std::vector<std::string> texts{
      kEntry, kEntry,
      R"({"kernels": 9, "builds": [{"target": "sm_80", "compiler": "nvrtc 12", "options": []},
                                   {"target": "sm_90a", "compiler": "nvrtc 13", "options": ["-a", "-b"]},
                                   {"target": "sm_90a", "compiler": "nvrtc 13", "options": ["-b", "-a"]}]})"};
  CHECK(names_of(builds_in(texts)) == "sm_90a:nvrtc 13 -a -b;sm_80:nvrtc 12;sm_90a:nvrtc 13 -b -a;");
}

TEST_CASE("what names no build is passed over") {
  for (const char* text : {"", "{", "[]", "null", "7", "{}", R"({"builds": {}})",
                           R"({"builds": [7, null, []]})", R"({"target": "sm_90a", "compiler": "nvrtc 13"})",
                           R"({"target": 90, "compiler": "nvrtc 13", "options": []})",
                           R"({"target": "sm_90a", "compiler": ["nvrtc"], "options": []})",
                           R"({"target": "sm_90a", "compiler": "nvrtc 13", "options": "-a"})",
                           R"({"target": "sm_90a", "compiler": "nvrtc 13", "options": ["-a", 7]})"}) {
    CAPTURE(text);
    CHECK(names_of(builds_in({text, kEntry})) == "sm_90a:nvrtc 13 -a -b;");
  }
}
