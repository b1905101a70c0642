// The yardsticks themselves: the float64 reference against values worked out by hand, against another way to
// the same sum and against itself on equal problems in other layouts; the plain implementation, the tolerance
// and the guards against what they must notice.
#include "tools/reference/reference.h"

#include "attune/philox.h"
#include "codegen/arch.h"
#include "tests/support/random.h"
#include "tests/unit/small_problems.h"
#include "tools/reference/element.h"
#include "tools/reference/mask.h"
#include "tools/reference/plain.h"
#include "tools/reference/rows.h"
#include "tools/reference/tolerance.h"
#include "tools/verify/case.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <set>

using namespace attune;
using namespace attune::reference;
using namespace attune::verify;
using namespace attune::test;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

/// One element of a tensor with any strides, for a query's head; axes of fewer heads serve several.
double element(const TensorView& t, const TensorView& query, int b, int row, int head, int d) {
  std::int64_t at = b * t.strides[0] + row * t.strides[1] + d * t.strides[t.rank - 1];
  if (t.rank == 4) at += head * t.shape[2] / query.shape[2] * t.strides[2];
  if (t.rank == 5) {
    if (t.shape[2] > 1) at += head / query.shape[3] * t.strides[2];
    if (t.shape[3] > 1) at += head % query.shape[3] * t.strides[3];
  }
  return load(t.dtype, static_cast<const std::byte*>(t.data) + at * item_bytes(t.dtype));
}

/// What a bias tensor adds, again by strides.
double added(const Inputs& inputs, int b, int head, int query, int key) {
  if (!inputs.bias.tensor) return 0;
  const TensorView& t = *inputs.bias.tensor;
  const std::int64_t heads = inputs.query.rank == 5 ? inputs.query.shape[3] : extents_of(inputs).heads;
  std::vector<std::int64_t> index{query, key};
  if (t.rank >= 4) index.insert(index.begin(), head % heads);
  if (t.rank == 5) index.insert(index.begin(), head / heads);
  if (t.rank >= 3) index.insert(index.begin(), b);
  std::int64_t at = 0;
  for (int axis = 0; axis < t.rank; ++axis) at += t.shape[axis] == 1 ? 0 : index[axis] * t.strides[axis];
  const float found = load(t.dtype, static_cast<const std::byte*>(t.data) + at * item_bytes(t.dtype));
  return t.dtype != DType::boolean ? found : found != 0 ? 0 : -kInf;
}

/// exp(s) without subtracting a maximum, one output element at a time, by strides. In long double, as a bias
/// of -1e4 would leave nothing of a double.
std::vector<double> sum_by_pairs(const Inputs& inputs) {
  const Extents e = extents_of(inputs);
  const Mask mask(inputs.bias, e.batch, e.len_q, e.len_k);
  const auto dropout = kernel::make_dropout(inputs.p, inputs.dropout.seed, inputs.dropout.offset);
  std::vector<double> output(std::size_t(e.batch) * e.len_q * e.heads * e.head_dim_v);
  for (const kernel::Block& block : mask.blocks()) {
    for (int i = 0; i < block.len_q; ++i) {
      const int row = block.q_begin + i;
      for (int h = 0; h < e.heads; ++h) {
        for (int d = 0; d < e.head_dim_v; ++d) {
          long double over = 0, under = 0;
          for (int j = 0; j < block.len_k; ++j) {
            if (!mask.visible(block, i, j)) continue;
            const int key_row = mask.key_row(block, j);
            double dot = 0;
            for (int c = 0; c < e.head_dim; ++c) {
              dot += element(inputs.query, inputs.query, block.batch, row, h, c) *
                     element(inputs.key, inputs.query, block.batch, key_row, h, c);
            }
            const long double bias = added(inputs, block.batch, h, row, key_row);
            const long double weight = std::exp(dot * scale_of(inputs) + bias);
            under += weight;
            if (!dropout_keeps(dropout, block.index, h, i, j)) continue;
            over +=
                weight * rescale_of(inputs) * element(inputs.value, inputs.query, block.batch, key_row, h, d);
          }
          output[((std::size_t(block.batch) * e.len_q + row) * e.heads + h) * e.head_dim_v + d] =
              under > 0 ? static_cast<double>(over / under) : 0.0;
        }
      }
    }
  }
  return output;
}

