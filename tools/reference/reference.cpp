#include "tools/reference/reference.h"

#include "tools/reference/rows.h"
#include "tools/reference/tolerance.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace attune::reference {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

/// A sum, and what its rounding errors in float32 are in proportion to (tolerance.h).
struct Sum {
  double value = 0;
  double magnitude = 0;
};

template <typename A, typename B>
Sum dot(const A* a, const B* b, int count) {
  double sum = 0, squares = 0;
  for (int d = 0; d < count; ++d) {
    const double term = double{a[d]} * b[d];
    sum += term;
    squares += term * term;
  }
  return {sum, std::abs(sum) + std::sqrt(squares)};
}

void keep_largest(double& largest, double x) {
  if (x > largest) largest = x;
}

void keep_largest_magnitude(double& largest, const float* elements, int count) {
  for (int d = 0; d < count; ++d) keep_largest(largest, std::abs(double{elements[d]}));
}

/// The scores of a query's keys.
class Scores {
 public:
  explicit Scores(const Inputs& inputs) : scale_(scale_of(inputs)), head_dim_(extents_of(inputs).head_dim) {}

  void read(const QueryRow& row) {
    product_.clear();
    score_.clear();
    largest_ = kNothing;
    for (const SeenKey& seen : row.keys) {
      product_.push_back(scale_ * dot(row.query, seen.key, head_dim_).value);
      score_.push_back(product_.back() + seen.bias);
      if (std::isnan(score_.back())) largest_ = score_.back();  // for good: nothing is larger
      keep_largest(largest_, score_.back());
    }
  }

  /// -inf where the query sees nothing.
  double largest() const { return largest_; }
  /// exp(score - largest)
  double weight(std::size_t j) const { return std::exp(score_[j] - largest_); }
  /// scale * q.k
  double product(std::size_t j) const { return product_[j]; }
  /// What a float32 score's error is in proportion to.
  double magnitude(std::size_t j, const SeenKey& seen) const {
    return std::abs(product_[j]) + std::abs(seen.bias);
  }

 private:
  double scale_;
  int head_dim_;
  std::vector<double> product_, score_;
  double largest_ = kNothing;
};

/// A gradient whose terms are still being added: of their tiny, the squares.
Gradient no_terms(std::size_t count) {
  return {std::vector<double>(count), std::vector<double>(count)};
}

void add(Gradient& gradient, std::size_t at, double term, double tiny) {
  gradient.values[at] += term;
  gradient.tiny[at] += tiny * tiny;
}

/// Adds factor * row; `tiny` is the factor's.
template <typename Element>
void add_row(Gradient& gradient, std::size_t at, const Element* row, int count, double factor, double tiny) {
  for (int d = 0; d < count; ++d) add(gradient, at + d, factor * row[d], tiny * row[d]);
}

void finish(Gradient& gradient) {
  for (std::size_t i = 0; i < gradient.values.size(); ++i) {
    gradient.tiny[i] = tiny_of(0, std::abs(gradient.values[i])) + std::sqrt(gradient.tiny[i]);
  }
}

}  // namespace

Values reference_attention(const Inputs& inputs) {
  const Extents e = extents_of(inputs);
  const double rescale = rescale_of(inputs);
  Values result = zeros(e);
  Scores scores(inputs);
  for_each_row(inputs, [&](const QueryRow& row) {
    scores.read(row);
    result.lse[row.lse] = kNothing;
    if (scores.largest() == kNothing) return;

    double* out = result.output.data() + row.output;
    double sum = 0, magnitude = 0;
    for (std::size_t j = 0; j < row.keys.size(); ++j) {
      const SeenKey& seen = row.keys[j];
      const double weight = scores.weight(j);
      if (weight == 0) continue;
      sum += weight;
      magnitude += weight * scores.magnitude(j, seen);
      if (!seen.kept) continue;
      for (int d = 0; d < e.head_dim_v; ++d) out[d] += rescale * weight * seen.value[d];
      keep_largest_magnitude(result.value_magnitude, seen.value, e.head_dim_v);
    }
    for (int d = 0; d < e.head_dim_v; ++d) out[d] /= sum;
    result.lse[row.lse] = scores.largest() + std::log(sum);
    keep_largest(result.score_magnitude, magnitude / sum);
  });
  result.value_magnitude *= rescale;
  return result;
}

