// Every refusal of a call's arguments, as text, and the reduction of a good call.
#include "runtime/check.h"

#include "attune/attune.h"
#include "attune/blocks.h"
#include "attune/philox.h"
#include "runtime/check_tensors.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

using namespace attune;
using runtime::check;

namespace {

/// A good call on small CPU tensors; each test spoils one thing.
struct Fixture {
  alignas(64) float memory[4][4096] = {};
  TensorView query{memory[0], DType::f32, {2, 5, 3, 8}};
  TensorView key{memory[1], DType::f32, {2, 7, 3, 8}};
  TensorView value{memory[2], DType::f32, {2, 7, 3, 4}};
  MutableTensorView output{memory[3], DType::f32, {2, 5, 3, 4}};
  alignas(64) float lse_memory[64] = {};
  MutableTensorView lse{lse_memory, DType::f32, {2, 3, 5}};
  AttentionBias bias;
  AttentionOptions options;

  Result<runtime::Call> run() const { return check({query, key, value, &output, &lse, true, bias, options}); }
  std::string message() const {
    const auto call = run();
    return call.ok() ? "accepted" : call.failure().message;
  }
  ErrorKind kind() const { return run().failure().kind; }

  void use_groups() {
    query = {memory[0], DType::f32, {2, 5, 3, 4, 8}};
    key = {memory[1], DType::f32, {2, 7, 3, 1, 8}};
    value = {memory[2], DType::f32, {2, 7, 1, 4, 4}};
    output = {memory[3], DType::f32, {2, 5, 3, 4, 4}};
    lse = {lse_memory, DType::f32, {2, 3, 4, 5}};
  }
};

}  // namespace

// ---- Tensors ----

TEST_CASE_FIXTURE(Fixture, "a good call is reduced to its problem and parameters") {
  bias = LocalAttentionFromBottomRightMask{.window_left = 1, .window_right = 2};
  const auto call = run();
  REQUIRE(call.ok());
  CHECK(call->problem == codegen::Problem{.head_dim = 8,
                                          .head_dim_v = 4,
                                          .window_left = kernel::Edge::bounded,
                                          .window_right = kernel::Edge::bounded,
                                          .lse = kernel::Lse::write});
  CHECK(call->params.len_q == 5);
  CHECK(call->params.len_k == 7);
  CHECK(call->params.groups == 3);
  CHECK(call->params.heads == 1);
  CHECK(call->params.window.lower == 1);  // shift 2, left 1
  CHECK(call->params.window.upper == 4);
  CHECK(call->params.reach.right == 2);
  CHECK(call->params.query_strides.seq == 24);
  CHECK(call->params.query_strides.group == 8);
  CHECK(call->params.scale == doctest::Approx(1 / std::sqrt(8.0)));
}

TEST_CASE_FIXTURE(Fixture, "three axes mean one head") {
  query = {memory[0], DType::f32, {2, 5, 8}};
  key = {memory[1], DType::f32, {2, 7, 8}};
  value = {memory[2], DType::f32, {2, 7, 4}};
  output = {memory[3], DType::f32, {2, 5, 4}};
  lse = {lse_memory, DType::f32, {2, 1, 5}};
  const auto call = run();
  REQUIRE(call.ok());
  CHECK(call->params.groups == 1);
  CHECK(call->params.heads == 1);
  CHECK(call->params.query_strides.seq == 8);
}

TEST_CASE_FIXTURE(Fixture, "fewer key heads make groups of query heads") {
  query = {memory[0], DType::f32, {2, 5, 6, 8}};
  output = {memory[3], DType::f32, {2, 5, 6, 4}};
  lse = {lse_memory, DType::f32, {2, 6, 5}};
  const auto call = run();
  REQUIRE(call.ok());
  CHECK(call->params.groups == 3);
  CHECK(call->params.heads == 2);
  CHECK(call->params.query_strides.group == 16);
  CHECK(call->params.query_strides.head == 8);
  CHECK(call->params.output_strides.group == 8);
  CHECK(call->params.output_strides.head == 4);
  CHECK(call->params.key_strides.group == 8);
  CHECK(call->params.key_strides.head == 0);
  query.shape[2] = output.shape[2] = 5;
  CHECK(message().find("where Hkv divides H") != std::string::npos);
}

TEST_CASE_FIXTURE(Fixture, "groups broadcast over extents of 1, of key and value each for itself") {
  use_groups();
  const auto call = run();
  REQUIRE(call.ok());
  CHECK(call->params.groups == 3);
  CHECK(call->params.heads == 4);
  CHECK(call->params.query_strides.group == 32);
  CHECK(call->params.query_strides.head == 8);
  CHECK(call->params.key_strides.group == 8);
  CHECK(call->params.key_strides.head == 0);
  CHECK(call->params.value_strides.group == 0);
  CHECK(call->params.value_strides.head == 4);
  key.shape[3] = 2;
  CHECK(
      message().starts_with("incompatible shapes: query [2, 5, 3, 4, 8], key [2, 7, 3, 2, 8], value [2, 7, "
                            "1, 4, 4]; expected [B, Mq, G, H, K], [B, Mkv, G or 1, H or 1, K]"));
}

