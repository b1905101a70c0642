#include "tools/reference/plain.h"

#include "tools/reference/element.h"
#include "tools/reference/mask.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace attune::reference {

Values plain_attention(const Inputs& inputs) {
  const auto [batch, len_q, len_k, heads, head_dim, head_dim_v] = extents_of(inputs);
  const DType dtype = inputs.query.dtype;
  const std::vector<float> query = dense(inputs.query);
  const std::vector<float> key = dense(inputs.key);
  const std::vector<float> value = dense(inputs.value);
  const Mask mask = mask_of(inputs.bias, len_q, len_k);
  const auto scale = static_cast<float>(scale_of(inputs));

  Values result;
  result.output.resize(std::size_t(batch) * len_q * heads * head_dim_v);
  result.lse.resize(std::size_t(batch) * heads * len_q);
  std::vector<float> scaled(head_dim), weight(len_k), out(head_dim_v);
  for (int b = 0; b < batch; ++b) {
    for (int h = 0; h < heads; ++h) {
      for (int i = 0; i < len_q; ++i) {
        const std::size_t row = (std::size_t(b) * len_q + i) * heads + h;
        for (int d = 0; d < head_dim; ++d) scaled[d] = rounded(dtype, scale * query[row * head_dim + d]);

        float largest = -std::numeric_limits<float>::infinity();
        for (int j = 0; j < len_k; ++j) {
          if (!mask.visible(i, j)) continue;
          const float* k = key.data() + ((std::size_t(b) * len_k + j) * heads + h) * head_dim;
          float dot = 0;
          for (int d = 0; d < head_dim; ++d) dot += scaled[d] * k[d];
          weight[j] = rounded(dtype, dot);
          largest = std::max(largest, weight[j]);
        }
        float sum = 0;
        for (int j = 0; j < len_k; ++j) {
          if (!mask.visible(i, j)) continue;
          weight[j] = std::exp(weight[j] - largest);
          sum += weight[j];
        }
        std::ranges::fill(out, 0.0f);
        for (int j = 0; j < len_k; ++j) {
          if (!mask.visible(i, j)) continue;
          const float* v = value.data() + ((std::size_t(b) * len_k + j) * heads + h) * head_dim_v;
          const float probability = rounded(dtype, weight[j] / sum);
          for (int d = 0; d < head_dim_v; ++d) out[d] += probability * v[d];
        }
        for (int d = 0; d < head_dim_v; ++d) result.output[row * head_dim_v + d] = rounded(dtype, out[d]);
        result.lse[(std::size_t(b) * heads + h) * len_q + i] = largest + std::log(sum);
      }
    }
  }
  return result;
}

}  // namespace attune::reference