GradientValues reference_backward(const BackwardInputs& inputs) {
  const Inputs& forward = inputs.forward;
  const Extents e = extents_of(forward);
  const double scale = scale_of(forward);
  const double rescale = rescale_of(forward);
  const bool biased = has_bias_gradient(forward);
  // sqrt(K) / 2 ulps of q.k; tiny_of() takes three for each unit of a score.
  const double dot_roundings = std::sqrt(e.head_dim) / 6;
  const Values values = reference_attention(forward);
  GradientValues result{no_terms(count_of(forward.query)), no_terms(count_of(forward.key)),
                        no_terms(count_of(forward.value)),
                        no_terms(biased ? count_of(*forward.bias.tensor) : 0)};
  Scores scores(forward);
  for_each_row(forward, [&](const QueryRow& row) {
    scores.read(row);
    const double lse = values.lse[row.lse];
    if (lse == kNothing) return;

    const double* grad = inputs.grad_output.data() + row.output;
    const double grad_lse = inputs.grad_lse.empty() ? 0 : inputs.grad_lse[row.lse];
    Sum delta = dot(grad, inputs.output.data() + row.output, e.head_dim_v);
    delta.value -= grad_lse;
    delta.magnitude += std::abs(grad_lse);
    for (std::size_t j = 0; j < row.keys.size(); ++j) {
      const SeenKey& seen = row.keys[j];
      const double probability = scores.weight(j) * std::exp(scores.largest() - lse);
      if (probability == 0) continue;
      const double kept = seen.kept ? rescale : 0;
      const Sum grad_weight = dot(grad, seen.value, e.head_dim_v);
      const double grad_score = probability * (kept * grad_weight.value - delta.value);
      const double score =
          scores.magnitude(j, seen) + dot_roundings * std::abs(scores.product(j)) + std::abs(lse);
      const double tiny = tiny_of(score, probability * (kept * grad_weight.magnitude + delta.magnitude));
      add_row(result.value, seen.value_row, grad, e.head_dim_v, probability * kept,
              tiny_of(score, probability * kept));
      add_row(result.query, row.query_row, seen.key, e.head_dim, scale * grad_score, scale * tiny);
      add_row(result.key, seen.key_row, row.query, e.head_dim, scale * grad_score, scale * tiny);
      if (biased) add(result.bias, seen.bias_at, grad_score, tiny);
    }
  });
  for (Gradient* gradient : {&result.query, &result.key, &result.value, &result.bias}) finish(*gradient);
  return result;
}

Values reference_merge(const MergeInputs& inputs) {
  const Extents e = extents_of(inputs);
  Values result = zeros(e);
  for_each_row(inputs, [&](const MergedRow& row) {
    double largest = kNothing;
    for (const MergedRow::Chunk& chunk : row.chunks) {
      keep_largest(largest, chunk.lse);
      keep_largest(result.score_magnitude, std::abs(chunk.lse));
      keep_largest_magnitude(result.value_magnitude, chunk.output, e.head_dim_v);
    }
    result.lse[row.lse] = kNothing;
    if (largest == kNothing) return;

    double* out = result.output.data() + row.output;
    double sum = 0;
    for (const MergedRow::Chunk& chunk : row.chunks) {
      const double weight = std::exp(chunk.lse - largest);
      sum += weight;
      for (int d = 0; d < e.head_dim_v; ++d) out[d] += weight * chunk.output[d];
    }
    for (int d = 0; d < e.head_dim_v; ++d) out[d] /= sum;
    result.lse[row.lse] = largest + std::log(sum);
  });
  return result;
}

}  // namespace attune::reference
