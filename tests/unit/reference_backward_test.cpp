// The yardstick of gradients: the float64 reference against gradients worked out by hand, against differences
// of the float64 forward over every kind of problem, and against itself on attention in chunks; the plain
// implementation against what it must round.
#include "tests/support/random.h"
#include "tests/unit/small_problems.h"
#include "tools/reference/element.h"
#include "tools/reference/judge.h"
#include "tools/reference/plain.h"
#include "tools/reference/reference.h"
#include "tools/reference/rows.h"
#include "tools/verify/case.h"
#include "tools/verify/verdict.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

using namespace attune;
using namespace attune::reference;
using namespace attune::test;
using namespace attune::verify;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kStep = 0x1p-10;
constexpr double kGrid = 0x1p-6;  // numbers that are multiples of it stay exact in steps

// ---- Differences ----

/// What gradients are those of: sum of grad_output * output and of grad_lse * lse.
double loss(const BackwardInputs& inputs) {
  const Values values = reference_attention(inputs.forward);
  double sum =
      std::inner_product(values.output.begin(), values.output.end(), inputs.grad_output.begin(), 0.0);
  for (std::size_t row = 0; row < inputs.grad_lse.size(); ++row) {
    if (std::isfinite(values.lse[row])) sum += inputs.grad_lse[row] * values.lse[row];
  }
  return sum;
}

/// A tensor of a problem in memory of its own, float32 and contiguous, small numbers on a grid; NaN becomes
/// 0.
class Movable {
 public:
  explicit Movable(TensorView& tensor) : numbers_(dense(tensor)) {
    for (float& number : numbers_) {
      if (std::isnan(number)) number = 0;
      if (std::isinf(number)) continue;
      number = static_cast<float>(std::round(std::clamp(number, -4.0f, 4.0f) / kGrid) * kGrid);
    }
    tensor.data = numbers_.data();
    tensor.dtype = DType::f32;
    std::int64_t stride = 1;
    for (int axis = tensor.rank - 1; axis >= 0; stride *= tensor.shape[axis--]) tensor.strides[axis] = stride;
  }

  /// The derivative of the loss along a direction, by differences at four steps: exact to the step's fourth
  /// power.
  double derivative(const BackwardInputs& inputs, const std::vector<float>& direction) {
    const std::vector<float> home = numbers_;
    const auto at = [&](double steps) {
      for (std::size_t i = 0; i < home.size(); ++i) {
        numbers_[i] = home[i] + static_cast<float>(steps * kStep) * direction[i];
      }
      return loss(inputs);
    };
    const double slope = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * kStep);
    std::ranges::copy(home, numbers_.begin());
    return slope;
  }

  std::size_t size() const { return numbers_.size(); }

 private:
  std::vector<float> numbers_;
};

/// Along a direction of random signs, which no wrong element cancels in.
void check_derivative(Random& random, const BackwardInputs& inputs, Movable& tensor, const Gradient& gradient,
                      const char* name) {
  CAPTURE(name);
  REQUIRE(gradient.values.size() == tensor.size());
  std::vector<float> direction(tensor.size());
  for (float& sign : direction) sign = random.chance(0.5) ? 1.0f : -1.0f;
  double expected = 0, magnitude = 1;
  for (std::size_t i = 0; i < direction.size(); ++i) {
    expected += direction[i] * gradient.values[i];
    magnitude += std::abs(gradient.values[i]);
  }
  CHECK(std::abs(tensor.derivative(inputs, direction) - expected) <= 1e-8 * magnitude);
}

/// Random gradients of a problem's results, with or without the lse's.
BackwardInputs random_gradients(Random& random, const Inputs& forward) {
  BackwardInputs inputs{.forward = forward};
  const Values values = reference_attention(forward);
  inputs.grad_output = random_numbers<double>(random, values.output.size());
  if (random.chance(0.7)) inputs.grad_lse = random_numbers<double>(random, values.lse.size());
  inputs.output = values.output;
  return inputs;
}

bool close(double a, double b) {
  return std::abs(a - b) <= 1e-12 * (1 + std::abs(b));
}

void check_close(const std::vector<double>& actual, const std::vector<double>& expected) {
  CHECK(std::ranges::equal(actual, expected, close));
}

// ---- Chunks ----

/// Keys and values of one problem, [1, keys, 2, 3], cut into chunks; a tensor hides some of the keys.
struct Chunked {
  static constexpr int kQueries = 5, kKeys = 24, kHeads = 2, kDim = 3;
  std::vector<float> query, key, value, hiding;