TEST_CASE_FIXTURE(Fixture, "ranks") {
  key.rank = 3;
  CHECK(message() == "query and key differ in rank (4 and 3): all should be BMHK, all BMK or all BMGHK");
  for (const int rank : {-1, 2, 6}) {
    key.rank = rank;
    CHECK(message() ==
          "key: rank " + std::to_string(rank) + ", expected [B, M, H, K], [B, M, K] or [B, M, G, H, K]");
  }
}

TEST_CASE_FIXTURE(Fixture, "dtypes") {
  value.dtype = DType::f16;
  CHECK(message() == "query is f32 but value is f16: all should have the same dtype");
  value.dtype = static_cast<DType>(7);
  CHECK(message() == "value: unknown dtype 7");
  value.dtype = DType::boolean;
  CHECK(message() == "value: dtype boolean, expected f32, f16 or bf16");
}

TEST_CASE_FIXTURE(Fixture, "the output's dtype is its own") {
  output.dtype = DType::bf16;
  REQUIRE(run().ok());
  CHECK(run()->problem.output_dtype == kernel::DType::bf16);
  output.dtype = DType::i32;
  CHECK(message() == "output_dtype is i32, expected f32, f16 or bf16");
  options.output_dtype = DType::f16;
  const auto call = check({query, key, value, nullptr, nullptr, false, bias, options});
  REQUIRE(call.ok());
  CHECK(call->problem.output_dtype == kernel::DType::f16);
}

TEST_CASE_FIXTURE(Fixture, "devices") {
  key.device = {DeviceType::cuda, 1};
  CHECK(message() == "query is on cpu but key is on cuda:1: all should be on the same device");
  key.device = {DeviceType::cpu, 5};
  CHECK(message() == "query is on cpu but key is on cpu:5: all should be on the same device");
  key.device = {static_cast<DeviceType>(9), 0};
  CHECK(message() == "key: unknown device (type 9, index 0)");
  key.device = {DeviceType::cuda, -1};
  CHECK(message() == "key: unknown device (type 1, index -1)");
  key.device = {};
  lse.device = {DeviceType::cuda, 0};
  CHECK(message() == "lse: is on cuda:0, expected cpu, the device of the inputs");
}

TEST_CASE_FIXTURE(Fixture, "shapes") {
  key.shape[3] = 9;
  CHECK(
      message() ==
      "incompatible shapes: query [2, 5, 3, 8], key [2, 7, 3, 9], value [2, 7, 3, 4]; expected [B, Mq, H, "
      "K], [B, Mkv, Hkv, K], [B, Mkv, Hkv, Kv], where Hkv divides H. To broadcast a batch, pass a view with "
      "stride 0");
  key.shape[3] = 8;
  value.shape[1] = 6;
  CHECK(message().starts_with("incompatible shapes"));
  value.shape[1] = 7;
  value.shape[2] = 1;
  CHECK(message().starts_with("incompatible shapes"));
  value.shape[2] = 3;
  output.shape[3] = 8;
  CHECK(message() ==
        "output: shape [2, 5, 3, 8], expected [2, 5, 3, 4]: that of query [2, 5, 3, 8] with the last axis of "
        "value [2, 7, 3, 4]");
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
  CHECK(kind() == ErrorKind::unsupported);
  query.shape[1] = 5;
  query.strides[0] = std::numeric_limits<std::int64_t>::max() / 2;
  CHECK(message().find("overflows the address space") != std::string::npos);
  query.strides[0] = std::numeric_limits<std::int64_t>::min();
  CHECK(message().find("overflows the address space") != std::string::npos);
}

TEST_CASE_FIXTURE(Fixture, "the last stride") {
  for (const std::int64_t stride : {2, 0, -1}) {
    key.strides[3] = stride;
    CHECK(message() == "key: the last axis has stride " + std::to_string(stride) +
                           ", expected 1; make a contiguous copy of the tensor");
  }
}

TEST_CASE_FIXTURE(Fixture, "pointers") {
  value.data = nullptr;
  CHECK(message() == "value: null data pointer");
  value.data = reinterpret_cast<const char*>(memory[2]) + 1;
  CHECK(message() == "value: the data pointer is not aligned to its element size");
  value.data = memory[2];
  lse.data = nullptr;
  CHECK(message() == "lse: null data pointer");
}

TEST_CASE_FIXTURE(Fixture, "the log-sum-exp tensor") {
  lse.shape[2] = 4;
  CHECK(message() == "lse: expected float32 [2, 3, 5]");
  lse.shape[2] = 5;
  lse.dtype = DType::f16;
  CHECK(message() == "lse: expected float32 [2, 3, 5]");
  lse.dtype = DType::f32;
  lse.strides[1] = 8;
  CHECK(message() == "lse: must be contiguous");
  use_groups();
  lse = {lse_memory, DType::f32, {2, 12, 5}};
  CHECK(message() == "lse: expected float32 [2, 3, 4, 5]");
}

