#include "tests/unit/plain_backward.h"

#include "attune/blocks.h"
#include "attune/num.h"
#include "attune/philox.h"
#include "attune/semantics.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace attune::test {

using namespace kernel;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

}  // namespace

void Tensor::set(i64 at, double number) {
  const auto x = static_cast<float>(number);
  const std::uint16_t half = dtype_ == DType::f16 ? float_to_f16(x) : float_to_bf16(x);
  std::memcpy(bytes_.data() + at * size_of(dtype_),
              dtype_ == DType::f32 ? static_cast<const void*>(&x) : &half, size_of(dtype_));
}

double Tensor::get(i64 at) const {
  float x = 0;
  std::uint16_t half = 0;
  std::memcpy(dtype_ == DType::f32 ? static_cast<void*>(&x) : &half, bytes_.data() + at * size_of(dtype_),
              size_of(dtype_));
  return dtype_ == DType::f32 ? x : dtype_ == DType::f16 ? f16_to_float(half) : bf16_to_float(half);
}

double rounded_to(DType dtype, double number) {
  Tensor one(dtype, 1, number);
  return one.get(0);
}

std::vector<PlainBlock> blocks_of(const Setup& s) {
  std::vector<PlainBlock> blocks;
  if (s.q_start.empty()) {
    for (int b = 0; b < s.batch; ++b) {
      blocks.push_back({b, b, 0, s.len_q, Table(s.len_k)});
      for (int j = 0; j < s.len_k; ++j) blocks[b].key_rows[j] = j;
    }
    return blocks;
  }
  const int sequences = static_cast<int>(s.k_len.size());
  for (int b = 0; b < sequences; ++b) {
    blocks.push_back({b, 0, s.q_start[b], s.q_start[b + 1] - s.q_start[b], Table(s.k_len[b])});
    const int width = static_cast<int>(s.pages.size()) / sequences;
    for (int j = 0; j < s.k_len[b]; ++j) {
      const int logical = s.k_start[b] + j;
      blocks[b].key_rows[j] =
          s.page_size == 0 ? logical
                           : s.pages[b * width + logical / s.page_size] * s.page_size + logical % s.page_size;
    }
  }
  return blocks;
}

Strides strides_of(const Setup& s, int rows, int dim, Shared shared) {
  const i64 head = dim + 3, group = head * s.heads + 1, seq = group * s.groups + 2;
  return {.batch = shared.batch ? 0 : seq * rows,
          .seq = seq,
          .group = shared.group ? 0 : group,
          .head = shared.head ? 0 : head};
}

PlainBackward::PlainBackward(const Setup& setup, Random& random)
    : s_(setup),
      query_(input(problem().dtype, s_.len_q, problem().head_dim, {}, p().query_strides)),
      key_(input(problem().dtype, s_.len_k, problem().head_dim, s_.keys, p().key_strides)),
      value_(input(problem().dtype, s_.len_k, problem().head_dim_v, s_.values, p().value_strides)),
      output_(input(problem().output_dtype, s_.len_q, problem().head_dim_v, {}, p().output_strides)),
      grad_output_(gradient_input()),
      bias_(bias_input()) {
  p().batch = s_.batch;
  p().groups = s_.groups;
  p().heads = s_.heads;
  p().len_q = s_.len_q;
  p().len_k = s_.len_k;
  p().scale = s_.scale;
  p().reach = make_reach(s_.anchor, s_.left, s_.right);
  p().window = window_of(p().reach, s_.len_q, s_.len_k);
  p().dropout = make_dropout(s_.drops, 77, 3);
  if (!s_.q_start.empty()) {
    p().sequences = {.count = static_cast<i32>(s_.k_len.size()),
                     .q_start = s_.q_start.data(),
                     .k_start = s_.k_start.data(),
                     .k_len = s_.k_len.data()};
  }
  if (s_.page_size != 0) {
    p().sequences.pages = s_.pages.data();
    p().sequences.table_width = static_cast<i32>(s_.pages.size() / s_.k_len.size());
    p().sequences.page_size = make_divider(s_.page_size);
  }
  fill(random);
  for_each_query([&](const PlainBlock& block, int group, int head, int i) { attend(block, group, head, i); });
  for_each_query([&](const PlainBlock& block, int group, int head, int i) {
    if (block.index == s_.nan_block)
      query_.set(at(p().query_strides, block, block.q_begin + i, group, head), kNan);
  });
}