bool equal(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i] && !(std::abs(a[i] - b[i]) <= 1e-12 * (1 + std::abs(b[i])))) return false;
  }
  return true;
}

void check_equal(const Values& a, const Values& b) {
  CHECK(equal(a.output, b.output));
  CHECK(equal(a.lse, b.lse));
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
  // Of query 1: the mean of its scores' magnitudes, by weight.
  CHECK(values.score_magnitude == doctest::Approx((2 * e2 + e1) / sum).epsilon(1e-14));
  CHECK(values.value_magnitude == 100);
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

TEST_CASE("a bias tensor is added to the scores, and a boolean one hides keys") {
  const Small small;
  // Query 0's scores 0, 1, 2 become all 1; query 1's 0, 2, 1 stay, but for its first key.
  const std::vector<float> bias{1, 0, -1, static_cast<float>(-kInf), 0, 0};
  const Values values = reference_attention(small.inputs(AttentionBias(view_of(bias, {2, 3}))));
  CHECK(values.output[0] == doctest::Approx(37).epsilon(1e-14));
  CHECK(values.lse[0] == doctest::Approx(1 + std::log(3)).epsilon(1e-14));
  CHECK(values.output[1] == doctest::Approx((10 * std::exp(1) + 100) / (std::exp(1) + 1)).epsilon(1e-14));

  const std::array<bool, 3> seen{true, false, true};  // for both queries
  const TensorView boolean{seen.data(), DType::boolean, {1, 1, 1, 3}};
  const Values hidden = reference_attention(small.inputs(LowerTriangularMask{}.add_bias(boolean)));
  CHECK(hidden.output == std::vector<double>{1, 1});
  CHECK(hidden.lse == std::vector<double>{0, 0});
}

TEST_CASE("NaN in a query makes its row NaN, unless a boolean hides all of its keys") {
  Small small;
  small.query[1] = std::numeric_limits<float>::quiet_NaN();
  const std::array<bool, 6> seen{false, false, false, true, true, true};
  const TensorView boolean{seen.data(), DType::boolean, {2, 3}};
  const std::vector<float> lowest{-static_cast<float>(kInf), 0, 0, 0, 0, 0};
  for (const AttentionBias& bias : {AttentionBias(), AttentionBias(view_of(lowest, {2, 3}))}) {
    const Values values = reference_attention(small.inputs(bias));
    CHECK(std::isnan(values.output[0]));
    CHECK(std::isnan(values.lse[0]));
    CHECK(std::isfinite(values.output[1]));
    CHECK(std::isfinite(values.lse[1]));
  }
  const Values hidden = reference_attention(small.inputs(AttentionBias(boolean)));
  CHECK(hidden.output[0] == 0);
  CHECK(hidden.lse[0] == -kInf);
  CHECK(std::isfinite(hidden.output[1]));
}

TEST_CASE("a query whose keys all have the bias -inf sees none") {
  const Small small;
  const std::vector<float> bias{static_cast<float>(-kInf), static_cast<float>(-kInf),
                                static_cast<float>(-kInf)};
  for (const auto attention : {reference_attention, plain_attention}) {
    const Values values = attention(small.inputs(AttentionBias(view_of(bias, {1, 3}))));
    CHECK(values.output == std::vector<double>{0, 0});
    CHECK(values.lse == std::vector<double>{-kInf, -kInf});
  }
}

TEST_CASE("the reference drops what dropout_keeps drops, and scales what is left") {
  const Small small;
  Inputs inputs = small.inputs({}, 0.0);  // every weight is 1 / 3
  inputs.p = 0.5;
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    inputs.dropout = {seed, 3};
    const auto dropout = kernel::make_dropout(0.5, seed, 3);
    const Values values = reference_attention(inputs);
    for (int i = 0; i < 2; ++i) {
      double expected = 0;
      for (int j = 0; j < 3; ++j)
        expected += dropout_keeps(dropout, 0, 0, i, j) ? 2.0 / 3 * small.value[j] : 0;
      CHECK(values.output[i] == doctest::Approx(expected).epsilon(1e-14));
      CHECK(values.lse[i] == doctest::Approx(std::log(3)).epsilon(1e-14));  // not of dropped weights
    }
  }
  inputs.p = 1;
  CHECK(reference_attention(inputs).output == std::vector<double>{0, 0});
}

