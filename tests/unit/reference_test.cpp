// The yardsticks themselves: the float64 reference against values worked out by hand and against another way
// to the same sum; the plain implementation, the tolerance and the guards against what they must notice.
#include "tools/reference/reference.h"

#include "tests/support/cases.h"
#include "tools/reference/element.h"
#include "tools/reference/mask.h"
#include "tools/reference/plain.h"
#include "tools/reference/tolerance.h"

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <limits>
#include <numeric>

using namespace attune;
using namespace attune::reference;
using namespace attune::test;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

/// One batch, one head, float32: query 2 x 2, key 3 x 2, value 3 x 1.
struct Small {
  std::array<float, 4> query{1, 0, 0, 1};
  std::array<float, 6> key{0, 0, 1, 2, 2, 1};
  std::array<float, 3> value{1, 10, 100};

  Inputs inputs(AttentionBias bias = {}, std::optional<double> scale = 1.0) const {
    return {.query = {query.data(), DType::f32, {1, 2, 1, 2}},
            .key = {key.data(), DType::f32, {1, 3, 1, 2}},
            .value = {value.data(), DType::f32, {1, 3, 1, 1}},
            .bias = bias,
            .scale = scale};
  }
};

std::vector<double> sum_by_pairs(const Inputs& inputs) {
  // exp(s) without subtracting a maximum, one output element at a time, by index instead of by pointer.
  const Extents e = extents_of(inputs);
  const std::vector<float> q = dense(inputs.query), k = dense(inputs.key), v = dense(inputs.value);
  const Mask mask = mask_of(inputs.bias, e.len_q, e.len_k);
  const auto at = [](const std::vector<float>& x, int len, int heads, int dim, int b, int m, int h, int d) {
    return double{x[((std::size_t(b) * len + m) * heads + h) * dim + d]};
  };
  std::vector<double> output;
  for (int b = 0; b < e.batch; ++b) {
    for (int i = 0; i < e.len_q; ++i) {
      for (int h = 0; h < e.heads; ++h) {
        for (int d = 0; d < e.head_dim_v; ++d) {
          double over = 0, under = 0;
          for (int j = 0; j < e.len_k; ++j) {
            double dot = 0;
            for (int c = 0; c < e.head_dim; ++c) {
              dot += at(q, e.len_q, e.heads, e.head_dim, b, i, h, c) *
                     at(k, e.len_k, e.heads, e.head_dim, b, j, h, c);
            }
            const double weight = mask.visible(i, j) ? std::exp(dot * scale_of(inputs)) : 0.0;
            over += weight * at(v, e.len_k, e.heads, e.head_dim_v, b, j, h, d);
            under += weight;
          }
          output.push_back(under > 0 ? over / under : 0.0);
        }
      }
    }
  }
  return output;
}

}  // namespace

TEST_CASE("the reference equals attention worked out by hand") {
  // Scores: query 0 has 0, 1, 2 and query 1 has 0, 2, 1.
  const double e1 = std::exp(1.0), e2 = std::exp(2.0), sum = 1 + e1 + e2;
  const Values values = reference_attention(Small{}.inputs());
  CHECK(values.output[0] == doctest::Approx((1 + 10 * e1 + 100 * e2) / sum).epsilon(1e-14));
  CHECK(values.output[1] == doctest::Approx((1 + 10 * e2 + 100 * e1) / sum).epsilon(1e-14));
  CHECK(values.lse[0] == doctest::Approx(std::log(sum)).epsilon(1e-14));
  CHECK(values.lse[1] == doctest::Approx(std::log(sum)).epsilon(1e-14));
  CHECK(values.largest_score == 2);
}

TEST_CASE("the reference hides what the mask hides") {
  const Values causal = reference_attention(Small{}.inputs(LowerTriangularMask{}));
  CHECK(causal.output[0] == 1);  // only key 0
  CHECK(causal.output[1] == doctest::Approx((1 + 10 * std::exp(2.0)) / (1 + std::exp(2.0))).epsilon(1e-14));
  CHECK(causal.lse[0] == 0);

  const Values diagonal = reference_attention(Small{}.inputs(LocalAttentionFromBottomRightMask{0, 0}));
  CHECK(diagonal.output == std::vector<double>{10, 100});
  CHECK(diagonal.lse == std::vector<double>{1, 1});
}