TEST_CASE_FIXTURE(Fixture, "empty tensors need neither memory nor strides") {
  query.shape[0] = key.shape[0] = value.shape[0] = output.shape[0] = lse.shape[0] = 0;
  query.data = key.data = value.data = nullptr;
  output.data = lse.data = nullptr;
  output.strides = lse.strides = {0, 0, 0, 1};
  CHECK(message() == "accepted");
}

TEST_CASE_FIXTURE(Fixture, "no queries, no keys and no heads are legal") {
  key.shape[1] = value.shape[1] = 0;
  CHECK(message() == "accepted");
  query.shape[1] = output.shape[1] = lse.shape[2] = 0;
  CHECK(message() == "accepted");
  query.shape[2] = key.shape[2] = value.shape[2] = output.shape[2] = lse.shape[1] = 0;
  CHECK(message() == "accepted");
}

TEST_CASE_FIXTURE(Fixture, "alignment is the widest that every row allows") {
  query.data = &memory[0][1];
  CHECK(run()->problem.align_bytes == 4);
  query.data = &memory[0][2];
  CHECK(run()->problem.align_bytes == 8);
}

// ---- Memory that is written ----

TEST_CASE_FIXTURE(Fixture, "an output whose elements share memory") {
  output.strides[1] = 0;
  CHECK(message() == "output: stride 0 on axis 1: its elements would share memory");
  output.strides = {60, 1, 4, 1};
  output.strides[0] = 12;
  CHECK(message() ==
        "output: shape [2, 5, 3, 4] with these strides has its elements share memory; allocate "
        "it contiguously");
}

TEST_CASE_FIXTURE(Fixture, "an output in the memory of an input") {
  output.data = memory[0];
  CHECK(message() == "output: shares memory with query; give it memory of its own");
  output.data = memory[1] + 330;  // the last row of key alone
  CHECK(message() == "output: shares memory with key; give it memory of its own");
  output.data = memory[1] + 336;  // right behind it
  CHECK(message() == "accepted");
  output.data = memory[3];
  lse.data = memory[3] + 119;
  CHECK(message() == "lse: shares memory with output; give it memory of its own");
  lse.data = memory[2];
  CHECK(message() == "lse: shares memory with value; give it memory of its own");
}

TEST_CASE_FIXTURE(Fixture, "an output between the rows of an input is no overlap") {
  // [2, 5, 3, 8 + 4]: queries and outputs take turns.
  query.strides = {180, 36, 12, 1};
  output = {memory[0] + 8, DType::f32, {2, 5, 3, 4}};
  output.strides = query.strides;
  CHECK(message() == "accepted");
  output.data = memory[0] + 7;
  CHECK(message() == "output: shares memory with query; give it memory of its own");
}

TEST_CASE("overlap is exact: every pair of small strided tensors against their sets of bytes") {
  alignas(64) static std::byte memory[4096];
  std::vector<TensorView> tensors;
  for (const std::int64_t offset : {0, 4, 6, 24}) {
    for (const std::int64_t row : {-8, -3, 2, 3, 5, 9}) {
      for (const std::int64_t column : {-2, 1, 2, 4}) {
        for (const DType dtype : {DType::f32, DType::f16}) {
          TensorView t{memory + 2048 + offset * 2, dtype, {3, 4}};
          t.strides = {row, column};
          tensors.push_back(t);
        }
      }
    }
  }
  const auto bytes_of = [](const TensorView& t) {
    std::vector<bool> bytes(sizeof memory);
    for (std::int64_t i = 0; i < t.shape[0]; ++i) {
      for (std::int64_t j = 0; j < t.shape[1]; ++j) {
        const auto* element = static_cast<const std::byte*>(t.data) +
                              (i * t.strides[0] + j * t.strides[1]) * item_bytes(t.dtype);
        std::fill_n(bytes.begin() + (element - memory), item_bytes(t.dtype), true);
      }
    }
    return bytes;
  };
  std::vector<std::vector<bool>> bytes;
  for (const TensorView& t : tensors) bytes.push_back(bytes_of(t));
  int overlapping = 0;
  for (std::size_t a = 0; a < tensors.size(); ++a) {
    for (std::size_t b = 0; b < tensors.size(); ++b) {
      bool share = false;
      for (std::size_t i = 0; i < sizeof memory; ++i) share = share || (bytes[a][i] && bytes[b][i]);
      const auto memory_of = [](const TensorView& t) {
        return *runtime::check_memory("t", t, runtime::LastStride::any);
      };
      const bool found = runtime::overlap(memory_of(tensors[a]), memory_of(tensors[b]));
      REQUIRE_MESSAGE(found == share, a, " and ", b);
      overlapping += found ? 1 : 0;
    }
  }
  CHECK(overlapping > 1000);
  CHECK(overlapping < static_cast<int>(tensors.size() * tensors.size()) - 1000);
}

// ---- Options ----

TEST_CASE_FIXTURE(Fixture, "scales that are not finite in float32") {
  for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity(), -1e39}) {
    options.scale = bad;
    CHECK(kind() == ErrorKind::invalid_argument);
    CHECK(message().find("expected a finite float32") != std::string::npos);
  }
  options.scale = -0.5;
  CHECK(run()->params.scale == -0.5f);
}

