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

}  // namespace

Values plain_attention(const Inputs& inputs) {
  const Extents e = extents_of(inputs);
  const DType dtype = inputs.query.dtype;
  const DType score_dtype = type_of_scores(inputs);
  const DType output_dtype = inputs.output_dtype.value_or(dtype);
  const auto scale = static_cast<float>(scale_of(inputs));
  const auto rescale = static_cast<float>(rescale_of(inputs));

  Values result = zeros(e);
  std::vector<float> scaled(e.head_dim), weight, out(e.head_dim_v);
  for_each_row(inputs, [&](const QueryRow& row) {
    for (int d = 0; d < e.head_dim; ++d) scaled[d] = rounded(dtype, scale * row.query[d]);
    weight.clear();
    float largest = kNothing;
    for (const SeenKey& seen : row.keys) {
      float dot = 0;
      for (int d = 0; d < e.head_dim; ++d) dot += scaled[d] * seen.key[d];
      weight.push_back(rounded(score_dtype, rounded(dtype, dot) + seen.bias));
      largest = std::max(largest, weight.back());
    }
    result.lse[row.lse] = kNothing;
    if (largest == kNothing) return;

    float sum = 0;
    for (float& w : weight) {
      w = std::exp(w - largest);
      sum += w;
    }
    std::ranges::fill(out, 0.0f);
    for (std::size_t j = 0; j < row.keys.size(); ++j) {
      const SeenKey& seen = row.keys[j];
      if (!seen.kept) continue;
      float w = rounded(dtype, weight[j] / sum);
      if (inputs.p > 0) w = rounded(dtype, w * rescale);
      for (int d = 0; d < e.head_dim_v; ++d) out[d] += w * seen.value[d];
    }
    store_rounded(output_dtype, out, result.output.data() + row.output);
    result.lse[row.lse] = largest + std::log(sum);
  });
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
