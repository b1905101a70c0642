#include "tools/reference/rows.h"

#include "attune/philox.h"
#include "tools/reference/element.h"
#include "tools/reference/mask.h"

#include <array>
#include <cmath>
#include <limits>

namespace attune::reference {
namespace {

int size(std::int64_t n) {
  return static_cast<int>(n);
}

/// Heads over all groups.
int heads_of(const TensorView& t) {
  return t.rank == 5 ? size(t.shape[2] * t.shape[3]) : t.rank == 4 ? size(t.shape[2]) : 1;
}

Extents extents_of_rows(const TensorView& query, int len_k, int head_dim, int head_dim_v) {
  return {.batch = size(query.shape[0]),
          .len_q = size(query.shape[1]),
          .len_k = len_k,
          .heads = heads_of(query),
          .head_dim = head_dim,
          .head_dim_v = head_dim_v};
}

/// A tensor's rows as floats.
class Rows {
 public:
  explicit Rows(const TensorView& t)
      : elements_(dense(t)), len_(size(t.shape[1])), heads_(heads_of(t)), dim_(size(t.shape[t.rank - 1])) {}

  /// Where the row begins, row-major.
  std::size_t offset(int batch, int row, int head) const {
    return ((std::size_t(batch) * len_ + row) * heads_ + head) * dim_;
  }
  const float* at(std::size_t offset) const { return elements_.data() + offset; }

 private:
  std::vector<float> elements_;
  int len_, heads_, dim_;
};

/// The head of `t` that serves a query's head. In 4-D, fewer heads serve neighbours; in 5-D, an axis of
/// extent 1 serves all.
int serving_head(const TensorView& t, const TensorView& query, int head) {
  if (t.rank < 5) return head / (heads_of(query) / heads_of(t));
  const int heads = size(query.shape[3]);
  const int group = t.shape[2] == 1 ? 0 : head / heads;
  return group * size(t.shape[3]) + (t.shape[3] == 1 ? 0 : head % heads);
}

/// The bias tensor, [B, H, Mq, Mkv] or [B, G, H, Mq, Mkv] or without the leading axes; those of extent 1
/// serve all.
class BiasTensor {
 public:
  BiasTensor(const AttentionBias& bias, const TensorView& query) {
    if (!bias.tensor) return;
    const TensorView& t = *bias.tensor;
    elements_ = dense(t);
    hides_ = t.dtype == DType::boolean;
    if (query.rank == 5) heads_of_group_ = size(query.shape[3]);
    if (query.rank == 4) heads_of_group_ = size(query.shape[2]);
    const auto extent = [&](int axis) { return axis < 0 ? 1 : size(t.shape[axis]); };
    extents_ = {extent(t.rank >= 3 ? 0 : -1), extent(t.rank == 5 ? 1 : -1),
                extent(t.rank >= 4 ? t.rank - 3 : -1), extent(t.rank - 2), extent(t.rank - 1)};
  }

  /// The element of a query row and a key row, row-major.
  std::size_t offset(int batch, int head, int query, int key) const {
    const std::array index{batch, head / heads_of_group_, head % heads_of_group_, query, key};
    std::size_t at = 0;
    for (std::size_t axis = 0; axis < index.size(); ++axis) {
      at = at * extents_[axis] + (extents_[axis] == 1 ? 0 : index[axis]);
    }
    return at;
  }
  /// What it adds to the score.
  float at(std::size_t offset) const { return elements_.empty() || hides_ ? 0 : elements_[offset]; }
  /// Does a boolean hide the key, whatever the score is?
  bool hides(std::size_t offset) const { return hides_ && elements_[offset] == 0; }

