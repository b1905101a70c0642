// The bias classes against what upstream's own classes materialize to and refuse (masks.json: facts, printed
// by running them). What kernels attend to is asked by `attune verify masks`, over the same file.
#include "attune/attune.h"
#include "tools/mask_picture.h"
#include "tools/reference/mask.h"
#include "tools/verify/bias_arguments.h"
#include "tools/verify/masks.h"

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <fstream>
#include <set>
#include <string>

using namespace attune;
using nlohmann::json;

namespace {

const json& goldens() {
  static const json value = [] {
    std::ifstream file(ATTUNE_SOURCE_DIR "/tests/golden/masks.json");
    REQUIRE(file.good());
    return json::parse(file);
  }();
  return value;
}

AttentionBias bias_of(const json& entry) {
  const auto route =
      verify::find_route(entry.at("class").get<std::string>(), entry.at("via").get<std::string>());
  REQUIRE(route.ok());
  auto bias = verify::make_bias(**route, entry.at("args"));
  REQUIRE_MESSAGE(bias.ok(), entry.at("args").dump());
  return *bias;
}

std::string golden_picture(const json& entry) {
  std::string text;
  for (std::string row : entry.at("mask")) {
    std::ranges::replace(row, '1', '#');
    std::ranges::replace(row, '0', '.');
    text += row + '\n';
  }
  return text;
}

}  // namespace

TEST_CASE("every class materializes to upstream's mask, and refuses what upstream refuses") {
  const auto report = verify::verify_masks(goldens(), {});
  REQUIRE(report.ok());
  for (const std::string& difference : report->differences) FAIL_CHECK(difference);
  CHECK(report->classes.size() == 19);
  CHECK(report->total().cases == 296);
  CHECK(report->total().materialized == 296);
  CHECK(report->errors == 26);
  CHECK(report->refused == 26);
}

TEST_CASE("the mask that the reference asks is upstream's too") {
  for (const json& entry : goldens().at("cases")) {
    const AttentionBias bias = bias_of(entry);
    CAPTURE(reference::to_string(bias));
    CHECK(bias.name == entry.at("class").get<std::string>());
    CHECK(reference::picture(reference::Mask(bias, 1, entry.at("q_len"), entry.at("k_len"))) ==
          golden_picture(entry));
  }
}

TEST_CASE("a mask that differs is a difference, shown as two pictures") {
  json changed{{"cases", {goldens().at("cases").at(1)}}};
  json& entry = changed["cases"][0];
  const std::string bias = entry.at("class");
  std::string row = entry.at("mask").at(0);
  row[0] = row[0] == '1' ? '0' : '1';
  entry["mask"][0] = row;
  const auto report = verify::verify_masks(changed, {});
  REQUIRE(report.ok());
  CHECK_FALSE(report->ok());
  CHECK(report->total().cases == 1);
  CHECK(report->total().materialized == 0);
  REQUIRE(report->differences.size() == 1);
  const std::string& difference = report->differences.front();
  CHECK(difference.starts_with(bias + " via "));
  CHECK(std::ranges::count(difference, '\n') == 2 + static_cast<std::ptrdiff_t>(entry.at("mask").size()));
  CHECK(difference.find("  <-\n") != std::string::npos);
}

TEST_CASE("an error that does not come, or says something else, is a difference") {
  json changed{{"cases", json::array()},
               {"errors", {goldens().at("errors").at(0), goldens().at("errors").at(1)}}};
  changed["errors"][0]["args"]["kv_seqlen"] = changed["errors"][0]["args"]["q_seqlen"];
  changed["errors"][1]["error"] = "ValueError: something else";
  const auto report = verify::verify_masks(changed, {});
  REQUIRE(report.ok());
  CHECK(report->errors == 2);
  CHECK(report->refused == 0);
  REQUIRE(report->differences.size() == 2);
  CHECK(report->differences[0].ends_with("got a bias"));
  CHECK(report->differences[1].find("expected the refusal \"something else\", got \"Block #0") !=
        std::string::npos);
}

TEST_CASE("what is no file of masks is refused") {
  for (const char* text :
       {"[]", "{}", R"({"cases": [{"class": "LowerTriangularMask"}]})", R"({"cases": [7]})"}) {
    const auto report = verify::verify_masks(json::parse(text), {});
    REQUIRE_FALSE(report.ok());
    CHECK(report.failure().kind == ErrorKind::invalid_argument);
    CHECK(report.failure().message.starts_with("not a file of masks: "));
  }
}