  explicit Chunked(Random& random)
      : query(random_numbers(random, kQueries * kHeads * kDim)),
        key(random_numbers(random, kKeys * kHeads * kDim)),
        value(random_numbers(random, kKeys * kHeads * kDim)),
        hiding(random_numbers(random, kQueries * kKeys)) {
    // The last query sees few keys, so that it sees nothing of most chunks; the first sees none at all.
    for (int i = 0; i < kQueries; ++i) {
      for (int j = 0; j < kKeys; ++j) {
        if (i == 0 || random.chance(i == kQueries - 1 ? 0.9 : 0.2)) hiding[i * kKeys + j] = -HUGE_VALF;
      }
    }
  }

  Inputs over(int begin, int end) const {
    const auto rows = [&](const std::vector<float>& numbers) {
      return TensorView(numbers.data() + begin * kHeads * kDim, DType::f32, {1, end - begin, kHeads, kDim});
    };
    TensorView columns(hiding.data() + begin, DType::f32, {kQueries, end - begin});
    columns.strides[0] = kKeys;
    return {.query = view_of(query, {1, kQueries, kHeads, kDim}),
            .key = rows(key),
            .value = rows(value),
            .bias = AttentionBias(columns)};
  }
};

/// The gradients that a merge gives a chunk: of its output and its lse.
BackwardInputs of_chunk(const BackwardInputs& whole, const Values& merged, const Inputs& chunk) {
  const Values part = reference_attention(chunk);
  BackwardInputs inputs{.forward = chunk, .output = part.output};
  inputs.grad_output.resize(part.output.size());
  inputs.grad_lse.resize(part.lse.size());
  for_each_row(chunk, [&](const QueryRow& row) {
    if (part.lse[row.lse] == -kInf) return;
    const double weight = std::exp(part.lse[row.lse] - merged.lse[row.lse]);
    double grad_weight = whole.grad_lse.empty() ? 0 : whole.grad_lse[row.lse];
    for (std::size_t at = row.output; at < row.output + Chunked::kDim; ++at) {
      inputs.grad_output[at] = weight * whole.grad_output[at];
      grad_weight += (part.output[at] - merged.output[at]) * whole.grad_output[at];
    }
    inputs.grad_lse[row.lse] = weight * grad_weight;
  });
  return inputs;
}

}  // namespace

TEST_CASE("the gradients equal those worked out by hand") {
  // Query 0 weighs keys as 1, e, e^2 and query 1 as 1, e^2, e; the values are 1, 10, 100.
  const Small small;
  const std::vector<float> bias(3, 0.0f);  // of both queries
  BackwardInputs inputs{.forward = small.inputs(AttentionBias(view_of(bias, {1, 3}))),
                        .grad_output = {1, -2},
                        .grad_lse = {0, 7}};
  const double e1 = std::exp(1.0), e2 = std::exp(2.0), sum = 1 + e1 + e2;
  const std::array<double, 3> first{1 / sum, e1 / sum, e2 / sum}, second{1 / sum, e2 / sum, e1 / sum};
  const double out0 = first[0] + 10 * first[1] + 100 * first[2];
  const double out1 = second[0] + 10 * second[1] + 100 * second[2];
  inputs.output = {out0, out1};
  std::array<double, 3> score0, score1;  // gradients of the scores
  for (int j = 0; j < 3; ++j) {
    score0[j] = first[j] * (small.value[j] - out0);
    score1[j] = second[j] * (-2 * small.value[j] + 2 * out1 + 7);
  }
  const GradientValues gradients = reference_backward(inputs);
  check_close(gradients.value.values,
              {first[0] - 2 * second[0], first[1] - 2 * second[1], first[2] - 2 * second[2]});
  check_close(gradients.bias.values, {score0[0] + score1[0], score0[1] + score1[1], score0[2] + score1[2]});
  // Keys are (0, 0), (1, 2), (2, 1); queries (1, 0), (0, 1).
  check_close(gradients.query.values, {score0[1] + 2 * score0[2], 2 * score0[1] + score0[2],
                                       score1[1] + 2 * score1[2], 2 * score1[1] + score1[2]});
  check_close(gradients.key.values, {score0[0], score1[0], score0[1], score1[1], score0[2], score1[2]});

  inputs.forward.scale = 0.0;  // all weigh alike, and nothing flows to queries and keys
  inputs.output = {37, 37};
  const GradientValues flat = reference_backward(inputs);
  CHECK(flat.query.values == std::vector<double>(4));
  CHECK(flat.key.values == std::vector<double>(6));
  check_close(flat.value.values, {-1.0 / 3, -1.0 / 3, -1.0 / 3});
}

