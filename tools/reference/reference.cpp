#include "tools/reference/reference.h"

#include "tools/reference/element.h"
#include "tools/reference/mask.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace attune::reference {

Extents extents_of(const Inputs& inputs) {
  const TensorView& q = inputs.query;
  const auto size = [](std::int64_t n) { return static_cast<int>(n); };
  return {.batch = size(q.shape[0]),
          .len_q = size(q.shape[1]),
          .len_k = size(inputs.key.shape[1]),
          .heads = q.rank == 4 ? size(q.shape[2]) : 1,
          .head_dim = size(q.shape[q.rank - 1]),
          .head_dim_v = size(inputs.value.shape[inputs.value.rank - 1])};
}

double scale_of(const Inputs& inputs) {
  return inputs.scale.value_or(1.0 / std::sqrt(static_cast<double>(extents_of(inputs).head_dim)));
}

Values reference_attention(const Inputs& inputs) {
  const auto [batch, len_q, len_k, heads, head_dim, head_dim_v] = extents_of(inputs);
  const std::vector<float> query = dense(inputs.query);
  const std::vector<float> key = dense(inputs.key);
  const std::vector<float> value = dense(inputs.value);
  const Mask mask = mask_of(inputs.bias, len_q, len_k);
  const double scale = scale_of(inputs);

  Values result;
  result.output.resize(std::size_t(batch) * len_q * heads * head_dim_v);
  result.lse.resize(std::size_t(batch) * heads * len_q);
  std::vector<double> score(len_k);
  for (int b = 0; b < batch; ++b) {
    for (int h = 0; h < heads; ++h) {
      for (int i = 0; i < len_q; ++i) {
        const float* q = query.data() + ((std::size_t(b) * len_q + i) * heads + h) * head_dim;
        double largest = -std::numeric_limits<double>::infinity();
        for (int j = 0; j < len_k; ++j) {
          if (!mask.visible(i, j)) continue;
          const float* k = key.data() + ((std::size_t(b) * len_k + j) * heads + h) * head_dim;
          double dot = 0;
          for (int d = 0; d < head_dim; ++d) dot += double{q[d]} * k[d];
          score[j] = scale * dot;
          largest = std::max(largest, score[j]);
          result.largest_score = std::max(result.largest_score, std::abs(score[j]));
        }
        double* out = result.output.data() + ((std::size_t(b) * len_q + i) * heads + h) * head_dim_v;
        double sum = 0;
        for (int j = 0; j < len_k; ++j) {
          if (!mask.visible(i, j)) continue;
          const float* v = value.data() + ((std::size_t(b) * len_k + j) * heads + h) * head_dim_v;
          const double weight = std::exp(score[j] - largest);
          sum += weight;
          for (int d = 0; d < head_dim_v; ++d) out[d] += weight * v[d];
        }
        if (sum > 0) {
          for (int d = 0; d < head_dim_v; ++d) out[d] /= sum;
        }
        result.lse[(std::size_t(b) * heads + h) * len_q + i] = largest + std::log(sum);
      }
    }
  }
  return result;
}

}  // namespace attune::reference
