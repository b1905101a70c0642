// Attention in float64, as plainly as the documentation's equivalent code:
//
//   attn = (query * scale) @ key.transpose(-2, -1) + attn_bias
//   output = attn.softmax(-1) @ value
//
// with the two rows that the formula leaves undefined decided: a query that sees no key gets output 0 and
// lse -inf.
#pragma once

#include "attune/attune.h"

#include <optional>
#include <vector>

namespace attune::reference {

/// One attention problem in CPU memory: [B, M, H, K] or [B, M, K], any strides.
struct Inputs {
  TensorView query;
  TensorView key;
  TensorView value;
  AttentionBias bias;
  std::optional<double> scale;  // default head_dim ** -0.5
};

/// What attention computes, dense: output [B, Mq, H, Kv] and lse [B, H, Mq].
struct Values {
  std::vector<double> output;
  std::vector<double> lse;
  double largest_score = 0;  // |scale * q.k| of the visible pairs; by the reference alone
};

Values reference_attention(const Inputs& inputs);

/// The sizes that the documentation names; H is 1 for [B, M, K].
struct Extents {
  int batch, len_q, len_k, heads, head_dim, head_dim_v;
};
Extents extents_of(const Inputs& inputs);

double scale_of(const Inputs& inputs);

}  // namespace attune::reference