TEST_CASE("fewer heads of key and value equal the same heads repeated") {
  Random random(test_seed(), 4);
  constexpr int kQueries = 3, kKeys = 4, kDim = 2;
  const auto query = random_numbers(random, kQueries * 6 * kDim);
  const auto few = random_numbers(random, kKeys * 2 * kDim);
  std::vector<float> repeated;     // heads 0 0 0 1 1 1
  std::vector<float> interleaved;  // heads 0 1 0 1 0 1
  for (int j = 0; j < kKeys; ++j) {
    for (int h = 0; h < 6; ++h) {
      for (int d = 0; d < kDim; ++d) {
        repeated.push_back(few[(j * 2 + h / 3) * kDim + d]);
        interleaved.push_back(few[(j * 2 + h % 2) * kDim + d]);
      }
    }
  }
  const auto attention = [&](const TensorView& q, const TensorView& k) {
    return reference_attention({.query = q, .key = k, .value = k});
  };
  const TensorView q4 = view_of(query, {1, kQueries, 6, kDim});
  const Values expected = attention(q4, view_of(repeated, {1, kKeys, 6, kDim}));
  check_equal(attention(q4, view_of(few, {1, kKeys, 2, kDim})), expected);
  check_equal(attention(view_of(query, {1, kQueries, 2, 3, kDim}), view_of(few, {1, kKeys, 2, 1, kDim})),
              expected);
  check_equal(attention(view_of(query, {1, kQueries, 3, 2, kDim}), view_of(few, {1, kKeys, 1, 2, kDim})),
              attention(q4, view_of(interleaved, {1, kKeys, 6, kDim})));
}

TEST_CASE("packed, padded, gappy and paged sequences equal each sequence alone") {
  Random random(test_seed(), 5);
  constexpr int kDim = 3, kRows = 40;
  const auto query = random_numbers(random, 7 * kDim);
  const auto rows = random_numbers(random, kRows * kDim);
  const std::vector<std::int64_t> q_lens{3, 0, 4};
  /// Sequence b alone, its keys being these rows.
  const auto alone = [&](int b, const std::vector<int>& key_rows) {
    std::vector<float> keys;
    for (const int row : key_rows)
      keys.insert(keys.end(), rows.begin() + row * kDim, rows.begin() + (row + 1) * kDim);
    const int begin = b == 0 ? 0 : 3;
    const TensorView k = view_of(keys, {1, static_cast<std::int64_t>(key_rows.size()), kDim});
    return reference_attention({.query = {query.data() + begin * kDim, DType::f32, {1, q_lens[b], kDim}},
                                .key = k,
                                .value = k,
                                .bias = LowerTriangularFromBottomRightMask{}});
  };
  const auto check = [&](const AttentionBias& bias, int len_k, const std::vector<int>& first,
                         const std::vector<int>& last) {
    CAPTURE(bias.name);
    const TensorView k = view_of(rows, {1, len_k, kDim});
    const Values all =
        reference_attention({.query = view_of(query, {1, 7, kDim}), .key = k, .value = k, .bias = bias});
    Values expected = alone(0, first);
    const Values rest = alone(2, last);
    expected.output.insert(expected.output.end(), rest.output.begin(), rest.output.end());
    expected.lse.insert(expected.lse.end(), rest.lse.begin(), rest.lse.end());
    check_equal(all, expected);
  };
  check(BlockDiagonalCausalFromBottomRightMask::from_seqlens(q_lens, {4, 2, 5}), 11, {0, 1, 2, 3},
        {6, 7, 8, 9, 10});
  check(BlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqlens(q_lens, 6, {2, 0, 5}), 18, {0, 1},
        {12, 13, 14, 15, 16});
  check(BlockDiagonalCausalWithOffsetGappyKeysMask::from_seqlens(q_lens, {20, 0, 19, 40}, {3, 9, 4}), 40,
        {20, 21, 22}, {19, 20, 21, 22});
  const BlockTables tables{
      .table = {std::vector<std::int32_t>{3, 1, 9, 9, 1, 0}}, .width = 2, .page_size = 5};
  check(PagedBlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqlens(q_lens, {6, 0, 7}, tables), 20,
        {15, 16, 17, 18, 19, 5}, {5, 6, 7, 8, 9, 0, 1});
  check(PagedBlockDiagonalCausalWithOffsetGappyKeysMask::from_seqlens(q_lens, {4, 0, 3}, {2, 0, 4}, tables),
        20, {19, 5}, {8, 9, 0, 1});
}

