#include "tools/reference/reference.h"

#include "tools/reference/rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace attune::reference {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

double dot(const float* a, const float* b, int count) {
  double sum = 0;
  for (int d = 0; d < count; ++d) sum += double{a[d]} * b[d];
  return sum;
}

void keep_largest(double& largest, double x) {
  if (x > largest) largest = x;
}

void keep_largest_magnitude(double& largest, const float* elements, int count) {
  for (int d = 0; d < count; ++d) keep_largest(largest, std::abs(double{elements[d]}));
}

}  // namespace

Values reference_attention(const Inputs& inputs) {
  const Extents e = extents_of(inputs);
  const double scale = scale_of(inputs);
  const double rescale = rescale_of(inputs);
  Values result = zeros(e);
  std::vector<double> product, score;
  for_each_row(inputs, [&](const QueryRow& row) {
    product.clear();
    score.clear();
    double largest = kNothing;
    for (const SeenKey& seen : row.keys) {
      product.push_back(scale * dot(row.query, seen.key, e.head_dim));
      score.push_back(product.back() + seen.bias);
      keep_largest(largest, score.back());
    }
    result.lse[row.lse] = kNothing;
    if (largest == kNothing) return;

    double* out = result.output.data() + row.output;
    double sum = 0, magnitude = 0;
    for (std::size_t j = 0; j < row.keys.size(); ++j) {
      const SeenKey& seen = row.keys[j];
      const double weight = std::exp(score[j] - largest);
      if (weight == 0) continue;
      sum += weight;
      magnitude += weight * (std::abs(product[j]) + std::abs(seen.bias));
      if (!seen.kept) continue;
      for (int d = 0; d < e.head_dim_v; ++d) out[d] += rescale * weight * seen.value[d];
      keep_largest_magnitude(result.value_magnitude, seen.value, e.head_dim_v);
    }
    for (int d = 0; d < e.head_dim_v; ++d) out[d] /= sum;
    result.lse[row.lse] = largest + std::log(sum);
    keep_largest(result.score_magnitude, magnitude / sum);
  });
  result.value_magnitude *= rescale;
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
