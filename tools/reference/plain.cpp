#include "tools/reference/plain.h"

#include "tools/reference/element.h"
#include "tools/reference/rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace attune::reference {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

/// The type of scores once the bias has been added: another type's makes them float32.
DType type_of_scores(const Inputs& inputs) {
  const auto& bias = inputs.bias.tensor;
  const bool widens = bias && bias->dtype != DType::boolean && bias->dtype != inputs.query.dtype;
  return widens ? DType::f32 : inputs.query.dtype;
}

void store_rounded(DType dtype, const std::vector<float>& out, double* output) {
  for (std::size_t d = 0; d < out.size(); ++d) output[d] = rounded(dtype, out[d]);
}

/// Scores of a query's keys, and the softmax over them.
class Softmax {
 public:
  explicit Softmax(const Inputs& inputs)
      : dtype_(inputs.query.dtype),
        score_dtype_(type_of_scores(inputs)),
        drops_(inputs.p > 0),
        scale_(static_cast<float>(scale_of(inputs))),
        rescale_(static_cast<float>(rescale_of(inputs))),
        scaled_(extents_of(inputs).head_dim) {}

  void read(const QueryRow& row) {
    for (std::size_t d = 0; d < scaled_.size(); ++d) scaled_[d] = rounded(dtype_, scale_ * row.query[d]);
    weight_.clear();
    largest_ = kNothing;
    for (const SeenKey& seen : row.keys) {
      float dot = 0;
      for (std::size_t d = 0; d < scaled_.size(); ++d) dot += scaled_[d] * seen.key[d];
      weight_.push_back(rounded(score_dtype_, rounded(dtype_, dot) + seen.bias));
      largest_ = std::max(largest_, weight_.back());
    }
    if (sees_nothing()) return;
    sum_ = 0;
    for (float& w : weight_) {
      w = std::exp(w - largest_);
      sum_ += w;
    }
  }

  bool sees_nothing() const { return largest_ == kNothing; }
  float lse() const { return largest_ + std::log(sum_); }
  /// scale * query
  const std::vector<float>& scaled() const { return scaled_; }
  float probability(std::size_t j) const { return rounded(score_dtype_, weight_[j] / sum_); }
  /// What the value is multiplied with: the probability after dropout.
  float weight(std::size_t j, const SeenKey& seen) const {
    return dropped(seen, rounded(dtype_, weight_[j] / sum_));
  }
  /// Dropout of one number.
  float dropped(const SeenKey& seen, float x) const {
    if (!drops_) return x;
    return seen.kept ? rounded(dtype_, x * rescale_) : 0;
  }

 private:
  DType dtype_, score_dtype_;
  bool drops_;
  float scale_, rescale_;
  std::vector<float> scaled_, weight_;
  float largest_ = kNothing, sum_ = 0;
};

void add_row(std::vector<float>& sums, std::size_t at, const float* row, std::size_t count, float factor) {
  for (std::size_t d = 0; d < count; ++d) sums[at + d] += factor * row[d];
}

Gradient gradient_of(DType dtype, const std::vector<float>& sums) {
  Gradient gradient;
  gradient.values.resize(sums.size());
  store_rounded(dtype, sums, gradient.values.data());
  return gradient;
}

}  // namespace

Values plain_attention(const Inputs& inputs) {
  const Extents e = extents_of(inputs);
  const DType output_dtype = inputs.output_dtype.value_or(inputs.query.dtype);
  Values result = zeros(e);
  Softmax softmax(inputs);
  std::vector<float> out(e.head_dim_v);
  for_each_row(inputs, [&](const QueryRow& row) {
    softmax.read(row);
    result.lse[row.lse] = kNothing;
    if (softmax.sees_nothing()) return;

    std::ranges::fill(out, 0.0f);
    for (std::size_t j = 0; j < row.keys.size(); ++j) {
      add_row(out, 0, row.keys[j].value, out.size(), softmax.weight(j, row.keys[j]));
    }
    store_rounded(output_dtype, out, result.output.data() + row.output);
    result.lse[row.lse] = softmax.lse();
  });
  return result;
}

