// Every refusal of a call's arguments, as text, and the reduction of a good call.
#include "runtime/check.h"

#include "attune/attune.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

using namespace attune;
using runtime::check;

namespace {

/// A good call on small CPU tensors; each test spoils one thing.
struct Fixture {
  alignas(64) float memory[4][4096] = {};
  TensorView query{memory[0], attune::DType::f32, {2, 5, 3, 8}};
  TensorView key{memory[1], attune::DType::f32, {2, 7, 3, 8}};
  TensorView value{memory[2], attune::DType::f32, {2, 7, 3, 4}};
  MutableTensorView output{memory[3], attune::DType::f32, {2, 5, 3, 4}};
  alignas(64) float lse_memory[64] = {};
  MutableTensorView lse{lse_memory, attune::DType::f32, {2, 3, 5}};
  AttentionBias bias;
  AttentionOptions options;

  Result<runtime::Call> run() const { return check({query, key, value, &output, &lse, true, bias, options}); }
  std::string message() const {
    const auto call = run();
    return call.ok() ? "accepted" : call.failure().message;
  }
  ErrorKind kind() const { return run().failure().kind; }
};

}  // namespace

TEST_CASE_FIXTURE(Fixture, "a good call is reduced to its problem and parameters") {
  bias = LocalAttentionFromBottomRightMask{.window_left = 1, .window_right = 2};
  const auto call = run();
  REQUIRE(call.ok());
  CHECK(call->problem.head_dim == 8);
  CHECK(call->problem.head_dim_v == 4);
  CHECK(call->problem.window_left == kernel::Edge::bounded);
  CHECK(call->problem.lse == kernel::Lse::write);
  CHECK(call->problem.align_bytes == 16);
  CHECK(call->params.len_q == 5);
  CHECK(call->params.len_k == 7);
  CHECK(call->params.window.lower == 1);  // shift 2, left 1
  CHECK(call->params.window.upper == 4);
  CHECK(call->params.query_strides.seq == 24);
  CHECK(call->params.scale == doctest::Approx(1 / std::sqrt(8.0)));
}

TEST_CASE_FIXTURE(Fixture, "three axes mean one head") {
  query = {memory[0], attune::DType::f32, {2, 5, 8}};
  key = {memory[1], attune::DType::f32, {2, 7, 8}};
  value = {memory[2], attune::DType::f32, {2, 7, 4}};
  output = {memory[3], attune::DType::f32, {2, 5, 4}};
  lse = {lse_memory, attune::DType::f32, {2, 1, 5}};
  const auto call = run();
  REQUIRE(call.ok());
  CHECK(call->params.heads == 1);
  CHECK(call->params.query_strides.seq == 8);
}

TEST_CASE_FIXTURE(Fixture, "ranks") {
  key.rank = 3;
  CHECK(message() == "query and key differ in rank (4 and 3): all should be BMHK or all BMK");
  key.rank = 2;
  CHECK(message() == "key: rank 2, expected [B, M, H, K] or [B, M, K]");
  key.rank = 5;
  CHECK(kind() == ErrorKind::unsupported);
  key.rank = -1;
  CHECK(message() == "key: rank -1, expected [B, M, H, K] or [B, M, K]");
}

TEST_CASE_FIXTURE(Fixture, "dtypes") {
  value.dtype = attune::DType::f16;
  CHECK(message() == "query is f32 but value is f16: all should have the same dtype");
  value.dtype = static_cast<attune::DType>(7);
  CHECK(message() == "value: unknown dtype 7");
  value.dtype = attune::DType::f32;
  output.dtype = attune::DType::bf16;
  CHECK(message() == "query is f32 but output is bf16: all should have the same dtype");
}

TEST_CASE_FIXTURE(Fixture, "devices") {
  key.device = {DeviceType::cuda, 1};
  CHECK(message() == "query is on cpu but key is on cuda:1: all should be on the same device");
  key.device = {static_cast<DeviceType>(9), 0};
  CHECK(message() == "key: unknown device (type 9, index 0)");
  key.device = {DeviceType::cuda, -1};
  CHECK(message() == "key: unknown device (type 1, index -1)");
}