Tensor PlainBackward::input(DType dtype, int rows, int dim, Shared shared, Strides& strides) {
  strides = strides_of(s_, rows, dim, shared);
  return {dtype,
          (s_.batch - 1) * strides.batch + (rows - 1) * strides.seq + (s_.groups - 1) * strides.group +
              (s_.heads - 1) * strides.head + dim,
          kNan};
}

Tensor PlainBackward::gradient_input() {
  Tensor tensor =
      input(problem().output_dtype, s_.len_q, problem().head_dim_v, {}, params_.grad_output_strides);
  if (s_.grad_column == 1) return tensor;
  Strides& strides = params_.grad_output_strides;
  for (i64* stride : {&strides.batch, &strides.seq, &strides.group, &strides.head}) *stride *= s_.grad_column;
  params_.grad_output_column = s_.grad_column;
  return {tensor.dtype(), (tensor.count() - 1) * s_.grad_column + 1, kNan};
}

Tensor PlainBackward::bias_input() {
  const DType dtype = problem().bias == Bias::f16    ? DType::f16
                      : problem().bias == Bias::bf16 ? DType::bf16
                                                     : DType::f32;
  BiasStrides& strides = p().bias_strides;
  strides.key = s_.bias_columns_apart ? 3 : 1;
  strides.query = s_.len_k * strides.key + 2;
  strides.head = s_.len_q * strides.query + 1;
  strides.group = strides.head * s_.heads;
  strides.batch = strides.group * s_.groups;
  if (s_.bias.query) strides.query = 0;
  if (s_.bias.head) strides.head = 0;
  if (s_.bias.group) strides.group = 0;
  if (s_.bias.batch) strides.batch = 0;
  if (problem().bias == Bias::none) return {dtype, 1, kNan};
  const i64 count = (s_.batch - 1) * strides.batch + (s_.groups - 1) * strides.group +
                    (s_.heads - 1) * strides.head + (s_.len_q - 1) * strides.query +
                    (s_.len_k - 1) * strides.key + 1;
  return {dtype, problem().bias == Bias::boolean ? ceil_div(static_cast<i32>(count), 4) : count, kNan};
}

bool PlainBackward::visible(const PlainBlock& block, int i, int j) const {
  const int shift =
      s_.anchor == Anchor::bottom_right ? static_cast<int>(block.key_rows.size()) - block.len_q : 0;
  return (s_.left < 0 || j >= i + shift - s_.left) && (s_.right < 0 || j <= i + shift + s_.right);
}

i64 PlainBackward::number_at(const PlainBlock& block, int group, int head, int i) const {
  const Strides& strides = params_.lse.strides;
  return (s_.padded_lse ? block.index : block.batch) * strides.batch + group * strides.group +
         head * strides.head + (s_.padded_lse ? 0 : block.q_begin) + i;
}

void PlainBackward::fill(Random& random) {
  const auto set_row = [&](Tensor& tensor, i64 first, int dim, i64 column = 1) {
    for (int c = 0; c < dim; ++c) tensor.set(first + c * column, random.normal());
  };
  const Problem& wanted = problem();
  const int count = s_.batch * s_.groups * s_.heads * s_.len_q;
  const int longest = s_.padded_lse ? s_.len_q : 0;
  const int sequences = std::max<int>(1, static_cast<int>(s_.k_len.size()));
  params_.lse.strides = {
      .batch = s_.groups * s_.heads * s_.len_q, .seq = 1, .group = s_.heads * s_.len_q, .head = s_.len_q};
  params_.lse.length = s_.len_q;
  params_.lse.per_sequence = s_.padded_lse;
  lse_.assign(s_.padded_lse ? sequences * s_.groups * s_.heads * longest : count, static_cast<float>(kNan));
  grad_lse_.assign(lse_.size(), 0);
  for (float& x : grad_lse_) x = static_cast<float>(random.normal());
  params_.grad_lse = params_.lse;
  params_.grad_lse.data = grad_lse_.data();

  for_each_query([&](const PlainBlock& block, int group, int head, int i) {
    const int row = block.q_begin + i;
    int seen = 0;
    for (int j = 0; j < static_cast<int>(block.key_rows.size()); ++j) {
      if (!visible(block, i, j)) continue;
      ++seen;
      const int key_row = block.key_rows[j];
      const i64 key = at(p().key_strides, block, key_row, group, head);
      const i64 value = at(p().value_strides, block, key_row, group, head);
      if (std::isnan(key_.get(key))) set_row(key_, key, wanted.head_dim);
      if (std::isnan(value_.get(value))) set_row(value_, value, wanted.head_dim_v);
      const i64 bias = bias_at(p().bias_strides, block, group, head, i, j);
      if (wanted.bias == Bias::boolean) {
        reinterpret_cast<std::uint8_t*>(bias_.data())[bias] = random.chance(0.8) && i != 3 ? 7 : 0;
      } else if (wanted.bias != Bias::none && std::isnan(bias_.get(bias))) {
        bias_.set(bias, random.normal());
      }
    }
    if (seen == 0) return;  // whatever its rows hold
    set_row(query_, at(p().query_strides, block, row, group, head), wanted.head_dim);
    set_row(grad_output_, at(params_.grad_output_strides, block, row, group, head), wanted.head_dim_v,
            s_.grad_column);
  });
}