TEST_CASE("a query without a key has output 0 and lse -inf") {
  Small small;
  Inputs inputs = small.inputs(LowerTriangularFromBottomRightMask{});
  inputs.key = {small.key.data(), DType::f32, {1, 1, 1, 2}};
  inputs.value = {small.value.data(), DType::f32, {1, 1, 1, 1}};
  for (const Values& values : {reference_attention(inputs), plain_attention(inputs)}) {
    CHECK(values.output == std::vector<double>{0, 1});
    CHECK(values.lse == std::vector<double>{-kInf, 0});
  }
  inputs.key.shape[1] = inputs.value.shape[1] = 0;
  CHECK(reference_attention(inputs).lse == std::vector<double>{-kInf, -kInf});
  inputs.query.shape[1] = 0;
  CHECK(reference_attention(inputs).output.empty());
}

TEST_CASE("the default scale is head_dim ** -0.5") {
  CHECK(scale_of(Small{}.inputs({}, std::nullopt)) == doctest::Approx(1 / std::sqrt(2.0)).epsilon(1e-15));
  CHECK(scale_of(Small{}.inputs({}, -0.25)) == -0.25);
}

TEST_CASE("the reference equals a straightforward sum, in any layout") {
  Random random(test_seed());
  const DType dtypes[] = {DType::f32, DType::f16, DType::bf16};
  for (const KernelClass& one : random_classes(random, 24, dtypes)) {
    KernelClass tiny = one;
    tiny.head_dim = one.head_dim % 7 + 1;
    tiny.head_dim_v = one.head_dim_v % 5 + 1;
    AttentionCase drawn = random_case(random, tiny);
    // The sum without a maximum overflows for wide scores; keep them small.
    drawn.scale = 0.05;
    CAPTURE(drawn.name);
    const std::vector<double> reference = reference_attention(drawn.inputs()).output;
    const std::vector<double> sum = sum_by_pairs(drawn.inputs());
    REQUIRE(reference.size() == sum.size());
    const double magnitude = largest_magnitude(drawn.value.values());
    for (std::size_t i = 0; i < sum.size(); ++i)
      REQUIRE(std::abs(reference[i] - sum[i]) <= 1e-12 * magnitude);
  }
}

TEST_CASE("the plain implementation rounds where an eager framework does") {
  Small small;
  CHECK(plain_attention(small.inputs()).output[0] ==
        doctest::Approx(reference_attention(small.inputs()).output[0]).epsilon(1e-6));

  // scale * query = 1 + 2^-9 lies between the bfloat16 numbers 1 and 1 + 2^-7 and rounds to 1.
  const std::array<kernel::u16, 1> one{kernel::float_to_bf16(1.0f)};
  const Inputs inputs{.query = {one.data(), DType::bf16, {1, 1, 1}},
                      .key = {one.data(), DType::bf16, {1, 1, 1}},
                      .value = {one.data(), DType::bf16, {1, 1, 1}},
                      .bias = {},
                      .scale = 1.0 + 0x1p-9};
  CHECK(plain_attention(inputs).lse[0] == 1.0);
  CHECK(reference_attention(inputs).lse[0] == 1.0 + 0x1p-9);
}

TEST_CASE("the tolerance allows twice the plain error, in the worst element and in the mean") {
  const std::vector<double> reference{1, 2, 3, 4};
  const std::vector<double> plain{1.1, 2, 3, 4};
  CHECK(compare(std::vector<double>{1, 2, 3, 4.19}, plain, reference, 0).ok);
  const Comparison worst = compare(std::vector<double>{1, 2, 3, 4.21}, plain, reference, 0);
  CHECK_FALSE(worst.ok);
  CHECK(worst.worst_index == 3);
  CHECK_FALSE(
      compare(std::vector<double>{1.15, 2.15, 3, 4}, plain, reference, 0).ok);  // each fits, the mean no

  CHECK(compare(std::vector<double>{1, 2, 3, 4.5}, reference, reference, 0.5).ok);
  CHECK_FALSE(compare(std::vector<double>{1, 2, 3, 4.51}, reference, reference, 0.5).ok);
  CHECK(tiny_of(2, 10) == 100 * 0x1p-23);
}

TEST_CASE("the tolerance forgives no NaN, no lost infinity and no ill-posed case") {
  const std::vector<double> reference{1, -kInf};
  CHECK(compare(reference, reference, reference, 0).ok);
  CHECK_FALSE(compare(std::vector<double>{std::nan(""), -kInf}, reference, reference, 0).ok);
  CHECK_FALSE(compare(std::vector<double>{1, -1e30}, reference, reference, 0).ok);
  CHECK_FALSE(compare(std::vector<double>{1, kInf}, reference, reference, 0).ok);
  CHECK_FALSE(compare(reference, std::vector<double>{1, std::nan("")}, reference, 0).ok);
  CHECK_FALSE(compare(std::vector<double>{1}, reference, reference, 0).ok);
}

