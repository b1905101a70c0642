// The window masks against what upstream's own classes materialize to (masks.json: facts, printed by running
// them). Both the public API's reduction of a bias to a kernel's window and the tests' own must agree with
// it.
#include "attune/attune.h"
#include "runtime/check.h"
#include "tools/reference/mask.h"

#include <doctest/doctest.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <fstream>
#include <map>
#include <optional>
#include <string>

using namespace attune;
using reference::Mask;

namespace {

/// The bias of a case, or nothing for the classes that are not window masks.
std::optional<AttentionBias> bias_of(const nlohmann::json& one) {
  const std::string name = one.at("class");
  const nlohmann::json& args = one.at("args");
  if (name == "LowerTriangularMask") return LowerTriangularMask{};
  if (name == "LowerTriangularFromBottomRightMask") return LowerTriangularFromBottomRightMask{};
  if (name == "LowerTriangularFromBottomRightLocalAttentionMask") {
    return LowerTriangularFromBottomRightMask{}.make_local_attention(args.at("window_size"));
  }
  if (name == "LocalAttentionFromBottomRightMask") {
    return LocalAttentionFromBottomRightMask{args.at("window_left"), args.at("window_right")};
  }
  return std::nullopt;
}

std::string golden_picture(const nlohmann::json& one) {
  std::string text;
  for (const std::string row : one.at("mask")) {
    for (const char visible : row) text += visible == '1' ? '#' : '.';
    text += '\n';
  }
  return text;
}

/// The mask that a kernel is told when the public API is called.
Mask mask_of_call(const AttentionBias& bias, int len_q, int len_k) {
  static const float anything = 0;  // never read
  const TensorView query(&anything, DType::f32, {1, len_q, 1, 1});
  const TensorView key(&anything, DType::f32, {1, len_k, 1, 1});
  const AttentionOptions options;
  const auto call =
      runtime::check({.query = query, .key = key, .value = key, .bias = bias, .options = options});
  REQUIRE(call.ok());
  return {.left = call->problem.window_left,
          .right = call->problem.window_right,
          .window = call->params.window,
          .len_q = call->params.len_q,
          .len_k = call->params.len_k};
}

}  // namespace

TEST_CASE("window masks equal upstream's") {
  std::ifstream file(ATTUNE_SOURCE_DIR "/tests/golden/masks.json");
  REQUIRE(file.good());
  const nlohmann::json goldens = nlohmann::json::parse(file);
  std::map<std::string, int> compared;
  for (const nlohmann::json& one : goldens.at("cases")) {
    const auto bias = bias_of(one);
    if (!bias) continue;
    const int len_q = one.at("q_len");
    const int len_k = one.at("k_len");
    CAPTURE(reference::to_string(*bias));
    CHECK(picture(reference::mask_of(*bias, len_q, len_k)) == golden_picture(one));
    CHECK(picture(mask_of_call(*bias, len_q, len_k)) == golden_picture(one));
    ++compared[one.at("class")];
  }
  CHECK(compared.size() == 4);  // every window class occurs
}