TEST_CASE_FIXTURE(Fixture, "dropout probabilities") {
  for (const double bad : {-0.1, 1.5}) {
    options.p = bad;
    CHECK(kind() == ErrorKind::invalid_argument);
  }
  CHECK(message() == "Invalid dropout probability: p=1.5, expected 0 to 1");
  options.p = std::nan("");
  CHECK(message() == "Invalid dropout probability: p=nan, expected 0 to 1");

  options = {.p = 0.25, .dropout = {.seed = 7, .offset = 9}};
  const auto call = run();
  REQUIRE(call.ok());
  CHECK(call->problem.dropout == kernel::Dropout::on);
  CHECK(call->params.dropout.threshold == 16384);
  CHECK(call->params.dropout.key[0] == kernel::make_dropout(0.25, 7, 9).key[0]);
  options.p = 1;
  CHECK(run()->params.dropout.threshold == 65536);
  for (const double none : {0.0, 1e-6}) {  // the second rounds to 0
    options.p = none;
    CHECK(run()->problem.dropout == kernel::Dropout::off);
  }
}

TEST_CASE_FIXTURE(Fixture, "families") {
  CHECK(run()->problem.families == codegen::Families::any);
  options.families = {Family::simt, Family::mma};
  CHECK(run()->problem.families ==
        (codegen::only(kernel::Family::mma) | codegen::only(kernel::Family::simt)));
  options.families = {Family::simt, Family::automatic};
  CHECK(run()->problem.families == codegen::Families::any);
  options.families = {static_cast<Family>(42)};
  CHECK(message() == "options: unknown family 42");
}

// ---- Biases ----

TEST_CASE_FIXTURE(Fixture, "windows") {
  bias.window = {Window::Anchor::bottom_right, 3, -1};
  CHECK(run()->problem.window_left == kernel::Edge::bounded);
  CHECK(run()->problem.window_right == kernel::Edge::open);
  bias.window.left = std::int64_t{1} << 40;
  CHECK(run()->params.reach.left == kernel::kMaxLength);
  bias.name = "MyMask";
  bias.window.anchor = static_cast<Window::Anchor>(5);
  CHECK(message() == "MyMask: unknown anchor 5");
}

TEST_CASE_FIXTURE(Fixture, "a bias tensor broadcasts, whatever its strides and type") {
  alignas(64) static float numbers[4096];
  const auto strides_with = [&](std::initializer_list<std::int64_t> shape) {
    bias = TensorView{numbers, DType::f32, shape};
    const auto call = run();
    REQUIRE_MESSAGE(call.ok(), call.failure().message);
    CHECK(call->problem.bias == kernel::Bias::f32);
    const kernel::BiasStrides& s = call->params.bias_strides;
    return std::vector<long long>{s.batch, s.group, s.head, s.query, s.key};
  };
  using Strides = std::vector<long long>;
  CHECK(strides_with({2, 3, 5, 7}) == Strides{105, 35, 35, 7, 1});
  CHECK(strides_with({1, 3, 5, 7}) == Strides{0, 35, 35, 7, 1});
  CHECK(strides_with({2, 1, 5, 7}) == Strides{35, 0, 0, 7, 1});
  CHECK(strides_with({2, 3, 1, 7}) == Strides{21, 7, 7, 0, 1});
  CHECK(strides_with({1, 1, 1, 7}) == Strides{0, 0, 0, 0, 1});
  CHECK(strides_with({2, 5, 7}) == Strides{35, 0, 0, 7, 1});
  CHECK(strides_with({1, 5, 7}) == Strides{0, 0, 0, 7, 1});
  CHECK(strides_with({5, 7}) == Strides{0, 0, 0, 7, 1});
  CHECK(strides_with({1, 7}) == Strides{0, 0, 0, 0, 1});

  bias.tensor->shape = {5, 7};
  bias.tensor->strides = {-1, 0};  // a row of one number for all keys, upside down
  CHECK(run()->params.bias_strides.query == -1);
  CHECK(run()->params.bias_strides.key == 0);
  for (const auto& [dtype, expected] : {std::pair{DType::f16, kernel::Bias::f16},
                                        {DType::bf16, kernel::Bias::bf16},
                                        {DType::boolean, kernel::Bias::boolean}}) {
    bias.tensor->dtype = dtype;
    CHECK(run()->problem.bias == expected);
  }
}

TEST_CASE_FIXTURE(Fixture, "a bias tensor's heads follow the query's groups") {
  alignas(64) static float numbers[4096];
  query = {memory[0], DType::f32, {2, 5, 6, 8}};
  output = {memory[3], DType::f32, {2, 5, 6, 4}};
  lse = {lse_memory, DType::f32, {2, 6, 5}};
  bias = TensorView{numbers, DType::f32, {2, 6, 5, 7}};
  CHECK(run()->params.bias_strides.group == 70);  // two heads of a group
  CHECK(run()->params.bias_strides.head == 35);

  use_groups();
  bias = TensorView{numbers, DType::f32, {2, 1, 4, 5, 7}};
  CHECK(run()->params.bias_strides.group == 0);
  CHECK(run()->params.bias_strides.head == 35);
  bias = TensorView{numbers, DType::f32, {2, 12, 5, 7}};
  CHECK(message() ==
        "attn_bias: shape [2, 12, 5, 7], expected [2 or 1, 3 or 1, 4 or 1, 5 or 1, 7], or the "
        "same without heads or without batch and heads");
}