TEST_CASE("the verdict accepts the reference and refuses single defects") {
  Random random(test_seed(), 1);
  const KernelClass wanted{
      .dtype = DType::f32, .head_dim = 8, .head_dim_v = 8, .window_right = true, .lse = true};
  AttentionCase ran;
  Values right;
  do {
    ran = random_case(random, wanted);
    right = reference_attention(ran.inputs());
  } while (right.output.size() < 64 || largest_magnitude(right.output) == 0);
  CAPTURE(ran.name);
  const auto finish = [&](const std::vector<double>& output, const std::vector<double>& lse) {
    std::size_t at = 0;
    ran.output.fill([&] { return static_cast<float>(output[at++]); });
    at = 0;
    ran.lse.fill([&] { return static_cast<float>(lse[at++]); });
  };
  finish(right.output, right.lse);
  CHECK(verdict(ran) == "");

  Values wrong = right;
  wrong.output[right.output.size() / 2] += 2 * largest_magnitude(ran.value.values());
  finish(wrong.output, right.lse);
  CHECK(verdict(ran).starts_with("output"));

  wrong = right;
  wrong.lse.back() = std::nan("");
  finish(right.output, wrong.lse);
  CHECK(verdict(ran).starts_with("lse"));

  finish(right.output, right.lse);
  ran.output.storage()[8] = std::byte{0};
  CHECK(verdict(ran).starts_with("output: byte"));
}

TEST_CASE("guards notice a write before, between and behind the elements, and to an input") {
  Layout layout;
  layout.order = {1, 0, 2, 3, 4};
  layout.gap = {3, 0, 5};
  layout.reversed = {true, false, false};
  layout.offset = 1;
  GuardedTensor tensor(DType::f16, {2, 3, 4}, layout);
  float next = 0;
  tensor.fill([&] { return next++; });
  std::vector<double> expected(24);
  std::iota(expected.begin(), expected.end(), 0.0);
  CHECK(tensor.values() == expected);
  CHECK(tensor.damage(Access::read) == "");

  // Written over by each element's own owner: fine for an output, not for an input.
  const MutableTensorView view = tensor.view();
  store(DType::f16, view.data, 7);
  CHECK(tensor.damage(Access::write) == "");
  CHECK(tensor.damage(Access::read) == "byte 1 from the first element was overwritten");
  store(DType::f16, view.data, 0);

  for (std::byte& byte : tensor.storage()) {
    const std::byte was = byte;
    byte = ~byte;
    const bool noticed = !tensor.damage(Access::read).empty();
    byte = was;
    REQUIRE(noticed);
  }
  store(DType::f16, static_cast<std::byte*>(view.data) + 2 * 4, 0);  // the gap behind a row of 4
  CHECK(tensor.damage(Access::write) == "byte 8 from the first element was overwritten");
}

TEST_CASE("poison is NaN in every type") {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const GuardedTensor untouched(dtype, {1, 2, 3}, Layout{});
    for (const double element : untouched.values()) CHECK(std::isnan(element));
  }
}

TEST_CASE("random layouts are aligned as asked, and misaligned cases are no better aligned") {
  Random random(test_seed(), 2);
  for (int round = 0; round < 500; ++round) {
    const DType dtype = random.pick({DType::f32, DType::f16});
    const int align = random.pick({4, 8, 16});
    const GuardedTensor tensor(dtype, {2, 3, 2, 8}, random_layout(random, dtype, 4, align, Access::read));
    const MutableTensorView view = tensor.view();
    std::uint64_t bits = reinterpret_cast<std::uintptr_t>(view.data);
    for (int axis = 0; axis < 3; ++axis)
      bits |= static_cast<std::uint64_t>(view.strides[axis] * item_bytes(dtype));
    REQUIRE(bits % align == 0);
    if (align < 16) REQUIRE(bits % (2 * align) != 0);
  }
}

TEST_CASE("256 classes hold every head_dim and every head_dim_v") {
  Random random(test_seed(), 3);
  const DType dtypes[] = {DType::f16};
  std::vector<bool> seen(257);
  for (const KernelClass& one : random_classes(random, 256, dtypes)) seen[one.head_dim] = true;
  CHECK(std::count(seen.begin() + 1, seen.end(), true) == 256);
}
