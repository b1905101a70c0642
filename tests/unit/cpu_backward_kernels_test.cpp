// The CPU kernels of the backward pass on their own, as the backend calls them, against the formulas of
// attune/backward.h in float64. What lies around inputs is NaN, what lies around results is watched, and
// nothing past the end of an input can be read.
#include "attune/backward.h"
#include "codegen/names.h"
#include "tests/support/random.h"
#include "tests/unit/cpu_kernels.h"
#include "tests/unit/plain_backward.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

using namespace attune;
using namespace attune::kernel;
using namespace attune::test;
using codegen::Problem;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kUntouched = -123;  // exact in every type

/// What an element of a result should be, and the sum of the magnitudes of what it was added up from.
struct Expected {
  double value = 0;
  double magnitude = 0;
  bool written = false;

  void add(double x, double size) {
    value += x;
    magnitude += size;
  }
};

class CheckedBackward : public PlainBackward {
 public:
  using PlainBackward::PlainBackward;

  /// Runs every kernel and compares.
  void check(const codegen::Arch& arch) {
    const AtTheEnd query(query_.data(), query_.bytes()), key(key_.data(), key_.bytes()),
        value(value_.data(), value_.bytes()), output(output_.data(), output_.bytes()),
        grad_output(grad_output_.data(), grad_output_.bytes()), bias(bias_.data(), bias_.bytes()),
        lse(lse_.data(), lse_.size() * sizeof(float));
    p().query = query.data();
    p().key = key.data();
    p().value = value.data();
    p().output = const_cast<void*>(output.data());
    p().bias = bias.data();
    params_.grad_output = grad_output.data();
    params_.lse.data = static_cast<const float*>(lse.data());
    run_delta(arch);
    check_query(arch);
    check_key_value(arch, s_.keys, true, !differ());
    if (differ()) check_key_value(arch, s_.values, false, true);
    if (problem().bias != Bias::none && problem().bias != Bias::boolean) check_bias(arch);
  }

 private:
  /// Are key's and value's gradients of different shapes?
  bool differ() const { return s_.keys.group != s_.values.group || s_.keys.head != s_.values.head; }
  void run(Operation operation, const codegen::Arch& arch, const BackwardParams& params) {
    Problem wanted = problem();
    wanted.operation = operation;
    REQUIRE(kernel_of(wanted, arch).backward(params, nullptr).ok());
  }
  void run_delta(const codegen::Arch& arch);
  BackwardParams after_delta();
  void check_query(const codegen::Arch& arch);
  void check_key_value(const codegen::Arch& arch, Shared shared, bool key, bool value);
  void check_bias(const codegen::Arch& arch);

  std::vector<float> lse2_, delta_;
  std::optional<Tensor> copy_;
};

/// How many elements are not what they should be: those that are not written are untouched.
int wrong_elements(const Tensor& actual, const std::vector<Expected>& expected) {
  const double ulp = actual.dtype() == DType::f32 ? 0 : actual.dtype() == DType::f16 ? 0x1p-11 : 0x1p-8;
  constexpr double kFloatError = 1e-5;   // of the sums in float32, and of the exponential
  constexpr double kSmallest = 0x1p-24;  // of float16
  int wrong = 0;
  for (i64 at = 0; at < actual.count(); ++at) {
    const Expected& e = expected[at];
    if (std::isnan(e.value)) continue;
    const double bound =
        e.written ? ulp * std::abs(e.value) + kFloatError * e.magnitude + (ulp == 0 ? 0 : kSmallest) : 0;
    const double distance = std::abs(actual.get(at) - (e.written ? e.value : kUntouched));
    wrong += !(distance <= bound);
  }
  return wrong;
}

void CheckedBackward::run_delta(const codegen::Arch& arch) {
  BackwardParams params = params_;
  const int numbers = s_.batch * s_.groups * s_.heads * s_.len_q;
  lse2_.resize(numbers);
  delta_.resize(numbers);
  params_.lse2 = params.lse2 = lse2_.data();
  params_.delta = params.delta = delta_.data();
  if (copies()) {
    copy_.emplace(problem().dtype, i64{s_.batch} * s_.len_q * s_.groups * s_.heads * problem().head_dim_v,
                  kNan);
    params.grad_output_copy = copy_->data();
  }
  run(Operation::delta, arch, params);
}