TEST_CASE_FIXTURE(Fixture, "a bias tensor that does not fit") {
  static float numbers[4096];
  bias = TensorView{numbers, DType::f32, {2, 3, 5, 1}};
  CHECK(message() ==
        "attn_bias: shape [2, 3, 5, 1], expected [2 or 1, 3 or 1, 5 or 1, 7], or the same "
        "without heads or without batch and heads");
  for (const auto& shape :
       {std::initializer_list<std::int64_t>{3, 3, 5, 7}, {2, 2, 5, 7}, {2, 3, 4, 7}, {4, 7}}) {
    bias = TensorView{numbers, DType::f32, shape};
    CHECK(message().starts_with("attn_bias: shape ["));
  }
  for (const int rank : {-1, 1, 6}) {
    bias.tensor->rank = rank;
    CHECK(message().starts_with("attn_bias: rank " + std::to_string(rank) + ", expected [2 or 1, 3 or 1"));
  }
  bias = TensorView{numbers, DType::i32, {5, 7}};
  CHECK(message() == "attn_bias: dtype i32, expected f32, f16, bf16 or boolean");
  bias = TensorView{numbers, DType::f32, {5, 7}, {DeviceType::cuda, 0}};
  CHECK(message() == "query is on cpu but attn_bias is on cuda:0: all should be on the same device");
  bias = TensorView{nullptr, DType::f32, {5, 7}};
  CHECK(message() == "attn_bias: null data pointer");
  bias = TensorView{memory[3], DType::f32, {5, 7}};
  CHECK(message() == "output: shares memory with attn_bias; give it memory of its own");
}

// ---- Packed sequences ----

namespace {

/// Sequences of 2 and 3 queries with 4 and 2 of 8 key rows; each test spoils one table.
struct Packed : Fixture {
  std::vector<std::int32_t> q_starts{0, 2, 5};
  std::vector<std::int32_t> k_starts{0, 4};
  std::vector<std::int32_t> k_lens{4, 2};
  std::vector<std::int32_t> tables{0, 3, 1, 2};
  std::int64_t page_size = 0;
  std::int64_t key_rows = -1;
  std::int64_t count = 2;

  Packed() {
    query = {memory[0], DType::f32, {1, 5, 3, 8}};
    key = {memory[1], DType::f32, {1, 8, 3, 8}};
    value = {memory[2], DType::f32, {1, 8, 3, 4}};
    output = {memory[3], DType::f32, {1, 5, 3, 4}};
    lse = {lse_memory, DType::f32, {1, 3, 5}};
  }
  std::string message() {
    bias.name = "TestMask";
    Sequences sequences{.count = count, .q_starts = q_starts, .k_starts = k_starts};
    if (!k_lens.empty()) sequences.k_lens = Int32Table(k_lens);
    if (page_size > 0) {
      sequences.block_tables = Int32Table(tables);
      sequences.table_width = 2;
      sequences.page_size = page_size;
    }
    sequences.key_rows = key_rows;
    bias.sequences = std::make_shared<const Sequences>(std::move(sequences));
    return Fixture::message();
  }
};

}  // namespace

TEST_CASE_FIXTURE(Packed, "packed sequences are reduced to their tables") {
  REQUIRE(message() == "accepted");
  const auto call = run();
  CHECK(call->problem.blocks == kernel::Blocks::varlen);
  CHECK(call->problem.keys == kernel::Keys::contiguous);
  const kernel::Sequences& s = call->params.sequences;
  CHECK(s.count == 2);
  CHECK(s.q_start[2] == 5);
  CHECK(s.k_start[1] == 4);
  CHECK(s.k_len[1] == 2);
  k_lens.clear();
  k_starts = {0, 4, 8};
  REQUIRE(message() == "accepted");
  CHECK(run()->params.sequences.k_len == nullptr);
}

TEST_CASE_FIXTURE(Packed, "pages are reduced to their table") {
  page_size = 2;
  k_starts = {0, 1};
  REQUIRE(message() == "accepted");
  const auto call = run();
  CHECK(call->problem.keys == kernel::Keys::paged);
  const kernel::Sequences& s = call->params.sequences;
  CHECK(s.pages[1] == 3);
  CHECK(s.table_width == 2);
  CHECK(kernel::divide(7, s.page_size) == 3);
  CHECK(s.page_run == 1);
  k_starts = {0, 2};
  REQUIRE(message() == "accepted");
  CHECK(run()->params.sequences.page_run == 2);
}

TEST_CASE_FIXTURE(Packed, "a copy engine takes pages whose keys lie together by eights") {
  query = {memory[0], DType::f16, {1, 5, 3, 8}};
  key = value = {memory[1], DType::f16, {1, 48, 3, 8}};
  output = {memory[3], DType::f16, {1, 5, 3, 8}};
  tables = {0, 1, 0, 1};
  const auto boxes = [&](std::int64_t size, std::vector<std::int32_t> starts) {
    page_size = size;
    k_starts = std::move(starts);
    REQUIRE(message() == "accepted");
    return run()->problem.boxes;
  };
  CHECK(boxes(8, {0, 8}) == 1);
  CHECK(boxes(24, {16, 8}) == 1);
  CHECK(boxes(8, {0, 4}) == 0);
  CHECK(boxes(12, {0, 0}) == 0);
}