TEST_CASE("queries that see nothing and keys that nobody sees have gradients of 0") {
  const Small small;
  // Query 0 sees no key: all are hidden. Query 1 sees key 1 alone.
  const float hidden = -HUGE_VALF;
  const std::vector<float> bias{hidden, hidden, hidden, hidden, 0, hidden};
  const BackwardInputs inputs{.forward = small.inputs(AttentionBias(view_of(bias, {2, 3}))),
                              .grad_output = {5, 3},
                              .grad_lse = {5, 3},
                              .output = {0, 10}};
  for (const auto backward : {reference_backward, plain_backward}) {
    const GradientValues gradients = backward(inputs);
    CHECK(gradients.query.values == std::vector<double>{0, 0, 3, 6});
    CHECK(gradients.key.values == std::vector<double>{0, 0, 0, 3, 0, 0});
    CHECK(gradients.value.values == std::vector<double>{0, 3, 0});
    CHECK(gradients.bias.values == std::vector<double>{0, 0, 0, 0, 3, 0});
  }
  const GradientValues gradients = reference_backward(inputs);
  for (const Gradient* one : {&gradients.query, &gradients.value, &gradients.bias}) {
    for (std::size_t i = 0; i < one->values.size(); ++i) CHECK((one->tiny[i] == 0) == (one->values[i] == 0));
  }
}

TEST_CASE("without any key, query or batch there is nothing to add up") {
  const Small small;
  BackwardInputs inputs{.forward = small.inputs(), .grad_output = {1, 1}, .output = {0, 0}};
  inputs.forward.key.shape[1] = inputs.forward.value.shape[1] = 0;
  for (const auto backward : {reference_backward, plain_backward}) {
    const GradientValues gradients = backward(inputs);
    CHECK(gradients.query.values == std::vector<double>(4));
    CHECK(gradients.key.values.empty());
    CHECK(gradients.bias.values.empty());
  }
}

/// One in so many of the random problems: AddressSanitizer takes 25 times as long for each.
#ifdef __SANITIZE_ADDRESS__
constexpr int kShare = 4;
#else
constexpr int kShare = 1;
#endif

TEST_CASE("gradients equal differences of the forward pass over every kind of problem") {
  Random random(test_seed());
  int biased = 0, dropping = 0;
  for (KernelClass one : cpu_classes(random, 160 / kShare)) {
    if (one.mask == nullptr) continue;
    one.problem.head_dim = one.problem.head_dim % 7 + 1;
    one.problem.head_dim_v = one.problem.head_dim_v % 5 + 1;
    AttentionCase drawn(random, one, *one.mask);
    drawn.problem.scale = random.pick({0.25, -0.25});
    CAPTURE(drawn.name);
    Inputs forward = drawn.problem.inputs();
    Movable query(forward.query), key(forward.key), value(forward.value);
    std::optional<Movable> bias;
    if (has_bias_gradient(forward)) bias.emplace(*forward.bias.tensor);
    const BackwardInputs inputs = random_gradients(random, forward);
    const GradientValues gradients = reference_backward(inputs);
    check_derivative(random, inputs, query, gradients.query, "query");
    check_derivative(random, inputs, key, gradients.key, "key");
    check_derivative(random, inputs, value, gradients.value, "value");
    if (bias) check_derivative(random, inputs, *bias, gradients.bias, "bias");
    biased += bias ? 1 : 0;
    dropping += forward.p > 0 ? 1 : 0;
  }
  CHECK(biased > 20 / kShare);
  CHECK(dropping > 20 / kShare);
}

TEST_CASE("gradients of chunks that are merged equal those of the whole") {
  Random random(test_seed(), 1);
  for (int chunks = 2; chunks <= 16; ++chunks) {
    CAPTURE(chunks);
    const Chunked problem(random);
    const BackwardInputs inputs = random_gradients(random, problem.over(0, Chunked::kKeys));
    const Values merged = reference_attention(inputs.forward);
    const GradientValues whole = reference_backward(inputs);
    std::vector<int> cuts{0, Chunked::kKeys};  // some chunks are empty
    while (std::ssize(cuts) <= chunks) cuts.push_back(random.integer(0, Chunked::kKeys));
    std::ranges::sort(cuts);

    GradientValues sum;
    sum.query.values.resize(whole.query.values.size());
    sum.bias.values.resize(whole.bias.values.size());
    for (int c = 0; c < chunks; ++c) {
      const GradientValues part =
          reference_backward(of_chunk(inputs, merged, problem.over(cuts[c], cuts[c + 1])));
      const auto append = [](std::vector<double>& to, const std::vector<double>& from) {
        to.insert(to.end(), from.begin(), from.end());
      };
      append(sum.key.values, part.key.values);
      append(sum.value.values, part.value.values);
      std::ranges::transform(sum.query.values, part.query.values, sum.query.values.begin(), std::plus());
      const int keys = cuts[c + 1] - cuts[c];
      for (int i = 0; i < Chunked::kQueries; ++i) {
        std::copy_n(part.bias.values.begin() + i * keys, keys,
                    sum.bias.values.begin() + i * Chunked::kKeys + cuts[c]);
      }
    }
    check_close(sum.query.values, whole.query.values);
    check_close(sum.key.values, whole.key.values);
    check_close(sum.value.values, whole.value.values);
    check_close(sum.bias.values, whole.bias.values);
  }
}