/// What the kernels after delta are told.
BackwardParams CheckedBackward::after_delta() {
  BackwardParams params = params_;
  if (!copies()) return params;
  const i64 dim = problem().head_dim_v, row = dim * s_.heads * s_.groups;
  params.grad_output = copy_->data();
  params.grad_output_strides = {.batch = row * s_.len_q, .seq = row, .group = dim * s_.heads, .head = dim};
  params.grad_output_column = 1;
  return params;
}

void CheckedBackward::check_query(const codegen::Arch& arch) {
  BackwardParams params = after_delta();
  params.grad_query_strides = p().query_strides;
  Tensor result(problem().dtype, query_.count(), kUntouched);
  params.grad_query = result.data();
  std::vector<Expected> expected(result.count());
  for_each_query([&](const PlainBlock& block, int group, int head, int i) {
    const i64 row = at(params.grad_query_strides, block, block.q_begin + i, group, head);
    for (int c = 0; c < problem().head_dim; ++c) expected[row + c].written = true;
    for (const Pair& pair : pairs_of(block, group, head, i)) {
      const i64 key = at(p().key_strides, block, block.key_rows[pair.j], group, head);
      for (int c = 0; c < problem().head_dim; ++c) {
        const double factor = s_.scale * key_.get(key + c);
        expected[row + c].add(pair.grad_score * factor, std::abs(pair.magnitude * factor));
      }
    }
  });
  run(Operation::grad_query, arch, params);
  CHECK(wrong_elements(result, expected) == 0);
}

void CheckedBackward::check_key_value(const codegen::Arch& arch, Shared shared, bool key, bool value) {
  BackwardParams params = after_delta();
  params.key_groups = shared.group ? 1 : s_.groups;
  params.key_heads = shared.head ? 1 : s_.heads;
  params.grad_key_strides = strides_of(s_, s_.len_k, problem().head_dim, shared);
  params.grad_value_strides = strides_of(s_, s_.len_k, problem().head_dim_v, shared);
  const auto result_like = [&](const Strides& strides, int dim) {
    return Tensor(problem().dtype,
                  (s_.batch - 1) * strides.batch + (s_.len_k - 1) * strides.seq +
                      (params.key_groups - 1) * strides.group + (params.key_heads - 1) * strides.head + dim,
                  kUntouched);
  };
  Tensor grad_key = result_like(params.grad_key_strides, problem().head_dim);
  Tensor grad_value = result_like(params.grad_value_strides, problem().head_dim_v);
  std::vector<Expected> expected_key(grad_key.count()), expected_value(grad_value.count());
  // Every row is written, whether a key or none.
  for (int b = 0; b < s_.batch; ++b) {
    for (int row = 0; row < s_.len_k; ++row) {
      for (int group = 0; group < params.key_groups; ++group) {
        for (int head = 0; head < params.key_heads; ++head) {
          const PlainBlock block{b, b, 0, 0, {}};
          for (int c = 0; c < problem().head_dim && key; ++c)
            expected_key[at(params.grad_key_strides, block, row, group, head) + c].written = true;
          for (int c = 0; c < problem().head_dim_v && value; ++c)
            expected_value[at(params.grad_value_strides, block, row, group, head) + c].written = true;
        }
      }
    }
  }
  for_each_query([&](const PlainBlock& block, int group, int head, int i) {
    const i64 query = at(p().query_strides, block, block.q_begin + i, group, head);
    for (const Pair& pair : pairs_of(block, group, head, i)) {
      const int row = block.key_rows[pair.j];
      const i64 key_at = at(params.grad_key_strides, block, row, group, head);
      const i64 value_at = at(params.grad_value_strides, block, row, group, head);
      for (int c = 0; c < problem().head_dim; ++c) {
        const double factor = s_.scale * query_.get(query + c);
        expected_key[key_at + c].add(pair.grad_score * factor, std::abs(pair.magnitude * factor));
      }
      for (int c = 0; c < problem().head_dim_v; ++c) {
        const double product = pair.weight * grad_output(block, group, head, i, c);
        expected_value[value_at + c].add(product, std::abs(product));
      }
    }
  });
  params.grad_key = key ? grad_key.data() : nullptr;
  params.grad_value = value ? grad_value.data() : nullptr;
  run(Operation::grad_key_value, arch, params);
  CHECK(wrong_elements(grad_key, expected_key) == 0);
  CHECK(wrong_elements(grad_value, expected_value) == 0);
}