TEST_CASE_FIXTURE(Fixture, "what a copy engine takes is classed by its extent, but for sequences") {
  const auto extent = [&](DType dtype, std::int64_t batch, std::int64_t length) {
    query = {memory[0], dtype, {batch, length, 1, 8}};
    output = {memory[3], dtype, {batch, length, 1, 8}};
    key = value = {memory[1], dtype, {batch, 7, 1, 8}};
    return check({query, key, value, &output, nullptr, false, bias, options})->problem.extent;
  };
  using codegen::Extent;
  CHECK(extent(DType::bf16, 1, 5) == Extent::few_tiles);
  CHECK(extent(DType::bf16, 129, 5) == Extent::few_queries);
  CHECK(extent(DType::f32, 129, 5) == Extent::large);
  bias = BlockDiagonalMask::from_seqlens({5}, {7});
  CHECK(extent(DType::bf16, 1, 5) == Extent::large);
}

TEST_CASE_FIXTURE(Packed, "sequences lie on the sequence axis of a batch of one") {
  query = {memory[0], DType::f32, {2, 5, 3, 8}};
  key.shape[0] = value.shape[0] = 2;
  output = {memory[3], DType::f32, {2, 5, 3, 4}};
  lse = {lse_memory, DType::f32, {2, 3, 5}};
  CHECK(message() ==
        "TestMask: expected batch_size=1, got 2: query, key and value hold all sequences on the "
        "sequence axis; reshape them to [1, B * M, ...]");
}

TEST_CASE_FIXTURE(Packed, "query starts that do not add up") {
  q_starts = {0, 2, 4};
  CHECK(message() == "TestMask: the sequences have 4 rows together, but query has 5");
  q_starts = {1, 2, 5};
  CHECK(message() == "TestMask: q_starts[0] is 1, expected 0");
  q_starts = {0, 6, 5};
  CHECK(message() == "TestMask: q_starts[2] is 5, less than 6 before it");
  q_starts = {0, 5};
  CHECK(message() == "TestMask: q_starts has 2 entries, expected 3");
  q_starts = {0};
  k_starts = k_lens = {};
  count = 0;
  k_starts = {0};
  CHECK(message() == "TestMask: no sequences, but query has 5 rows");
  count = -1;
  CHECK(message() == "TestMask: -1 sequences, expected 0 to 2^29");
}

TEST_CASE_FIXTURE(Packed, "key starts and lengths outside the key rows") {
  k_lens = {4, 5};
  CHECK(message() == "TestMask: sequence 1 has 5 keys from 4 on, outside the 8 rows of key");
  k_lens = {4, -1};
  CHECK(message() == "TestMask: sequence 1 has -1 keys from 4 on, outside the 8 rows of key");
  k_lens = {4, 2};
  k_starts = {-1, 4};
  CHECK(message() == "TestMask: sequence 0 has 4 keys from -1 on, outside the 8 rows of key");
  k_starts = {0};
  CHECK(message() == "TestMask: k_starts has 1 entries, expected 2");
  k_starts = {0, 4};
  k_lens = {4};
  CHECK(message() == "TestMask: k_lens has 1 entries, expected 2");
  k_lens = {};
  CHECK(message() == "TestMask: k_starts has 2 entries, expected 3");
  k_starts = {0, 4, 7};
  CHECK(message() == "TestMask: the sequences have 7 rows together, but key has 8");
  k_starts = {0, 4, 8};
  key_rows = 9;
  CHECK(message() == "TestMask: key and value have 8 rows, expected 9");
}

TEST_CASE_FIXTURE(Packed, "pages outside the key tensor, where they are used") {
  page_size = 2;
  k_starts = {0, 0};
  tables = {0, 4, 1, 2};
  CHECK(message() == "TestMask: block_tables[0, 1] is page 4, but key has 4 pages of 2 rows");
  tables = {0, 3, -1, 2};
  CHECK(message() == "TestMask: block_tables[1, 0] is page -1, but key has 4 pages of 2 rows");
  tables = {0, 3, 1, 99};  // the second sequence's two keys are on its first page
  CHECK(message() == "accepted");
  k_lens = {4, 5};
  CHECK(message() == "TestMask: sequence 1 has 5 keys from 0 on, outside the 4 of its row of pages");
  k_lens = {4, 2};
  tables = {0, 3, 1};
  CHECK(message() == "TestMask: block_tables has 3 entries, expected 4");
  tables = {0, 3, 1, 2};
  page_size = 3;
  CHECK(message() == "TestMask: key and value have 8 rows, expected whole pages of 3");
  page_size = std::int64_t{1} << 29;
  CHECK(message() == "TestMask: 2 pages of 536870912 keys for each sequence, the limit is 2^29 keys");
  page_size = std::int64_t{1} << 30;
  CHECK(message() == "TestMask: page_size 1073741824, expected 1 to 2^29");
}