TEST_CASE_FIXTURE(Fixture, "shapes") {
  key.shape[3] = 9;
  CHECK(
      message().starts_with("incompatible shapes: query [2, 5, 3, 8], key [2, 7, 3, 9], value [2, 7, 3, 4]"));
  key.shape[3] = 8;
  value.shape[1] = 6;
  CHECK(message().starts_with("incompatible shapes"));
  value.shape[1] = 7;
  output.shape[3] = 8;
  CHECK(message() == "output: shape [2, 5, 3, 8] does not fit query [2, 5, 3, 8] and value [2, 7, 3, 4]");
}

TEST_CASE_FIXTURE(Fixture, "head dims of zero") {
  query.shape[3] = key.shape[3] = 0;
  CHECK(message() == "head_dim and head_dim_v must be at least 1");
}

TEST_CASE_FIXTURE(Fixture, "negative and overflowing extents") {
  query.shape[1] = -5;
  CHECK(message() == "query: axis 1 of shape [2, -5, 3, 8] is negative");
  query.shape[1] = std::int64_t{1} << 31;
  CHECK(message() == "query: axis 1 has extent 2147483648, the limit is 2^29");
  query.shape[1] = 5;
  query.strides[0] = std::numeric_limits<std::int64_t>::max() / 2;
  CHECK(message().find("overflows the address space") != std::string::npos);
  query.strides[0] = std::numeric_limits<std::int64_t>::min();
  CHECK(message().find("overflows the address space") != std::string::npos);
}

TEST_CASE_FIXTURE(Fixture, "the last stride") {
  key.strides[3] = 2;
  CHECK(message() == "key: the last axis has stride 2, expected 1; make a contiguous copy of the tensor");
}

TEST_CASE_FIXTURE(Fixture, "pointers") {
  value.data = nullptr;
  CHECK(message() == "value: null data pointer");
  value.data = reinterpret_cast<const char*>(memory[2]) + 1;
  CHECK(message() == "value: the data pointer is not aligned to its element size");
  value.data = memory[2];
  output.data = memory[0];
  CHECK(message() == "output: shares its memory with an input");
  output.data = memory[3];
  lse.data = nullptr;
  CHECK(message() == "lse: null or misaligned data pointer");
}

TEST_CASE_FIXTURE(Fixture, "an output whose elements share memory") {
  output.strides[1] = 0;
  CHECK(message() == "output: stride 0 on axis 1: its elements would share memory");
}

TEST_CASE_FIXTURE(Fixture, "the log-sum-exp tensor") {
  lse.shape[2] = 4;
  CHECK(message() == "lse: expected float32 [2, 3, 5]");
  lse.shape[2] = 5;
  lse.dtype = attune::DType::f16;
  CHECK(message() == "lse: expected float32 [2, 3, 5]");
  lse.dtype = attune::DType::f32;
  lse.strides[1] = 8;
  CHECK(message() == "lse: must be contiguous");
}

TEST_CASE_FIXTURE(Fixture, "scales that are not finite in float32") {
  for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity(), -1e39}) {
    options.scale = bad;
    CHECK(kind() == ErrorKind::invalid_argument);
    CHECK(message().find("expected a finite float32") != std::string::npos);
  }
  options.scale = -0.5;
  CHECK(run().ok());
}

TEST_CASE_FIXTURE(Fixture, "windows") {
  bias = LowerTriangularFromBottomRightLocalAttentionMask{.window_size = 0};
  CHECK(message() ==
        "LowerTriangularFromBottomRightLocalAttentionMask: window_size 0, expected `window_size > 0`");
  bias = LocalAttentionFromBottomRightMask{.window_left = -1, .window_right = 2};
  CHECK(message() ==
        "LocalAttentionFromBottomRightMask: window_left -1 and window_right 2, expected both >= 0");
}

TEST_CASE_FIXTURE(Fixture, "an unknown family") {
  options.family = static_cast<Family>(42);
  CHECK(message() == "options: unknown family 42");
}

TEST_CASE_FIXTURE(Fixture, "empty tensors need no memory") {
  query.shape[0] = key.shape[0] = value.shape[0] = output.shape[0] = lse.shape[0] = 0;
  query.data = key.data = value.data = nullptr;
  output.data = lse.data = nullptr;
  lse.strides = {};
  CHECK(run().ok());
}

TEST_CASE_FIXTURE(Fixture, "alignment is the widest that every row allows") {
  query.data = &memory[0][1];
  CHECK(run()->problem.align_bytes == 4);
  query.data = &memory[0][2];
  CHECK(run()->problem.align_bytes == 8);
}