double PlainBackward::score(const PlainBlock& block, int group, int head, int i, int j) const {
  if (!visible(block, i, j)) return -kInf;
  const i64 query = at(p().query_strides, block, block.q_begin + i, group, head);
  const i64 key = at(p().key_strides, block, block.key_rows[j], group, head);
  double sum = 0;
  for (int c = 0; c < problem().head_dim; ++c) sum += query_.get(query + c) * key_.get(key + c);
  sum *= s_.scale;
  if (problem().bias == Bias::none) return sum;
  const i64 bias = bias_at(p().bias_strides, block, group, head, i, j);
  if (problem().bias != Bias::boolean) return sum + bias_.get(bias);
  return bias_.data()[bias] != std::byte{0} ? sum : -kInf;
}

void PlainBackward::attend(const PlainBlock& block, int group, int head, int i) {
  std::vector<double> sums(problem().head_dim_v);
  double total = 0;
  for (int j = 0; j < static_cast<int>(block.key_rows.size()); ++j) {
    const double weight = std::exp(score(block, group, head, i, j));
    total += weight;
    const bool kept = dropout_keeps(p().dropout, block.index, group * s_.heads + head, i, j);
    if (weight == 0 || !kept) continue;
    const i64 value = at(p().value_strides, block, block.key_rows[j], group, head);
    for (int c = 0; c < problem().head_dim_v; ++c)
      sums[c] += weight * p().dropout.rescale * value_.get(value + c);
  }
  // A backward pass takes either infinity for a query that saw nothing.
  lse_[number_at(block, group, head, i)] =
      static_cast<float>(total == 0 ? (i % 2 == 0 ? kInf : -kInf) : std::log(total));
  if (total == 0) return;
  const i64 output = at(p().output_strides, block, block.q_begin + i, group, head);
  for (int c = 0; c < problem().head_dim_v; ++c) output_.set(output + c, sums[c] / total);
}

double PlainBackward::grad_output(const PlainBlock& block, int group, int head, int i, int c) const {
  const i64 row = at(params_.grad_output_strides, block, block.q_begin + i, group, head);
  return rounded_to(problem().dtype, grad_output_.get(row + c * s_.grad_column));
}

std::vector<Pair> PlainBackward::pairs_of(const PlainBlock& block, int group, int head, int i) const {
  std::vector<Pair> pairs;
  const i64 number = number_at(block, group, head, i);
  if (std::isinf(lse_[number])) return pairs;
  const i64 output = at(p().output_strides, block, block.q_begin + i, group, head);
  const i64 gradient = at(params_.grad_output_strides, block, block.q_begin + i, group, head);
  double delta = -grad_lse_[number], delta_magnitude = std::abs(delta);
  for (int c = 0; c < problem().head_dim_v; ++c) {
    const double product = rounded_to(problem().dtype, grad_output_.get(gradient + c * s_.grad_column)) *
                           output_.get(output + c);
    delta += product;
    delta_magnitude += std::abs(product);
  }
  for (int j = 0; j < static_cast<int>(block.key_rows.size()); ++j) {
    const double weight = std::exp(score(block, group, head, i, j) - lse_[number]);
    if (weight == 0) continue;
    const bool kept = dropout_keeps(p().dropout, block.index, group * s_.heads + head, i, j);
    const double factor = kept ? p().dropout.rescale : 0;
    const i64 value = at(p().value_strides, block, block.key_rows[j], group, head);
    Pair pair{j, weight * factor, -weight * delta, weight * delta_magnitude};
    for (int c = 0; c < problem().head_dim_v; ++c) {
      const double product = weight * factor * grad_output(block, group, head, i, c) * value_.get(value + c);
      pair.grad_score += product;
      pair.magnitude += std::abs(product);
    }
    pairs.push_back(pair);
  }
  return pairs;
}

}  // namespace attune::test