TEST_CASE_FIXTURE(Packed, "without key rows no page is looked up") {
  page_size = 2;
  k_starts = {0, 0};
  k_lens = {0, 0};
  key.shape[1] = value.shape[1] = 0;
  REQUIRE(message() == "accepted");
  CHECK(run()->params.sequences.table_width == 0);
}

TEST_CASE_FIXTURE(Packed, "tables on another device alone") {
  static const std::int32_t numbers[3] = {};
  REQUIRE(message() == "accepted");
  auto sequences = std::make_shared<Sequences>(*bias.sequences);
  sequences->q_starts = Int32Table(TensorView{numbers, DType::i32, {3}, {DeviceType::cuda, 0}});
  bias.sequences = sequences;
  CHECK(kind() == ErrorKind::invalid_argument);
  CHECK(Fixture::message().find("is on cuda:0") != std::string::npos);
  // Where nothing runs, nothing is looked at.
  CHECK(check({query, key, value, nullptr, nullptr, false, bias, options}).ok());
}

TEST_CASE_FIXTURE(Packed, "a bias tensor beside sequences has all query rows and all key rows") {
  static float numbers[4096];
  bias = TensorView{numbers, DType::f32, {1, 3, 5, 8}};
  CHECK(message() == "accepted");
  bias = TensorView{numbers, DType::f32, {1, 3, 5, 7}};
  CHECK(message().starts_with("attn_bias: shape [1, 3, 5, 7], expected [1 or 1, 3 or 1, 5 or 1, 8]"));
}

TEST_CASE_FIXTURE(Packed, "arguments at random are refused with a reason or reduced within bounds") {
  static float numbers[4096];
  std::mt19937_64 random(1);
  const auto odd_number = [&]() -> std::int64_t {
    constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
    constexpr std::int64_t kOdd[] = {
        0, 1, 2, 3, 5, 7, 8, -1, -1000, 1LL << 29, 1 << 30, 1LL << 31, kMost, kMost / 3, -kMost, -kMost - 1};
    return kOdd[random() % std::size(kOdd)];
  };
  const auto spoil = [&](auto& tensor) {
    const auto axis = random() % kMaxRank;
    switch (random() % 6) {
      case 0: tensor.rank = static_cast<int>(odd_number()); break;
      case 1: tensor.dtype = static_cast<DType>(random() % 8); break;
      case 2: tensor.shape[axis] = odd_number(); break;
      case 3: tensor.strides[axis] = odd_number(); break;
      case 4: tensor.device.index = static_cast<int>(odd_number()); break;
      default: tensor.data = numbers + random() % 64; break;
    }
  };
  int accepted = 0;
  for (int round = 0; round < 20'000; ++round) {
    Packed one;
    one.bias = TensorView{numbers, DType::f32, {1, 3, 5, 8}};
    one.page_size = random() % 3 == 0 ? odd_number() : 0;
    one.count = random() % 9 == 0 ? odd_number() : 2;
    if (random() % 4 == 0) one.q_starts[random() % 3] = static_cast<std::int32_t>(odd_number());
    if (random() % 4 == 0) one.k_lens[random() % 2] = static_cast<std::int32_t>(odd_number());
    if (random() % 4 == 0) one.tables[random() % 4] = static_cast<std::int32_t>(odd_number());
    if (random() % 4 == 0) one.bias.window = {Window::Anchor::bottom_right, odd_number(), odd_number()};
    switch (random() % 7) {
      case 0: spoil(one.query); break;
      case 1: spoil(one.key); break;
      case 2: spoil(one.value); break;
      case 3: spoil(one.output); break;
      case 4: spoil(one.lse); break;
      case 5: spoil(*one.bias.tensor); break;
      default: break;
    }
    const std::string told = one.message();
    REQUIRE_FALSE(told.empty());
    if (told != "accepted") continue;
    ++accepted;
    const auto call = one.run();
    CHECK(call->params.len_q == 5);
    CHECK(call->params.groups * call->params.heads == 3);
    CHECK(call->params.reach.left <= kernel::kMaxLength);
  }
  CHECK(accepted > 1000);
}

// ---- Merges ----

namespace {

/// Three chunks of [2, 5, 3, 8]; each test spoils one thing.
struct Merge {
  alignas(64) float memory[4][256] = {};
  alignas(64) float lse_memory[4][64] = {};
  std::vector<TensorView> attn;
  std::vector<TensorView> lse;
  MutableTensorView output{memory[3], DType::f32, {2, 5, 3, 8}};
  MutableTensorView lse_out{lse_memory[3], DType::f32, {2, 3, 5}};

  Merge() {
    for (int i = 0; i < 3; ++i) {
      attn.emplace_back(memory[i], DType::f32, std::initializer_list<std::int64_t>{2, 5, 3, 8});
      lse.emplace_back(lse_memory[i], DType::f32, std::initializer_list<std::int64_t>{2, 3, 5});
    }
  }
  Result<runtime::MergeCall> run() const { return runtime::check_merge({attn, lse, &output, &lse_out}); }
  std::string message() const {
    const auto call = run();
    return call.ok() ? "accepted" : call.failure().message;
  }
};

}  // namespace