TEST_CASE("the plain implementation rounds where an eager framework does, and takes delta from the output") {
  const Small small;
  BackwardInputs inputs{.forward = small.inputs(), .grad_output = {1, -2}, .grad_lse = {0, 7}};
  inputs.output = reference_attention(inputs.forward).output;
  const GradientValues right = reference_backward(inputs), plain = plain_backward(inputs);
  for (const auto& [a, b] : {std::pair{&plain.query, &right.query}, {&plain.key, &right.key}}) {
    for (std::size_t i = 0; i < a->values.size(); ++i) CHECK(std::abs(a->values[i] - b->values[i]) < 1e-4);
  }

  // One pair, whose probability is 1. 1 + 2^-9 lies between the bfloat16 numbers 1 and 1 + 2^-7.
  const std::array<kernel::u16, 1> one{kernel::float_to_bf16(1.0f)};
  const TensorView single{one.data(), DType::bf16, {1, 1, 1}};
  BackwardInputs pair{.forward = {.query = single, .key = single, .value = single, .scale = 1.0 + 0x1p-9},
                      .grad_output = {1 + 0x1p-9},
                      .output = {0.5}};
  CHECK(plain_backward(pair).value.values[0] == 1);
  CHECK(plain_backward(pair).query.values[0] == 0.5);  // dP = 1, delta = 0.5; scale * 0.5 is rounded
  CHECK(reference_backward(pair).query.values[0] == 0.5 * (1 + 0x1p-9) * (1 + 0x1p-9));
  pair.output = {1};
  pair.grad_lse = {-0.25};
  CHECK(plain_backward(pair).key.values[0] == -0.25);
}

TEST_CASE("a gradient may be off by twice the plain error and what float32 costs its terms") {
  const Small small;
  BackwardInputs inputs{.forward = small.inputs(), .grad_output = {1, -2}};
  inputs.output = reference_attention(inputs.forward).output;
  const GradientValues right = reference_backward(inputs), plain = plain_backward(inputs);
  CHECK(judge(plain.value, right.value, right.value.values).ok);
  // Value 0 has weight 1 / sum of both queries, whose scores are 0 and whose lse is ln(sum): terms of 1 and
  // -2.
  const double sum = 1 + std::exp(1.0) + std::exp(2.0);
  const double expected = tiny_of(0, 1 / sum) + tiny_of(std::log(sum), std::sqrt(5.0) / sum);
  CHECK(right.value.tiny[0] == doctest::Approx(expected).epsilon(1e-12));
  std::vector<double> wrong = right.value.values;
  wrong[0] += 1e-4;
  CHECK_FALSE(judge(plain.value, right.value, wrong).ok);
  CHECK_FALSE(judge(plain.value, right.value, {}).ok);
}

TEST_CASE(
    "the verdict refuses a number where nothing flows, however small, and a result that was not written") {
  const Gradient reference{{0, 1}, {0, 1e-6}};
  const Gradient plain{{0, 1}, {}};
  CHECK(text_of(plain, reference, {0, 1}) == "");
  CHECK(text_of(plain, reference, {1e-30, 1}) == "element 0 is 1e-30, but nothing flows to it");
  CHECK(text_of(plain, reference, {std::nan(""), 1}) == "element 0 is nan, but nothing flows to it");
  CHECK(text_of(plain, reference, {0, 1.1}).starts_with("worst 0.1 at 1"));
  CHECK(text_of(plain, reference, {0, std::nan("")}).starts_with("worst inf at 1"));
}

TEST_CASE("numbers of queries, packed or padded, come back in the order of the reference") {
  Random random(test_seed(), 2);
  int padded = 0;
  for (const KernelClass& one : cpu_classes(random, 64 / kShare)) {
    if (one.mask == nullptr) continue;
    const AttentionProblem problem(random, one, *one.mask);
    CAPTURE(problem.text());
    std::vector<double> expected(problem.queries());
    std::iota(expected.begin(), expected.end(), 0.0);
    QueryNumbers drawn(random, problem), contiguous(problem);
    for (QueryNumbers* numbers : {&drawn, &contiguous}) {
      numbers->fill(expected);
      CHECK(numbers->values() == expected);
    }
    CHECK(contiguous.tensor.values() == expected);
    padded += drawn.padded() ? 1 : 0;
    const std::vector<double> elements = drawn.tensor.values();
    const auto is_nan = [](double x) { return std::isnan(x); };
    CHECK(std::ranges::count_if(elements, is_nan) == std::ssize(elements) - std::ssize(expected));
  }
  CHECK(padded > 5 / kShare);
}
