// The backward of merge_attentions on the CPU, through the C++ API: with the backward of partial attention it
// gives the gradients of attention over all keys.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#define DOCTEST_CONFIG_IMPLEMENT
#include "attune/attune.h"
#include "tests/support/random.h"

#include <doctest/doctest.h>

using namespace attune;
using test::Random;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> normal(std::size_t count, Random& random) {
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(random.normal());
  return values;
}

const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.data());
}

std::vector<TensorView> views_of(const std::vector<Attention>& parts, Tensor Attention::*member) {
  std::vector<TensorView> views;
  for (const Attention& part : parts) views.emplace_back((part.*member).view());
  return views;
}

/// [2, 5, 3, 16] queries over [2, 40, 3, 16] keys and [2, 40, 3, 24] values. A bias hides the keys beyond 8 i
/// from query i, so query 0 sees none, and query 1 none of many a chunk.
struct Problem {
  static constexpr std::int64_t kQueries = 5, kKeys = 40;
  Random random{test::test_seed()};
  std::vector<float> q = normal(2 * kQueries * 3 * 16, random);
  std::vector<float> k = normal(2 * kKeys * 3 * 16, random);
  std::vector<float> v = normal(2 * kKeys * 3 * 24, random);
  std::vector<float> b = normal(kQueries * kKeys, random);
  std::vector<float> g = normal(2 * kQueries * 3 * 24, random);
  std::vector<float> g_lse = normal(2 * 3 * kQueries, random);
  TensorView query{q.data(), DType::f32, {2, kQueries, 3, 16}};
  TensorView grad_output{g.data(), DType::f32, {2, kQueries, 3, 24}};
  TensorView grad_lse{g_lse.data(), DType::f32, {2, 3, kQueries}};

  Problem() {
    for (std::int64_t i = 0; i < kQueries; ++i) {
      std::fill(b.begin() + i * kKeys + 8 * i, b.begin() + (i + 1) * kKeys, -kInfinity);
    }
  }

  /// Of the keys [begin, end).
  static TensorView rows(const std::vector<float>& memory, std::int64_t dim, std::int64_t begin,
                         std::int64_t end) {
    TensorView view(memory.data() + begin * 3 * dim, DType::f32, {2, end - begin, 3, dim});
    view.strides[0] = kKeys * 3 * dim;
    return view;
  }
  AttentionBias bias(std::int64_t begin, std::int64_t end) const {
    TensorView view(b.data() + begin, DType::f32, {1, 1, kQueries, end - begin});
    view.strides[2] = kKeys;
    return view;
  }
  Attention partial(std::int64_t begin, std::int64_t end) const {
    return memory_efficient_attention_partial(query, rows(k, 16, begin, end), rows(v, 24, begin, end),
                                              bias(begin, end));
  }
  Gradients backward(const Attention& part, const TensorView& grad, const TensorView& grad_of_lse,
                     std::int64_t begin, std::int64_t end) const {
    BackwardOptions options;
    options.grad_lse = &grad_of_lse;
    return memory_efficient_attention_backward(grad, part.output.view(), part.lse.view(), query,
                                               rows(k, 16, begin, end), rows(v, 24, begin, end),
                                               bias(begin, end), {}, options);
  }
};

/// The largest difference between the keys' gradients of a part and those of the same rows of the whole.
float difference_of_rows(const Tensor& part, const Tensor& whole, std::int64_t dim, std::int64_t begin) {
  const std::int64_t len = part.view().shape[1];
  float worst = 0;
  for (std::int64_t batch = 0; batch < 2; ++batch) {
    const float* a = floats(part) + batch * len * 3 * dim;
    const float* b = floats(whole) + (batch * Problem::kKeys + begin) * 3 * dim;
    for (std::int64_t i = 0; i < len * 3 * dim; ++i) worst = std::max(worst, std::abs(a[i] - b[i]));
  }
  return worst;
}

}  // namespace