TEST_CASE_FIXTURE(Merge, "a merge is reduced to its problem and parameters") {
  attn[1].strides = {8, 48, 16, 1};
  lse[1] = {lse_memory[1], DType::f32, {2, 3, 7}};  // padded
  const auto call = run();
  REQUIRE(call.ok());
  CHECK(call->problem ==
        codegen::Problem{.operation = kernel::Operation::merge, .head_dim_v = 8, .lse = kernel::Lse::write});
  const kernel::MergeParams& p = call->params;
  CHECK(p.chunks == 3);
  CHECK(p.batch == 2);
  CHECK(p.groups == 3);
  CHECK(p.heads == 1);
  CHECK(p.len == 5);
  CHECK(p.chunk[1].output_strides.seq == 48);
  CHECK(p.chunk[1].output_strides.group == 16);
  CHECK(p.chunk[1].lse_strides.batch == 21);
  CHECK(p.chunk[1].lse_strides.group == 7);
  CHECK(p.chunk[1].lse_strides.seq == 1);
  CHECK(p.output == memory[3]);
  CHECK(p.lse == lse_memory[3]);
}

TEST_CASE_FIXTURE(Merge, "chunks with groups, and chunks of one head") {
  for (auto& one : attn) one = {one.data, DType::f32, {2, 5, 3, 2, 4}};
  for (auto& one : lse) one = {one.data, DType::f32, {2, 3, 2, 5}};
  output = {memory[3], DType::f32, {2, 5, 3, 2, 4}};
  lse_out = {lse_memory[3], DType::f32, {2, 3, 2, 5}};
  REQUIRE(message() == "accepted");
  CHECK(run()->params.heads == 2);
  CHECK(run()->params.chunk[0].lse_strides.head == 5);
  for (auto& one : attn) one = {one.data, DType::f32, {2, 5, 8}};
  for (auto& one : lse) one = {one.data, DType::f32, {2, 1, 5}};
  output = {memory[3], DType::f32, {2, 5, 8}};
  lse_out = {lse_memory[3], DType::f32, {2, 1, 5}};
  REQUIRE(message() == "accepted");
  CHECK(run()->params.groups == 1);
}

TEST_CASE_FIXTURE(Merge, "counts of chunks") {
  lse.pop_back();
  CHECK(message() ==
        "merge_attentions: 3 attention chunks and 2 lse chunks, expected equally many, at least one");
  attn.clear();
  lse.clear();
  CHECK(message() ==
        "merge_attentions: 0 attention chunks and 0 lse chunks, expected equally many, at least one");
}

TEST_CASE_FIXTURE(Merge, "chunks that differ") {
  attn[2].shape[1] = 4;
  CHECK(message() ==
        "attn[0] has shape [2, 5, 3, 8] but attn[2] has [2, 4, 3, 8]: all should have the same shape");
  attn[2].shape[1] = 5;
  attn[1].dtype = DType::f16;
  CHECK(message() == "attn[0] is f32 but attn[1] is f16: all should have the same dtype");
  attn[1].dtype = DType::f32;
  attn[1].device = {DeviceType::cuda, 0};
  CHECK(message() == "attn[0] is on cpu but attn[1] is on cuda:0: all should be on the same device");
  attn[1].device = {};
  attn[1].rank = 7;
  CHECK(message() == "attn[1]: rank 7, expected [B, M, H, K], [B, M, K] or [B, M, G, H, K]");
  attn[1].rank = 4;
  attn[1].data = nullptr;
  CHECK(message() == "attn[1]: null data pointer");
}

TEST_CASE_FIXTURE(Merge, "lse chunks") {
  lse[1].shape[2] = 4;
  CHECK(message() ==
        "lse[1]: shape [2, 3, 4], expected [2, 3, 5] for attn [2, 5, 3, 8]; the last extent may "
        "be larger");
  lse[1].rank = 9;
  CHECK(message().starts_with("lse[1]: rank 9, expected [2, 3, 5]"));
  lse[1] = lse[0];
  lse[2].dtype = DType::f16;
  CHECK(message() == "lse[2] is f16, expected f32");
  lse[2] = lse[0];
  lse[2].device = {DeviceType::cuda, 0};
  CHECK(message() == "attn[0] is on cpu but lse[2] is on cuda:0: all should be on the same device");
}

TEST_CASE_FIXTURE(Merge, "what a merge writes") {
  output.shape[1] = 4;
  CHECK(message() == "output: shape [2, 4, 3, 8], expected [2, 5, 3, 8], that of attn");
  output.shape[1] = 5;
  output.data = memory[1];
  CHECK(message() == "output: shares memory with attn[1]; give it memory of its own");
  output.data = memory[3];
  lse_out.data = lse_memory[2] + 1;
  CHECK(message() == "lse_out: shares memory with lse[2]; give it memory of its own");
  lse_out.data = lse_memory[3];
  lse_out.shape[2] = 6;
  CHECK(message() == "lse_out: expected float32 [2, 3, 5]");
}
