// Attention in float64, as plainly as the documentation's equivalent code:
//
//   attn = (query * scale) @ key.transpose(-2, -1) + attn_bias
//   attn = dropout(attn.softmax(-1), p)
//   output = attn @ value
//
// with the two rows that the formula leaves undefined decided: a query that sees no key gets output 0 and
// lse -inf. A query whose visible keys all have the score -inf is such a query. And its gradients, as
// attune/backward.h has them; those of such a query are 0.
#pragma once

#include "attune/attune.h"

#include <optional>
#include <vector>

namespace attune::reference {

/// One attention problem in CPU memory: [B, M, H, K], [B, M, K] or [B, M, G, H, K], any strides. Key and
/// value may have fewer heads, as memory_efficient_attention_forward says.
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

/// Attention over some of the keys each, to be merged: [B, M, K], [B, M, H, K] or [B, M, G, H, K], and lse
/// [B, M], [B, H, >= M] or [B, G, H, >= M].
struct MergeInputs {
  std::vector<TensorView> attn;
  std::vector<TensorView> lse;
  std::optional<DType> output_dtype;
};

/// What attention computes, dense: output [B, Mq, H, Kv] and lse [B, H, Mq], where H counts the query's heads
/// over all groups.
struct Values {
  std::vector<double> output;
  std::vector<double> lse;
  /// By the reference alone, for tolerance.h. How large scores are where it matters: for each query the
  /// mean of |scale * q.k| + |bias|, weighted as the keys are, of all queries the largest. Merging: the
  /// largest |lse| of a chunk.
  double score_magnitude = 0;
  /// The largest |value| as the output sums it: with dropout, divided by 1 - p.
  double value_magnitude = 0;
};

Values reference_attention(const Inputs& inputs);
Values reference_merge(const MergeInputs& inputs);

/// A backward pass: gradients of attention, given those of its results. Vectors are dense, in the order of
/// Values.
struct BackwardInputs {
  Inputs forward;
  std::vector<double> grad_output;
  std::vector<double> grad_lse;  // empty: 0
  std::vector<double> output;    // forward's, as the caller has it: rounded
};

/// Of a tensor, row-major in its own shape: summed up over whatever shares one of its elements.
struct Gradient {
  std::vector<double> values;
  /// By the reference alone: what float32 arithmetic costs each element (tolerance.h). It is 0 where every
  /// term of the element is 0, and there alone.
  std::vector<double> tiny;
};

struct GradientValues {
  Gradient query, key, value;
  Gradient bias;  // empty unless there is a bias tensor of numbers
};

GradientValues reference_backward(const BackwardInputs& inputs);

/// The sizes that the documentation names. `heads` are the query's, over all groups.
struct Extents {
  int batch, len_q, len_k, heads, head_dim, head_dim_v;
};
Extents extents_of(const Inputs& inputs);
/// len_k and head_dim are 0.
Extents extents_of(const MergeInputs& inputs);

double scale_of(const Inputs& inputs);

}  // namespace attune::reference