TEST_CASE_FIXTURE(Problem, "chunks give query, key and value the gradients that the whole gives them") {
  const Attention whole = partial(0, kKeys);
  const Gradients expected = backward(whole, grad_output, grad_lse, 0, kKeys);
  for (const std::int64_t chunks : {1, 2, 3, 5, 8, 11, 16}) {
    CAPTURE(chunks);
    std::vector<std::int64_t> cuts{0};
    std::vector<Attention> parts;
    for (std::int64_t i = 1; i <= chunks; ++i) {
      cuts.push_back(kKeys * i * i / (chunks * chunks));  // of uneven lengths, the first ones empty
      parts.push_back(partial(cuts[i - 1], cuts[i]));
    }
    const auto attn = views_of(parts, &Attention::output);
    const auto attn_lse = views_of(parts, &Attention::lse);
    const Attention merged = merge_attentions(attn, attn_lse);
    const std::vector<Attention> given = merge_attentions_backward(
        grad_output, &grad_lse, merged.output.view(), merged.lse.view(), attn, attn_lse);
    REQUIRE(given.size() == parts.size());

    std::vector<double> grad_query(q.size());
    for (std::size_t i = 0; i < parts.size(); ++i) {
      const Gradients one =
          backward(parts[i], given[i].output.view(), given[i].lse.view(), cuts[i], cuts[i + 1]);
      for (std::size_t j = 0; j < q.size(); ++j) grad_query[j] += double{floats(one.query)[j]};
      CHECK(difference_of_rows(one.key, expected.key, 16, cuts[i]) < 1e-5f);
      CHECK(difference_of_rows(one.value, expected.value, 24, cuts[i]) < 1e-5f);
    }
    double worst = 0;
    for (std::size_t j = 0; j < q.size(); ++j) {
      worst = std::max(worst, std::abs(grad_query[j] - double{floats(expected.query)[j]}));
    }
    CHECK(worst < 1e-5);
  }
}

TEST_CASE_FIXTURE(Problem, "more chunks than a launch takes, into the caller's memory") {
  constexpr std::size_t kChunks = 45;
  std::vector<Attention> parts(kChunks);
  for (Attention& part : parts) part = partial(random.integer(0, 20), random.integer(20, 40));
  const auto attn = views_of(parts, &Attention::output);
  const auto attn_lse = views_of(parts, &Attention::lse);
  const Attention merged = merge_attentions(attn, attn_lse);
  const std::vector<Attention> at_once = merge_attentions_backward(grad_output, nullptr, merged.output.view(),
                                                                   merged.lse.view(), attn, attn_lse);
  const std::uint64_t launches = counters().launches;
  std::vector<float> memory(g.size()), lse_memory(g_lse.size());
  for (std::size_t i = 0; i < kChunks; ++i) {
    const MutableTensorView grad(memory.data(), DType::f32, {2, kQueries, 3, 24});
    const MutableTensorView grad_of_lse(lse_memory.data(), DType::f32, {2, 3, kQueries});
    merge_attentions_backward(grad_output, nullptr, merged.output.view(), merged.lse.view(),
                              std::span(attn).subspan(i, 1), std::span(attn_lse).subspan(i, 1),
                              std::span(&grad, 1), std::span(&grad_of_lse, 1));
    CHECK(std::equal(memory.begin(), memory.end(), floats(at_once[i].output)));
    CHECK(std::equal(lse_memory.begin(), lse_memory.end(), floats(at_once[i].lse)));
  }
  CHECK(counters().launches == launches + kChunks);
  merge_attentions_backward(grad_output, nullptr, merged.output.view(), merged.lse.view(), attn, attn_lse);
  CHECK(counters().launches == launches + kChunks + 3);
  CHECK(last_kernel().find("grad_merge") != std::string::npos);
}

TEST_CASE_FIXTURE(Problem, "a backward that makes no sense is refused before anything is allocated") {
  const Attention part = partial(0, kKeys);
  const std::vector<TensorView> attn{part.output.view()}, lse{part.lse.view()};
  CHECK_THROWS_WITH_AS(merge_attentions_backward(grad_lse, nullptr, attn[0], lse[0], attn, lse),
                       "grad_output: shape [2, 3, 5], expected [2, 5, 3, 24], that of attn", Error);
}

int main(int argc, char** argv) {
#if !ATTUNE_HAVE_LLVM
  std::puts("[SKIP] built without LLVM: there is no compiler for CPU kernels");
  return 77;
#endif
  return doctest::Context(argc, argv).run();
}