 private:
  std::vector<float> elements_;
  bool hides_ = false;
  int heads_of_group_ = 1;
  std::array<int, 5> extents_{1, 1, 1, 1, 1};  // batch, group, head, query, key
};

kernel::DropoutParams dropout_of(const Inputs& inputs) {
  return kernel::make_dropout(inputs.p, inputs.dropout.seed, inputs.dropout.offset);
}

}  // namespace

void for_each_row(const Inputs& inputs, const std::function<void(const QueryRow&)>& visit) {
  const Extents e = extents_of(inputs);
  const Rows query(inputs.query), key(inputs.key), value(inputs.value);
  const Mask mask(inputs.bias, e.batch, e.len_q, e.len_k);
  const BiasTensor bias(inputs.bias, inputs.query);
  const kernel::DropoutParams dropout = dropout_of(inputs);
  QueryRow row;
  for (const kernel::Block& block : mask.blocks()) {
    for (int head = 0; head < e.heads; ++head) {
      const int key_head = serving_head(inputs.key, inputs.query, head);
      const int value_head = serving_head(inputs.value, inputs.query, head);
      for (int i = 0; i < block.len_q; ++i) {
        const int query_row = block.q_begin + i;
        row.query_row = query.offset(block.batch, query_row, head);
        row.query = query.at(row.query_row);
        row.output = ((std::size_t(block.batch) * e.len_q + query_row) * e.heads + head) * e.head_dim_v;
        row.lse = (std::size_t(block.batch) * e.heads + head) * e.len_q + query_row;
        row.keys.clear();
        for (int j = 0; j < block.len_k; ++j) {
          if (!mask.visible(block, i, j)) continue;
          const int key_row = mask.key_row(block, j);
          SeenKey seen{.kept = dropout.threshold == 0 || dropout_keeps(dropout, block.index, head, i, j),
                       .key_row = key.offset(block.batch, key_row, key_head),
                       .value_row = value.offset(block.batch, key_row, value_head),
                       .bias_at = bias.offset(block.batch, head, query_row, key_row)};
          seen.key = key.at(seen.key_row);
          seen.value = value.at(seen.value_row);
          if (bias.hides(seen.bias_at)) continue;
          seen.bias = bias.at(seen.bias_at);
          row.keys.push_back(seen);
        }
        visit(row);
      }
    }
  }
}

void for_each_row(const MergeInputs& inputs, const std::function<void(const MergedRow&)>& visit) {
  const Extents e = extents_of(inputs);
  std::vector<Rows> attn(inputs.attn.begin(), inputs.attn.end());
  std::vector<std::vector<float>> lse;
  for (const TensorView& chunk : inputs.lse) lse.push_back(dense(chunk));
  MergedRow row;
  for (int b = 0; b < e.batch; ++b) {
    for (int head = 0; head < e.heads; ++head) {
      for (int i = 0; i < e.len_q; ++i) {
        row.output = ((std::size_t(b) * e.len_q + i) * e.heads + head) * e.head_dim_v;
        row.lse = (std::size_t(b) * e.heads + head) * e.len_q + i;
        row.chunks.clear();
        for (std::size_t chunk = 0; chunk < attn.size(); ++chunk) {
          const TensorView& own = inputs.lse[chunk];
          const float one = lse[chunk][(std::size_t(b) * e.heads + head) * own.shape[own.rank - 1] + i];
          if (std::isfinite(one)) row.chunks.push_back({attn[chunk].at(attn[chunk].offset(b, i, head)), one});
        }
        visit(row);
      }
    }
  }
}

Extents extents_of(const Inputs& inputs) {
  return extents_of_rows(inputs.query, size(inputs.key.shape[1]),
                         size(inputs.query.shape[inputs.query.rank - 1]),
                         size(inputs.value.shape[inputs.value.rank - 1]));
}

Extents extents_of(const MergeInputs& inputs) {
  const TensorView& first = inputs.attn.front();
  return extents_of_rows(first, 0, 0, size(first.shape[first.rank - 1]));
}

double scale_of(const Inputs& inputs) {
  return inputs.scale.value_or(1.0 / std::sqrt(static_cast<double>(extents_of(inputs).head_dim)));
}

double rescale_of(const Inputs& inputs) {
  const kernel::u32 threshold = dropout_of(inputs).threshold;
  return threshold == 65536 ? 0.0 : 65536.0 / (65536.0 - threshold);
}

Values zeros(const Extents& e) {
  Values values;
  values.output.resize(std::size_t(e.batch) * e.len_q * e.heads * e.head_dim_v);
  values.lse.resize(std::size_t(e.batch) * e.heads * e.len_q);
  return values;
}

std::size_t count_of(const TensorView& tensor) {
  std::size_t count = 1;
  for (int axis = 0; axis < tensor.rank; ++axis) count *= static_cast<std::size_t>(tensor.shape[axis]);
  return count;
}

bool has_bias_gradient(const Inputs& inputs) {
  return inputs.bias.tensor && inputs.bias.tensor->dtype != DType::boolean;
}

}  // namespace attune::reference