TEST_CASE("attention over parts of the keys merges to attention over all of them") {
  Random random(test_seed(), 6);
  const auto query = random_numbers(random, 5 * 2 * 3), key = random_numbers(random, 9 * 2 * 3);
  const TensorView q = view_of(query, {1, 5, 2, 3});
  const auto over = [&](int begin, int end) {
    const TensorView k{key.data() + begin * 6, DType::f32, {1, end - begin, 2, 3}};
    return reference_attention({.query = q, .key = k, .value = k});
  };
  const auto narrow = [](const std::vector<double>& values) {
    return std::vector<float>(values.begin(), values.end());
  };
  std::vector<std::vector<float>> outputs, lses;
  for (const auto& [begin, end] : {std::pair{0, 4}, {4, 4}, {4, 9}}) {
    const Values part = over(begin, end);
    outputs.push_back(narrow(part.output));
    lses.push_back(narrow(part.lse));
  }
  std::ranges::fill(outputs[1], std::nanf(""));  // of no key: not even read
  MergeInputs chunks;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    chunks.attn.push_back(view_of(outputs[i], {1, 5, 2, 3}));
    chunks.lse.push_back(view_of(lses[i], {1, 2, 5}));
  }
  const Values all = over(0, 9);
  for (const auto merge : {reference_merge, plain_merge}) {
    const Values merged = merge(chunks);
    for (std::size_t i = 0; i < all.output.size(); ++i)
      CHECK(std::abs(merged.output[i] - all.output[i]) < 1e-6);
    for (std::size_t i = 0; i < all.lse.size(); ++i) CHECK(std::abs(merged.lse[i] - all.lse[i]) < 1e-6);
  }
  chunks.attn.assign(2, chunks.attn[1]);
  chunks.lse.assign(2, chunks.lse[1]);
  CHECK(reference_merge(chunks).output == std::vector<double>(30));
  CHECK(reference_merge(chunks).lse == std::vector<double>(10, -kInf));
}

