// The C++ API's backward on the CPU: shapes and types of results, workspaces, and what a hot call costs. That
// the numbers are right is tests/numerics' part.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#define DOCTEST_CONFIG_IMPLEMENT
#include "attune/attune.h"
#include "tests/unit/allocations.h"
#include "tests/unit/api_tensors.h"

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

using namespace attune;
using namespace attune::test;

namespace {

/// [1, 6, 4, 16] queries over [1, 9, 2, 16] keys and [1, 9, 2, 24] values, and what forward makes of them.
struct Pass {
  std::vector<float> q = numbers(6 * 4 * 16, 1);
  std::vector<float> k = numbers(9 * 2 * 16, 2);
  std::vector<float> v = numbers(9 * 2 * 24, 3);
  std::vector<float> g = numbers(6 * 4 * 24, 4);
  TensorView query{q.data(), DType::f32, {1, 6, 4, 16}};
  TensorView key{k.data(), DType::f32, {1, 9, 2, 16}};
  TensorView value{v.data(), DType::f32, {1, 9, 2, 24}};
  TensorView grad_output{g.data(), DType::f32, {1, 6, 4, 24}};
  Attention attention;
  alignas(256) float memory[4][1024] = {};
  MutableTensorView grad_query{memory[0], DType::f32, {1, 6, 4, 16}};
  MutableTensorView grad_key{memory[1], DType::f32, {1, 9, 2, 16}};
  MutableTensorView grad_value{memory[2], DType::f32, {1, 9, 2, 24}};
  GradientViews gradients{&grad_query, &grad_key, &grad_value, nullptr};

  Pass() { forward({}); }
  void forward(const AttentionBias& bias) {
    attention = memory_efficient_attention_forward_requires_grad(query, key, value, bias);
  }
  void backward(const AttentionBias& bias = {}, const BackwardOptions& options = {}) {
    memory_efficient_attention_backward(grad_output, attention.output.view(), attention.lse.view(), query,
                                        key, value, gradients, bias, {}, options);
  }
  std::size_t workspace_bytes() const {
    return backward_workspace_bytes(grad_output, attention.output.view(), attention.lse.view(), query, key,
                                    value, gradients);
  }
};

}  // namespace

TEST_CASE_FIXTURE(Pass, "allocated gradients have the shapes and types of what they are gradients of") {
  const std::vector<float> b = numbers(4 * 9, 5);
  const AttentionBias bias{TensorView(b.data(), DType::f32, {1, 4, 1, 9})};
  forward(bias);
  BackwardOptions options;
  options.bias_gradient = true;
  const Gradients result = memory_efficient_attention_backward(
      grad_output, attention.output.view(), attention.lse.view(), query, key, value, bias, {}, options);
  CHECK(shape_of(result.query) == std::vector<std::int64_t>{1, 6, 4, 16});
  CHECK(shape_of(result.key) == std::vector<std::int64_t>{1, 9, 2, 16});
  CHECK(shape_of(result.value) == std::vector<std::int64_t>{1, 9, 2, 24});
  CHECK(shape_of(result.bias) == std::vector<std::int64_t>{1, 4, 1, 9});
  // Rows of the softmax add up to 1 whatever the bias is, so its gradient over the keys adds up to 0.
  const auto* of_bias = static_cast<const float*>(result.bias.data());
  for (int head = 0; head < 4; ++head) {
    double sum = 0;
    double size = 0;
    for (int j = 0; j < 9; ++j) {
      sum += of_bias[head * 9 + j];
      size += std::abs(of_bias[head * 9 + j]);
    }
    CHECK(size > 0.01);
    CHECK(std::abs(sum) < 1e-5);
  }
}

TEST_CASE_FIXTURE(Pass, "the caller's workspace gives the same bits, and nothing behind it is touched") {
  backward();
  const std::vector<float> expected(memory[0], memory[0] + q.size());
  const std::size_t bytes = workspace_bytes();
  REQUIRE(bytes + 256 <= sizeof memory[3]);
  auto* workspace = reinterpret_cast<unsigned char*>(memory[3]);
  std::fill_n(workspace, sizeof memory[3],
              0xffu);  // NaN where a kernel would read what delta has not written
  std::fill_n(memory[0], q.size(), -1.0f);
  BackwardOptions options;
  options.workspace = workspace;
  options.workspace_bytes = bytes;
  backward({}, options);
  CHECK(std::equal(expected.begin(), expected.end(), memory[0]));
  for (std::size_t i = bytes; i < sizeof memory[3]; ++i) REQUIRE(workspace[i] == 0xffu);
}

TEST_CASE_FIXTURE(Pass, "a workspace that is too small is refused with the size that it should have") {
  BackwardOptions options;
  options.workspace = memory[3];
  options.workspace_bytes = workspace_bytes() - 1;
  std::fill_n(memory[0], q.size(), -1.0f);
  try {
    backward({}, options);
    FAIL("accepted");
  } catch (const Error& error) {
    CHECK(error.kind() == ErrorKind::invalid_argument);
    CHECK(std::string(error.what()) ==
          "workspace: 511 bytes, expected at least the 512 that "
          "backward_workspace_bytes() says");
  }
  CHECK(memory[0][0] == -1.0f);  // refused before anything was written
}

TEST_CASE_FIXTURE(Pass, "prepare loads the kernels that the call uses, and explain tells of each") {
  const TensorView output = attention.output.view();
  const TensorView lse = attention.lse.view();
  const AttentionBias bias = LowerTriangularMask{};
  prepare_backward(grad_output, output, lse, query, key, value, gradients, bias);
  const Counters prepared = counters();
  backward(bias);
  CHECK(counters().compiles == prepared.compiles);
  CHECK(counters().loads == prepared.loads);
  CHECK(counters().launches == prepared.launches + 3);
  CHECK(last_kernel().find("grad_key_value") != std::string::npos);
  const auto json =
      nlohmann::json::parse(explain_backward(grad_output, output, lse, query, key, value, gradients, bias));
  REQUIRE(json.at("kernels").size() == 3);
  CHECK(json.at("kernels")[0].at("problem").get<std::string>().find("operation=delta") == 0);
  CHECK(json.at("kernels")[1].at("problem").get<std::string>().find("window_right=bounded") !=
        std::string::npos);
  CHECK(json.at("kernels")[2].at("state") == "loaded");
  CHECK(json.at("workspace_bytes") == workspace_bytes());
}

TEST_CASE_FIXTURE(Pass, "a family that has no gradients says so") {
  CHECK(backward_not_supported_reasons(Family::cpu, query, key, value).empty());
  CHECK(backward_not_supported_reasons(Family::mma, query, key, value) ==
        std::vector<std::string>{"mma kernels do not run on cpu tensors"});
  TensorView wrong = key;
  wrong.shape[3] = 8;
  CHECK(
      backward_not_supported_reasons(Family::cpu, query, wrong, value).front().find("incompatible shapes") ==
      0);
  CHECK_THROWS_WITH_AS(backward_not_supported_reasons(static_cast<Family>(7), query, key, value),
                       "unknown family 7", Error);
}

TEST_CASE_FIXTURE(Pass, "a hot call with a workspace allocates nothing") {
  BackwardOptions options;
  options.workspace = memory[3];
  options.workspace_bytes = sizeof memory[3];
  backward({}, options);
  const long before = test::allocations();
  backward({}, options);
  CHECK(test::allocations() == before);
}

int main(int argc, char** argv) {
#if !ATTUNE_HAVE_LLVM
  std::puts("[SKIP] built without LLVM: there is no compiler for CPU kernels");
  return 77;
#endif
  return doctest::Context(argc, argv).run();
}