GradientValues plain_backward(const BackwardInputs& inputs) {
  const Inputs& forward = inputs.forward;
  const Extents e = extents_of(forward);
  const DType dtype = forward.query.dtype;
  const DType score_dtype = type_of_scores(forward);
  const auto scale = static_cast<float>(scale_of(forward));
  const auto columns = static_cast<std::size_t>(e.head_dim);
  const auto columns_v = static_cast<std::size_t>(e.head_dim_v);
  std::vector<float> grad_query(count_of(forward.query)), grad_key(count_of(forward.key)),
      grad_value(count_of(forward.value)),
      grad_bias(has_bias_gradient(forward) ? count_of(*forward.bias.tensor) : 0);
  Softmax softmax(forward);
  std::vector<float> grad(columns_v);
  for_each_row(forward, [&](const QueryRow& row) {
    softmax.read(row);
    if (softmax.sees_nothing()) return;

    float delta = inputs.grad_lse.empty() ? 0 : -static_cast<float>(inputs.grad_lse[row.lse]);
    for (std::size_t d = 0; d < columns_v; ++d) {
      grad[d] = rounded(dtype, static_cast<float>(inputs.grad_output[row.output + d]));
      delta += grad[d] * static_cast<float>(inputs.output[row.output + d]);
    }
    for (std::size_t j = 0; j < row.keys.size(); ++j) {
      const SeenKey& seen = row.keys[j];
      add_row(grad_value, seen.value_row, grad.data(), columns_v, softmax.weight(j, seen));
      float dot = 0;
      for (std::size_t d = 0; d < columns_v; ++d) dot += grad[d] * seen.value[d];
      const float grad_weight = softmax.dropped(seen, rounded(dtype, dot));
      const float grad_score = rounded(score_dtype, softmax.probability(j) * (grad_weight - delta));
      if (!grad_bias.empty()) grad_bias[seen.bias_at] += grad_score;
      add_row(grad_query, row.query_row, seen.key, columns, rounded(dtype, grad_score));
      add_row(grad_key, seen.key_row, softmax.scaled().data(), columns, rounded(dtype, grad_score));
    }
    for (std::size_t d = row.query_row; d < row.query_row + columns; ++d) {
      grad_query[d] = scale * rounded(dtype, grad_query[d]);
    }
  });
  GradientValues result{
      gradient_of(dtype, grad_query), gradient_of(dtype, grad_key), gradient_of(dtype, grad_value), {}};
  if (!grad_bias.empty()) result.bias = gradient_of(forward.bias.tensor->dtype, grad_bias);
  return result;
}

Values plain_merge(const MergeInputs& inputs) {
  const Extents e = extents_of(inputs);
  const DType output_dtype = inputs.output_dtype.value_or(inputs.attn.front().dtype);
  Values result = zeros(e);
  std::vector<float> out(e.head_dim_v);
  for_each_row(inputs, [&](const MergedRow& row) {
    float largest = kNothing;
    for (const MergedRow::Chunk& chunk : row.chunks) largest = std::max(largest, chunk.lse);
    result.lse[row.lse] = kNothing;
    if (largest == kNothing) return;

    std::ranges::fill(out, 0.0f);
    float sum = 0;
    for (const MergedRow::Chunk& chunk : row.chunks) {
      const float weight = std::exp(chunk.lse - largest);
      sum += weight;
      for (int d = 0; d < e.head_dim_v; ++d) out[d] += weight * chunk.output[d];
    }
    for (float& element : out) element /= sum;
    store_rounded(output_dtype, out, result.output.data() + row.output);
    result.lse[row.lse] = largest + std::log(sum);
  });
  return result;
}

}  // namespace attune::reference