void CheckedBackward::check_bias(const codegen::Arch& arch) {
  BackwardParams params = after_delta();
  params.bias_batch = s_.bias.batch ? 1 : s_.batch;
  params.bias_groups = s_.bias.group ? 1 : s_.groups;
  params.bias_heads = s_.bias.head ? 1 : s_.heads;
  params.bias_rows = s_.bias.query ? 1 : s_.len_q;
  params.grad_bias_strides = p().bias_strides;
  const BiasStrides& strides = params.grad_bias_strides;
  Tensor result(bias_.dtype(), bias_.count(), kUntouched);
  params.grad_bias = result.data();
  std::vector<Expected> expected(result.count());
  for (int b = 0; b < params.bias_batch; ++b) {
    for (int head = 0; head < params.bias_groups * params.bias_heads; ++head) {
      for (int i = 0; i < params.bias_rows; ++i) {
        for (int j = 0; j < s_.len_k; ++j) {
          expected[b * strides.batch + head / params.bias_heads * strides.group +
                   head % params.bias_heads * strides.head + i * strides.query + j * strides.key]
              .written = true;
        }
      }
    }
  }
  for_each_query([&](const PlainBlock& block, int group, int head, int i) {
    for (const Pair& pair : pairs_of(block, group, head, i))
      expected[bias_at(strides, block, group, head, i, pair.j)].add(pair.grad_score, pair.magnitude);
  });
  run(Operation::grad_bias, arch, params);
  CHECK(wrong_elements(result, expected) == 0);
}

void check(const Setup& setup) {
  on_every_isa([&](const codegen::Arch& arch) {
    Random random(test::test_seed());
    CheckedBackward(setup, random).check(arch);
  });
}

/// Sequences with rows of nobody between them, without queries, without keys; keys that overlap.
Setup gappy(const Problem& problem) {
  Setup s{.problem = problem, .groups = 2, .heads = 2, .len_q = 190, .len_k = 270};
  s.problem.blocks = Blocks::varlen;
  s.q_start = {3, 60, 60, 161, 170, 180};
  s.k_start = {2, 40, 57, 101, 269};
  s.k_len = {55, 30, 131, 0, 1};
  return s;
}

/// Sequences that share pages, in any order; some pages and parts of pages are nobody's.
Setup paged(const Problem& problem) {
  Setup s{.problem = problem, .heads = 2, .len_q = 90, .len_k = 130};
  s.problem.blocks = Blocks::varlen;
  s.problem.keys = Keys::paged;
  s.page_size = 10;
  s.q_start = {0, 50, 51, 90};
  s.k_start = {3, 0, 1};
  s.k_len = {57, 12, 38};
  s.pages = {12, 3, 0, 7, 1, 9, 1000, 3, 5, 1000, 1000, 1000, 1000, 1000, 2, 3, 0, 4, 1000, 1000, 1000};
  return s;
}

}  // namespace

TEST_CASE("head dims from 1 to 512, in every pair") {
  for (const auto& [k, v, dtype] : {std::tuple{1, 1, DType::f32},
                                    {7, 19, DType::f32},
                                    {257, 5, DType::f32},
                                    {20, 300, DType::bf16},
                                    {512, 512, DType::f16}}) {
    CAPTURE(k);
    CAPTURE(v);
    check({.problem = {.dtype = dtype, .output_dtype = dtype, .head_dim = k, .head_dim_v = v},
           .batch = 2,
           .len_q = 101,
           .len_k = 131,
           .scale = 1 / std::sqrt(static_cast<float>(k))});
  }
}

