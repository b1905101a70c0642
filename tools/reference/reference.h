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

/// One attention problem in CPU memory: [B, M, H, K], [B, M, K] or [B, M, G, H, K], any strides. Key and value
/// may have fewer heads, as memory_efficient_attention_forward says.
struct Inputs {
  TensorView query;
  TensorView key;
  TensorView value;
  AttentionBias bias;
  std::optional<double> scale;  // default head_dim ** -0.5
  double p = 0;
  DropoutState dropout;
  std::optional<DType> output_dtype;  // what plain.h rounds its output to; default the query's
};

/// What attention computes, dense: output [B, Mq, G, H, Kv] and lse [B, G, H, Mq] (G * H is the query's heads).
struct Values {
  std::vector<double> output;
  std::vector<double> lse;
  double largest_score = 0;  // |scale * q.k + bias|, infinite ones apart, of the visible pairs; by the reference alone
};

Values reference_attention(const Inputs& inputs);

/// The sizes that the documentation names. Query head h of the G * H uses head h / (G * H / heads_k) of key and
/// value.
struct Extents {
  int batch, len_q, len_k, groups, heads, head_dim, head_dim_v;
};
Extents extents_of(const Inputs& inputs);

double scale_of(const Inputs& inputs);

}  // namespace attune::reference