TEST_CASE("the reference equals a straightforward sum over every kind of problem") {
  Random random(test_seed());
  for (KernelClass one : cpu_classes(random, 120)) {
    if (one.mask == nullptr) continue;
    one.problem.head_dim = one.problem.head_dim % 7 + 1;
    one.problem.head_dim_v = one.problem.head_dim_v % 5 + 1;
    AttentionCase drawn(random, one, *one.mask);
    // The sum without a maximum overflows for wide scores; keep them small.
    drawn.problem.scale = 0.05;
    CAPTURE(drawn.name);
    const Values reference = reference_attention(drawn.problem.inputs());
    const std::vector<double> sum = sum_by_pairs(drawn.problem.inputs());
    REQUIRE(reference.output.size() == sum.size());
    for (std::size_t i = 0; i < sum.size(); ++i) {
      REQUIRE(std::abs(reference.output[i] - sum[i]) <= 1e-11 * reference.value_magnitude);
    }
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

TEST_CASE("a key's score counts for the tolerance as much as the key weighs") {
  const Small small;
  const std::vector<float> far{0, -1e30f, 0};
  const Values values = reference_attention(small.inputs(AttentionBias(view_of(far, {1, 3}))));
  CHECK(values.score_magnitude <= 2);
}

TEST_CASE("the verdict accepts the reference and refuses single defects") {
  Random random(test_seed(), 1);
  const MaskClass& causal = *std::ranges::find_if(mask_classes(), [](const MaskClass& mask) {
    return mask.name == std::string_view("LowerTriangularMask");
  });
  const KernelClass wanted{.problem = {.head_dim = 8,
                                       .head_dim_v = 8,
                                       .window_right = kernel::Edge::bounded,
                                       .lse = kernel::Lse::write},
                           .mask = &causal};
  std::unique_ptr<AttentionCase> ran;
  Values right;
  do {
    ran = std::make_unique<AttentionCase>(random, wanted, causal);
    right = reference_attention(ran->problem.inputs());
  } while (right.output.size() < 64 || largest_magnitude(right.output) == 0);
  CAPTURE(ran->name);
  const auto finish = [&](const std::vector<double>& output, const std::vector<double>& lse) {
    std::size_t at = 0;
    ran->output.fill([&] { return static_cast<float>(output[at++]); });
    at = 0;
    ran->lse.fill([&] { return static_cast<float>(lse[at++]); });
  };
  finish(right.output, right.lse);
  CHECK(ran->verdict() == "");

  Values wrong = right;
  wrong.output[right.output.size() / 2] += 2 * largest_magnitude(right.output);
  finish(wrong.output, right.lse);
  CHECK(ran->verdict().starts_with("output"));

  wrong = right;
  wrong.lse.back() = std::nan("");
  finish(right.output, wrong.lse);
  CHECK(ran->verdict().starts_with("lse"));

  finish(right.output, right.lse);
  ran->output.storage()[8] = std::byte{0};
  CHECK(ran->verdict().starts_with("output: byte"));
}

TEST_CASE("guards notice a write before, between and behind the elements, and to an input") {
  Layout layout;
  layout.order = {1, 0, 2, 3, 4, 5};
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

TEST_CASE("what no index reaches is poisoned, shared elements are not") {
  Layout layout;
  layout.broadcast = {true, false, false};
  GuardedTensor tensor(DType::f32, {2, 3, 2}, layout);
  tensor.fill([] { return 1.0f; });
  tensor.poison_unused([](const Index& index) { return index[0] == 1 && index[1] != 2; });
  const std::vector<double> values = tensor.values();
  for (std::size_t i = 0; i < values.size(); ++i) CHECK(std::isnan(values[i]) == (i / 2 % 3 == 2));
  CHECK(tensor.damage(Access::read) == "");
}

TEST_CASE("every class of masks meets every type, and every head_dim is near a drawn one") {
  Random random(test_seed(), 3);
  std::vector<int> dims;
  std::map<std::pair<const MaskClass*, kernel::DType>, int> met;
  for (const KernelClass& one : cpu_classes(random, 512)) {
    if (one.mask == nullptr) continue;
    dims.push_back(one.problem.head_dim);
    ++met[{one.mask, one.problem.dtype}];
    CHECK(serves(one.problem, *one.mask));
  }
  CHECK(met.size() == 3 * mask_classes().size());
  std::ranges::sort(dims);
  CHECK(dims.front() <= 8);
  CHECK(dims.back() >= 505);
  for (std::size_t i = 1; i < dims.size(); ++i) CHECK(dims[i] - dims[i - 1] <= 12);
}

TEST_CASE("a run of few classes sees every mask, a longer one with every type") {
  Random random(test_seed(), 8);
  for (const auto& [count, types] : {std::pair{64, 1}, {128, 3}}) {
    for (int run = 0; run < 20; ++run) {
      std::map<const MaskClass*, std::set<kernel::DType>> seen;
      for (const KernelClass& one : cpu_classes(random, count)) {
        if (one.mask != nullptr) seen[one.mask].insert(one.problem.dtype);
      }
      CHECK(seen.size() == mask_classes().size());
      for (const auto& [mask, dtypes] : seen) CHECK(static_cast<int>(dtypes.size()) >= types);
    }
  }
}

TEST_CASE("GPU families draw every class of masks, and nothing that they have no kernel for") {
  Random random(test_seed(), 7);
  const codegen::Arch hopper = *codegen::cuda_arch(90);
  for (const kernel::Family family : {kernel::Family::simt, kernel::Family::mma}) {
    std::set<const MaskClass*> masks;
    const kernel::Family families[] = {family};
    const auto classes = random_classes(random, 256, hopper, families);
    REQUIRE(classes.ok());
    for (const KernelClass& one : *classes) {
      masks.insert(one.mask);
      const auto choice = codegen::choose(one.problem, hopper);
      REQUIRE(choice.ok());
      CHECK(choice->spec.family == (one.mask == nullptr ? kernel::Family::merge : family));
    }
    CHECK(masks.size() == mask_classes().size() + 1);  // and merges
  }
}
