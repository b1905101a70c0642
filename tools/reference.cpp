#include "tools/reference.h"

#include "attune/num.h"
#include "attune/semantics.h"
#include "tools/parallel.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>

namespace attune::tools {
namespace {

using kernel::DType;
using kernel::i32;
using kernel::i64;
using kernel::u16;

// make_window turns an open edge into one beyond the matrix, so one predicate serves every bias.
constexpr kernel::KernelSpec kWindow{.window_left = kernel::Edge::bounded,
                                     .window_right = kernel::Edge::bounded};

float load(const void* data, DType dtype, i64 index) {
  switch (dtype) {
    case DType::f32: return static_cast<const float*>(data)[index];
    case DType::f16: return kernel::f16_to_float(static_cast<const u16*>(data)[index]);
    case DType::bf16: return kernel::bf16_to_float(static_cast<const u16*>(data)[index]);
  }
  return 0;
}

/// Float64 throughout.
struct Exact {
  using Number = double;
  Number operator()(Number x) const { return x; }
};

/// Float32 sums, results in `dtype`.
struct Rounded {
  using Number = float;
  DType dtype;
  Number operator()(Number x) const {
    switch (dtype) {
      case DType::f32: return x;
      case DType::f16: return kernel::f16_to_float(kernel::float_to_f16(x));
      case DType::bf16: return kernel::bf16_to_float(kernel::float_to_bf16(x));
    }
    return x;
  }
};

/// Rows of one head as numbers, [length, dim].
template <typename Number>
std::vector<Number> rows_of(const void* data, DType dtype, i64 start, i64 step, i32 length, i32 dim) {
  std::vector<Number> rows;
  rows.reserve(static_cast<std::size_t>(length) * static_cast<std::size_t>(dim));
  for (i64 i = 0; i < length; ++i) {
    for (i64 d = 0; d < dim; ++d) rows.push_back(load(data, dtype, start + i * step + d));
  }
  return rows;
}

template <typename Number>
Number dot(const Number* a, const Number* b, i32 size) {
  Number sum = 0;
  for (i32 i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

/// Scores to probabilities in place; returns the log-sum-exp. A row that sees no key becomes zeros.
template <typename Round, typename Number>
Number softmax(std::span<Number> scores, Round round) {
  constexpr Number kNegInf = -std::numeric_limits<Number>::infinity();
  Number top = kNegInf;
  for (const Number score : scores) top = std::max(top, score);
  if (top == kNegInf) {
    std::ranges::fill(scores, Number{0});
    return kNegInf;
  }
  Number sum = 0;
  for (Number& score : scores) {
    score = std::exp(score - top);
    sum += score;
  }
  for (Number& score : scores) score = round(score / sum);
  return top + std::log(sum);
}

template <typename Round>
void attend_head(const runtime::Call& call, Round round, i64 batch, i64 head, Answer& answer) {
  using Number = typename Round::Number;
  const kernel::ForwardParams& p = call.params;
  const DType dtype = call.problem.dtype;
  const i32 dim = call.problem.head_dim;
  const i32 dim_v = call.problem.head_dim_v;
  const auto rows = [&](const void* data, const kernel::Strides& strides, i32 length, i32 width) {
    return rows_of<Number>(data, dtype, batch * strides.batch + head * strides.head, strides.seq, length,
                           width);
  };
  std::vector<Number> query = rows(p.query, p.query_strides, p.len_q, dim);
  const std::vector<Number> key = rows(p.key, p.key_strides, p.len_k, dim);
  const std::vector<Number> value = rows(p.value, p.value_strides, p.len_k, dim_v);
  for (Number& x : query) x = round(x * static_cast<Number>(p.scale));

  std::vector<Number> scores(static_cast<std::size_t>(p.len_k));
  std::vector<Number> sums(static_cast<std::size_t>(dim_v));
  for (i32 i = 0; i < p.len_q; ++i) {
    for (i32 j = 0; j < p.len_k; ++j) {
      const bool seen = kernel::visible<kWindow>(p.window, p.len_k, i, j);
      scores[j] = seen ? round(dot(&query[i64{i} * dim], &key[i64{j} * dim], dim))
                       : -std::numeric_limits<Number>::infinity();
    }
    answer.lse[(batch * p.heads + head) * p.len_q + i] = softmax(std::span(scores), round);
    std::ranges::fill(sums, Number{0});
    for (i32 j = 0; j < p.len_k; ++j) {
      // A key that is not seen has no say, whatever its value holds: 0 * NaN must not reach the sum.
      if (!kernel::visible<kWindow>(p.window, p.len_k, i, j)) continue;
      for (i32 d = 0; d < dim_v; ++d) sums[d] += scores[j] * value[i64{j} * dim_v + d];
    }
    double* out = &answer.output[((batch * p.len_q + i) * p.heads + head) * dim_v];
    std::ranges::transform(sums, out, round);
  }
}

template <typename Round>
Answer attend(const runtime::Call& call, Round round) {
  const kernel::ForwardParams& p = call.params;
  const auto heads = static_cast<std::size_t>(p.batch) * static_cast<std::size_t>(p.heads);
  const std::size_t rows = heads * static_cast<std::size_t>(p.len_q);
  Answer answer{.output = std::vector<double>(rows * static_cast<std::size_t>(call.problem.head_dim_v)),
                .lse = std::vector<double>(rows)};
  parallel_for(heads, default_jobs(), [&](std::size_t i) {
    const auto index = static_cast<i64>(i);
    attend_head(call, round, index / p.heads, index % p.heads, answer);
  });
  return answer;
}

}  // namespace

Answer reference_attention(const runtime::Call& call) {
  return attend(call, Exact{});
}

Answer plain_attention(const runtime::Call& call) {
  return attend(call, Rounded{call.problem.dtype});
}

double error_bound(double plain_error, double magnitude) {
  return 2 * plain_error + 4 * double{std::numeric_limits<float>::epsilon()} * magnitude;
}

double largest_magnitude(const std::vector<double>& values, double floor) {
  for (const double value : values) {
    if (std::isfinite(value)) floor = std::max(floor, std::abs(value));
  }
  return floor;
}

double max_abs_error(const std::vector<double>& values, const std::vector<double>& expected) {
  double worst = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] == expected[i] || (std::isnan(values[i]) && std::isnan(expected[i]))) continue;
    const double error = std::abs(values[i] - expected[i]);
    worst = std::max(worst, std::isnan(error) ? std::numeric_limits<double>::infinity() : error);
  }
  return worst;
}

std::vector<double> to_double(const void* data, DType dtype, std::size_t count) {
  std::vector<double> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = load(data, dtype, static_cast<i64>(i));
  return values;
}

}  // namespace attune::tools