TEST_CASE("windows, with queries that see nothing and keys that nobody sees") {
  const Problem plain{.head_dim = 24, .head_dim_v = 24};
  Problem right = plain, both = plain;
  right.window_right = both.window_right = both.window_left = Edge::bounded;
  check({.problem = right, .len_q = 150, .len_k = 97, .anchor = Anchor::bottom_right, .right = 0});
  check({.problem = right, .len_q = 97, .len_k = 300, .anchor = Anchor::top_left, .right = 5});
  check(
      {.problem = both, .len_q = 270, .len_k = 200, .anchor = Anchor::bottom_right, .left = 20, .right = 3});
  check({.problem = both, .len_q = 300, .len_k = 140, .anchor = Anchor::top_left, .left = 0, .right = 90});
  check({.problem = both, .len_q = 1, .len_k = 200, .anchor = Anchor::top_left, .left = 9, .right = 70});
}

TEST_CASE("sequences among others") {
  check(gappy({.head_dim = 21, .head_dim_v = 33}));
  Setup s = gappy({.dtype = DType::bf16,
                   .output_dtype = DType::bf16,
                   .head_dim = 21,
                   .head_dim_v = 9,
                   .window_right = Edge::bounded,
                   .bias = Bias::f32,
                   .dropout = Dropout::on});
  s.anchor = Anchor::bottom_right;
  s.right = 5;
  s.drops = 0.25;
  s.keys.head = s.values.head = true;
  check(s);
  s.padded_lse = true;
  s.bias.query = s.bias.head = true;
  check(s);
}

TEST_CASE("what is NaN in a sequence stays in it") {
  Setup s = gappy({.head_dim = 21, .head_dim_v = 33, .bias = Bias::f32});
  s.nan_block = 2;
  check(s);
}

TEST_CASE("pages, some of them shared") {
  Setup s = paged({.head_dim = 33,
                   .head_dim_v = 17,
                   .window_left = Edge::bounded,
                   .window_right = Edge::bounded,
                   .bias = Bias::f16,
                   .dropout = Dropout::on});
  s.anchor = Anchor::bottom_right;
  s.left = 30;
  s.right = 2;
  s.drops = 0.4;
  check(s);
  s.bias.query = true;
  s.keys.head = true;  // but not the values
  check(s);
}

TEST_CASE("a bias of any type, shared by anything") {
  for (const Bias kind : {Bias::f32, Bias::bf16, Bias::boolean}) {
    CAPTURE(codegen::name_of(kind));
    const Setup s{.problem = {.head_dim = 16, .head_dim_v = 16, .bias = kind},
                  .batch = 2,
                  .groups = 2,
                  .heads = 3,
                  .len_q = 61,
                  .len_k = 77};
    for (const Shared& shared : {Shared{},
                                 {.batch = true},
                                 {.group = true},
                                 {.head = true, .query = true},
                                 {true, true, true, true}}) {
      Setup other = s;
      other.bias = shared;
      check(other);
    }
    Setup other = s;
    other.bias_columns_apart = true;
    check(other);
  }
}

TEST_CASE("dropout of dense problems") {
  Setup s{.problem = {.head_dim = 40, .head_dim_v = 24, .dropout = Dropout::on},
          .batch = 2,
          .groups = 1,
          .heads = 2,
          .len_q = 133,
          .len_k = 150};
  for (const double drops : {0.0, 0.3, 1.0}) {
    CAPTURE(drops);
    s.drops = drops;
    check(s);
  }
}

TEST_CASE("heads share keys, values or both") {
  Setup s{.problem = {.head_dim = 24, .head_dim_v = 40},
          .batch = 2,
          .groups = 2,
          .heads = 3,
          .len_q = 55,
          .len_k = 66};
  for (const auto& [keys, values] :
       {std::pair{Shared{.head = true}, Shared{.head = true}},
        {Shared{.group = true, .head = true}, Shared{.group = true, .head = true}},
        {Shared{.group = true}, Shared{.head = true}},
        {Shared{}, Shared{.group = true, .head = true}}}) {
    s.keys = keys;
    s.values = values;
    check(s);
  }
}

TEST_CASE("a gradient of any strides and another type than the inputs") {
  Setup s{.problem = {.dtype = DType::f16, .output_dtype = DType::f32, .head_dim = 24, .head_dim_v = 40},
          .batch = 2,
          .heads = 3,
          .len_q = 55,
          .len_k = 66};
  check(s);
  s.grad_column = 7;
  check(s);
  s.problem.dtype = DType::f32;
  check(s);
}
