// The CPU kernels of the backward pass on their own, as the backend calls them, against the formulas of
// attune/backward.h in float64. Whatever lies around rows, between them and in rows of no block is NaN; what
// lies around results is watched; nothing past the end of an input can be read.
#include "attune/backward.h"
#include "attune/num.h"
#include "attune/philox.h"
#include "attune/semantics.h"
#include "codegen/names.h"
#include "tests/support/random.h"
#include "tests/unit/cpu_kernels.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

using namespace attune;
using namespace attune::kernel;
using codegen::Problem;
using test::AtTheEnd;
using test::kernel_of;
using test::on_every_isa;
using test::Random;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kUntouched = -123;  // exact in every type

using Table = std::vector<int>;

/// Elements of a type in memory, all of them one number at first.
class Tensor {
 public:
  Tensor(DType dtype, i64 count, double filling) : dtype_(dtype), bytes_(count * size_of(dtype)) {
    for (i64 at = 0; at < count; ++at) set(at, filling);
  }
  i64 count() const { return static_cast<i64>(bytes_.size()) / size_of(dtype_); }
  DType dtype() const { return dtype_; }
  std::byte* data() { return bytes_.data(); }
  std::size_t bytes() const { return bytes_.size(); }

  void set(i64 at, double number) {
    const auto x = static_cast<float>(number);
    const std::uint16_t half = dtype_ == DType::f16 ? float_to_f16(x) : float_to_bf16(x);
    std::memcpy(bytes_.data() + at * size_of(dtype_),
                dtype_ == DType::f32 ? static_cast<const void*>(&x) : &half, size_of(dtype_));
  }
  double get(i64 at) const {
    float x = 0;
    std::uint16_t half = 0;
    std::memcpy(dtype_ == DType::f32 ? static_cast<void*>(&x) : &half, bytes_.data() + at * size_of(dtype_),
                size_of(dtype_));
    return dtype_ == DType::f32 ? x : dtype_ == DType::f16 ? f16_to_float(half) : bf16_to_float(half);
  }

 private:
  DType dtype_;
  std::vector<std::byte> bytes_;
};

double rounded_to(DType dtype, double number) {
  Tensor one(dtype, 1, number);
  return one.get(0);
}

/// What an element of a result should be, and the sum of the magnitudes of what it was added up from.
struct Expected {
  double value = 0;
  double magnitude = 0;
  bool written = false;

  void add(double x, double size) {
    value += x;
    magnitude += size;
  }
};

/// Which heads and batch entries share a tensor.
struct Shared {
  bool batch = false, group = false, head = false, query = false;
};

struct Setup {
  Problem problem;
  int batch = 1, groups = 1, heads = 1, len_q = 1, len_k = 1;
  Anchor anchor = Anchor::top_left;
  int left = -1, right = -1;
  Table q_start = {}, k_start = {}, k_len = {}, pages = {};  // varlen
  int page_size = 0;
  double drops = 0;
  Shared keys = {}, values = {}, bias = {};
  bool bias_columns_apart = false;
  i64 grad_column = 1;
  bool padded_lse = false;
  int nan_block = -1;  // whose queries are NaN: what is NaN then is not compared
  float scale = 0.25f;
};

/// A block of the attention matrix: its query rows are neighbours, its keys lie anywhere.
struct PlainBlock {
  int index, batch, q_begin, len_q;
  Table key_rows;
};

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

/// [batch, rows, groups, heads, dim] with gaps behind each row of a head; axes that are shared have stride 0.
Strides strides_of(const Setup& s, int rows, int dim, Shared shared = {}) {
  const i64 head = dim + 3, group = head * s.heads + 1, seq = group * s.groups + 2;
  return {.batch = shared.batch ? 0 : seq * rows,
          .seq = seq,
          .group = shared.group ? 0 : group,
          .head = shared.head ? 0 : head};
}

/// A key that a query sees: P Z, dS, and the sum of the magnitudes that dS was added up from.
struct Pair {
  int j;
  double weight;
  double grad_score;
  double magnitude;
};

/// A backward pass and what it should give.
class Backward {
 public:
  Backward(const Setup& setup, Random& random)
      : s_(setup),
        random_(random),
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
    fill();
  }

  /// Runs every kernel and compares.
  void check(const codegen::Arch& arch) {
    const AtTheEnd query(query_.data(), query_.bytes()), key(key_.data(), key_.bytes()),
        value(value_.data(), value_.bytes()), output(output_.data(), output_.bytes()),
        grad_output(grad_output_.data(), grad_output_.bytes()), bias(bias_.data(), bias_.bytes()),
        lse(lse_.data(), lse_.size() * sizeof(float));
    p().query = query.data();
    p().key = key.data();
    p().value = value.data();
    p().output = const_cast<void*>(output.data());
    p().bias = bias.data();
    params_.grad_output = grad_output.data();
    params_.lse.data = static_cast<const float*>(lse.data());
    run_delta(arch);
    check_query(arch);
    check_key_value(arch, s_.keys, true, !differ());
    if (differ()) check_key_value(arch, s_.values, false, true);
    if (problem().bias != Bias::none && problem().bias != Bias::boolean) check_bias(arch);
  }

 private:
  const Problem& problem() const { return s_.problem; }
  ForwardParams& p() { return params_.forward; }
  const ForwardParams& p() const { return params_.forward; }
  bool differ() const { return s_.keys.group != s_.values.group || s_.keys.head != s_.values.head; }
  bool copies() const { return s_.grad_column != 1 || problem().output_dtype != problem().dtype; }

  Tensor input(DType dtype, int rows, int dim, Shared shared, Strides& strides) {
    strides = strides_of(s_, rows, dim, shared);
    return {dtype,
            (s_.batch - 1) * strides.batch + (rows - 1) * strides.seq + (s_.groups - 1) * strides.group +
                (s_.heads - 1) * strides.head + dim,
            kNan};
  }
  Tensor gradient_input() {
    Tensor tensor =
        input(problem().output_dtype, s_.len_q, problem().head_dim_v, {}, params_.grad_output_strides);
    if (s_.grad_column == 1) return tensor;
    Strides& strides = params_.grad_output_strides;
    for (i64* stride : {&strides.batch, &strides.seq, &strides.group, &strides.head})
      *stride *= s_.grad_column;
    params_.grad_output_column = s_.grad_column;
    return {tensor.dtype(), (tensor.count() - 1) * s_.grad_column + 1, kNan};
  }
  Tensor bias_input() {
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

  static i64 at(const Strides& strides, const PlainBlock& block, int row, int group, int head) {
    return block.batch * strides.batch + row * strides.seq + group * strides.group + head * strides.head;
  }
  i64 bias_at(const BiasStrides& strides, const PlainBlock& block, int group, int head, int i, int j) const {
    return block.batch * strides.batch + group * strides.group + head * strides.head +
           (block.q_begin + i) * strides.query + block.key_rows[j] * strides.key;
  }
  bool visible(const PlainBlock& block, int i, int j) const {
    const int shift =
        s_.anchor == Anchor::bottom_right ? static_cast<int>(block.key_rows.size()) - block.len_q : 0;
    return (s_.left < 0 || j >= i + shift - s_.left) && (s_.right < 0 || j <= i + shift + s_.right);
  }

  template <typename Visit>
  void for_each_query(Visit&& visit) {
    for (const PlainBlock& block : blocks_of(s_)) {
      for (int group = 0; group < s_.groups; ++group) {
        for (int head = 0; head < s_.heads; ++head) {
          for (int i = 0; i < block.len_q; ++i) visit(block, group, head, i);
        }
      }
    }
  }

  /// Numbers for all that is looked at, and the forward pass.
  void fill();
  void attend(const PlainBlock& block, int group, int head, int i);
  std::vector<Pair> pairs_of(const PlainBlock& block, int group, int head, int i) const;
  double grad_output(const PlainBlock& block, int group, int head, int i, int c) const;
  i64 number_at(const PlainBlock& block, int group, int head, int i) const {
    return (s_.padded_lse ? block.index : block.batch) * params_.lse.strides.batch +
           group * params_.lse.strides.group + head * params_.lse.strides.head +
           (s_.padded_lse ? 0 : block.q_begin) + i;
  }
  double score(const PlainBlock& block, int group, int head, int i, int j) const;

  void run(Operation operation, const codegen::Arch& arch, const BackwardParams& params) {
    Problem wanted = problem();
    wanted.operation = operation;
    REQUIRE(kernel_of(wanted, arch).backward(params, nullptr).ok());
  }
  void run_delta(const codegen::Arch& arch);
  BackwardParams after_delta();
  void check_query(const codegen::Arch& arch);
  void check_key_value(const codegen::Arch& arch, Shared shared, bool key, bool value);
  void check_bias(const codegen::Arch& arch);

  Setup s_;
  Random& random_;
  BackwardParams params_;
  Tensor query_, key_, value_, output_, grad_output_, bias_;
  std::vector<float> lse_, grad_lse_, lse2_, delta_;
  std::optional<Tensor> copy_;
};

void Backward::fill() {
  const auto set_row = [&](Tensor& tensor, i64 first, int dim, i64 column = 1) {
    for (int c = 0; c < dim; ++c) tensor.set(first + c * column, random_.normal());
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
  lse2_.assign(count, static_cast<float>(kUntouched));
  delta_ = lse2_;
  grad_lse_.assign(lse_.size(), 0);
  for (float& x : grad_lse_) x = static_cast<float>(random_.normal());
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
        reinterpret_cast<std::uint8_t*>(bias_.data())[bias] = random_.chance(0.8) && i != 3 ? 7 : 0;
      } else if (wanted.bias != Bias::none && std::isnan(bias_.get(bias))) {
        bias_.set(bias, random_.normal());
      }
    }
    if (seen == 0) return;  // whatever its rows hold
    set_row(query_, at(p().query_strides, block, row, group, head), wanted.head_dim);
    set_row(grad_output_, at(params_.grad_output_strides, block, row, group, head), wanted.head_dim_v,
            s_.grad_column);
  });
  for_each_query([&](const PlainBlock& block, int group, int head, int i) { attend(block, group, head, i); });
  for_each_query([&](const PlainBlock& block, int group, int head, int i) {
    if (block.index == s_.nan_block)
      query_.set(at(p().query_strides, block, block.q_begin + i, group, head), kNan);
  });
}

/// With scale and bias; -inf where the query does not see the key.
double Backward::score(const PlainBlock& block, int group, int head, int i, int j) const {
  if (!visible(block, i, j)) return -kInf;
  const i64 query = at(p().query_strides, block, block.q_begin + i, group, head);
  const i64 key = at(p().key_strides, block, block.key_rows[j], group, head);
  double sum = 0;
  for (int c = 0; c < problem().head_dim; ++c) sum += query_.get(query + c) * key_.get(key + c);
  sum *= s_.scale;
  if (problem().bias == Bias::none) return sum;
  const i64 bias = bias_at(p().bias_strides, block, group, head, i, j);
  if (problem().bias != Bias::boolean) return sum + bias_.get(bias);
  return const_cast<Tensor&>(bias_).data()[bias] != std::byte{0} ? sum : -kInf;
}

void Backward::attend(const PlainBlock& block, int group, int head, int i) {
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

/// As delta copies it, or where it lies.
double Backward::grad_output(const PlainBlock& block, int group, int head, int i, int c) const {
  const i64 row = at(params_.grad_output_strides, block, block.q_begin + i, group, head);
  return rounded_to(problem().dtype, grad_output_.get(row + c * s_.grad_column));
}

std::vector<Pair> Backward::pairs_of(const PlainBlock& block, int group, int head, int i) const {
  std::vector<Pair> pairs;
  const i64 number = number_at(block, group, head, i);
  if (std::isinf(lse_[number])) return pairs;
  const i64 output = at(p().output_strides, block, block.q_begin + i, group, head);
  const i64 gradient = at(params_.grad_output_strides, block, block.q_begin + i, group, head);
  double delta = -grad_lse_[number], delta_magnitude = std::abs(delta);
  for (int c = 0; c < problem().head_dim_v; ++c) {
    const double product = grad_output_.get(gradient + c * s_.grad_column) * output_.get(output + c);
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

/// How many elements are not what they should be: those that are not written are untouched.
int wrong_elements(const Tensor& actual, const std::vector<Expected>& expected) {
  const double ulp = actual.dtype() == DType::f32 ? 0 : actual.dtype() == DType::f16 ? 0x1p-11 : 0x1p-8;
  constexpr double kFloatError = 1e-5;   // of the sums in float32, and of the exponential
  constexpr double kSmallest = 0x1p-24;  // of float16
  int wrong = 0;
  for (i64 at = 0; at < actual.count(); ++at) {
    const Expected& e = expected[at];
    if (std::isnan(e.value)) continue;
    const double bound =
        e.written ? ulp * std::abs(e.value) + kFloatError * e.magnitude + (ulp == 0 ? 0 : kSmallest) : 0;
    const double distance = std::abs(actual.get(at) - (e.written ? e.value : kUntouched));
    wrong += !(distance <= bound);
  }
  return wrong;
}

void Backward::run_delta(const codegen::Arch& arch) {
  BackwardParams params = params_;
  params.lse2 = lse2_.data();
  params.delta = delta_.data();
  if (copies()) {
    copy_.emplace(problem().dtype, i64{s_.batch} * s_.len_q * s_.groups * s_.heads * problem().head_dim_v,
                  kNan);
    params.grad_output_copy = copy_->data();
  }
  run(Operation::delta, arch, params);
  params_.lse2 = lse2_.data();
  params_.delta = delta_.data();
}

/// What the kernels after delta are told.
BackwardParams Backward::after_delta() {
  BackwardParams params = params_;
  if (!copies()) return params;
  const i64 dim = problem().head_dim_v, row = dim * s_.heads * s_.groups;
  params.grad_output = copy_->data();
  params.grad_output_strides = {.batch = row * s_.len_q, .seq = row, .group = dim * s_.heads, .head = dim};
  params.grad_output_column = 1;
  return params;
}

void Backward::check_query(const codegen::Arch& arch) {
  BackwardParams params = after_delta();
  params.grad_query_strides = p().query_strides;
  Tensor result(problem().dtype, query_.count(), kUntouched);
  params.grad_query = result.data();
  std::vector<Expected> expected(result.count());
  for_each_query([&](const PlainBlock& block, int group, int head, int i) {
    const i64 row = at(params.grad_query_strides, block, block.q_begin + i, group, head);
    for (int c = 0; c < problem().head_dim; ++c) expected[row + c].written = true;
    for (const Pair& pair : pairs_of(block, group, head, i)) {
      const i64 key = at(p().key_strides, block, block.key_rows[pair.j], group, head);
      for (int c = 0; c < problem().head_dim; ++c) {
        const double factor = s_.scale * key_.get(key + c);
        expected[row + c].add(pair.grad_score * factor, std::abs(pair.magnitude * factor));
      }
    }
  });
  run(Operation::grad_query, arch, params);
  CHECK(wrong_elements(result, expected) == 0);
}

void Backward::check_key_value(const codegen::Arch& arch, Shared shared, bool key, bool value) {
  BackwardParams params = after_delta();
  params.key_groups = shared.group ? 1 : s_.groups;
  params.key_heads = shared.head ? 1 : s_.heads;
  params.grad_key_strides = strides_of(s_, s_.len_k, problem().head_dim, shared);
  params.grad_value_strides = strides_of(s_, s_.len_k, problem().head_dim_v, shared);
  const auto result_like = [&](const Strides& strides, int dim) {
    return Tensor(problem().dtype,
                  (s_.batch - 1) * strides.batch + (s_.len_k - 1) * strides.seq +
                      (params.key_groups - 1) * strides.group + (params.key_heads - 1) * strides.head + dim,
                  kUntouched);
  };
  Tensor grad_key = result_like(params.grad_key_strides, problem().head_dim);
  Tensor grad_value = result_like(params.grad_value_strides, problem().head_dim_v);
  std::vector<Expected> expected_key(grad_key.count()), expected_value(grad_value.count());
  // Every row is written, whether a key or none.
  for (int b = 0; b < s_.batch; ++b) {
    for (int row = 0; row < s_.len_k; ++row) {
      for (int group = 0; group < params.key_groups; ++group) {
        for (int head = 0; head < params.key_heads; ++head) {
          const PlainBlock block{b, b, 0, 0, {}};
          for (int c = 0; c < problem().head_dim && key; ++c)
            expected_key[at(params.grad_key_strides, block, row, group, head) + c].written = true;
          for (int c = 0; c < problem().head_dim_v && value; ++c)
            expected_value[at(params.grad_value_strides, block, row, group, head) + c].written = true;
        }
      }
    }
  }
  for_each_query([&](const PlainBlock& block, int group, int head, int i) {
    const i64 query = at(p().query_strides, block, block.q_begin + i, group, head);
    for (const Pair& pair : pairs_of(block, group, head, i)) {
      const int row = block.key_rows[pair.j];
      const i64 key_at = at(params.grad_key_strides, block, row, group, head);
      const i64 value_at = at(params.grad_value_strides, block, row, group, head);
      for (int c = 0; c < problem().head_dim; ++c) {
        const double factor = s_.scale * query_.get(query + c);
        expected_key[key_at + c].add(pair.grad_score * factor, std::abs(pair.magnitude * factor));
      }
      for (int c = 0; c < problem().head_dim_v; ++c) {
        const double product = pair.weight * grad_output(block, group, head, i, c);
        expected_value[value_at + c].add(product, std::abs(product));
      }
    }
  });
  params.grad_key = key ? grad_key.data() : nullptr;
  params.grad_value = value ? grad_value.data() : nullptr;
  run(Operation::grad_key_value, arch, params);
  CHECK(wrong_elements(grad_key, expected_key) == 0);
  CHECK(wrong_elements(grad_value, expected_value) == 0);
}

void Backward::check_bias(const codegen::Arch& arch) {
  BackwardParams params = after_delta();
  params.bias_batch = s_.bias.batch ? 1 : s_.batch;
  params.bias_groups = s_.bias.group ? 1 : s_.groups;
  params.bias_heads = s_.bias.head ? 1 : s_.heads;
  params.bias_rows = s_.bias.query ? 1 : s_.len_q;
  params.grad_bias_strides = p().bias_strides;
  const BiasStrides& strides = params.grad_bias_strides;
  Tensor result(bias_.dtype(), bias_.count(), kUntouched);
  params.grad_bias = result.data();
  std::vector<Expected> expected(result.count());
  for (int b = 0; b < params.bias_batch; ++b) {
    for (int head = 0; head < params.bias_groups * params.bias_heads; ++head) {
      for (int i = 0; i < params.bias_rows; ++i) {
        for (int j = 0; j < s_.len_k; ++j) {
          expected[b * strides.batch + head / params.bias_heads * strides.group +
                   head % params.bias_heads * strides.head + i * strides.query + j * strides.key]
              .written = true;
        }
      }
    }
  }
  for_each_query([&](const PlainBlock& block, int group, int head, int i) {
    for (const Pair& pair : pairs_of(block, group, head, i))
      expected[bias_at(strides, block, group, head, i, pair.j)].add(pair.grad_score, pair.magnitude);
  });
  run(Operation::grad_bias, arch, params);
  CHECK(wrong_elements(result, expected) == 0);
}

void check(const Setup& setup) {
  on_every_isa([&](const codegen::Arch& arch) {
    Random random(test::test_seed());
    Backward(setup, random).check(arch);
  });
}

/// Sequences with rows of nobody between them, without queries, without keys; keys that overlap.
Setup gappy(const Problem& problem) {
  Setup s{.problem = problem, .groups = 2, .heads = 2, .len_q = 190, .len_k = 270};
  s.problem.blocks = Blocks::varlen;
  s.q_start = {3, 60, 60, 161, 170, 180};
  s.k_start = {2, 40, 57, 101, 269};
  s.k_len = {55, 30, 131, 0, 1};
  return s;
}

/// Sequences that share pages, in any order; some pages and parts of pages are nobody's.
Setup paged(const Problem& problem) {
  Setup s{.problem = problem, .heads = 2, .len_q = 90, .len_k = 130};
  s.problem.blocks = Blocks::varlen;
  s.problem.keys = Keys::paged;
  s.page_size = 10;
  s.q_start = {0, 50, 51, 90};
  s.k_start = {3, 0, 1};
  s.k_len = {57, 12, 38};
  s.pages = {12, 3, 0, 7, 1, 9, 1000, 3, 5, 1000, 1000, 1000, 1000, 1000, 2, 3, 0, 4, 1000, 1000, 1000};
  return s;
}

}  // namespace

TEST_CASE("head dims from 1 to 512, in every pair") {
  for (const auto& [k, v, dtype] : {std::tuple{1, 1, DType::f32},
                                    {7, 19, DType::f32},
                                    {257, 5, DType::f32},
                                    {20, 300, DType::bf16},
                                    {512, 512, DType::f16}}) {
    CAPTURE(k);
    CAPTURE(v);
    check({.problem = {.dtype = dtype, .output_dtype = dtype, .head_dim = k, .head_dim_v = v},
           .batch = 2,
           .len_q = 101,
           .len_k = 131,
           .scale = 1 / std::sqrt(static_cast<float>(k))});
  }
}

TEST_CASE("windows, with queries that see nothing and keys that nobody sees") {
  const Problem plain{.head_dim = 24, .head_dim_v = 24};
  Problem right = plain, both = plain;
  right.window_right = both.window_right = both.window_left = Edge::bounded;
  check({.problem = right, .len_q = 150, .len_k = 97, .anchor = Anchor::bottom_right, .right = 0});
  check({.problem = right, .len_q = 97, .len_k = 300, .anchor = Anchor::top_left, .right = 5});
  check(
      {.problem = both, .len_q = 270, .len_k = 200, .anchor = Anchor::bottom_right, .left = 20, .right = 3});
  check({.problem = both, .len_q = 300, .len_k = 140, .anchor = Anchor::top_left, .left = 0, .right = 90});
  check({.problem = both, .len_q = 1, .len_k = 200, .anchor = Anchor::top_left, .left = 9, .right = 70});
}

TEST_CASE("sequences among others") {
  check(gappy({.head_dim = 21, .head_dim_v = 33}));
  Setup s = gappy({.dtype = DType::bf16,
                   .output_dtype = DType::bf16,
                   .head_dim = 21,
                   .head_dim_v = 9,
                   .window_right = Edge::bounded,
                   .bias = Bias::f32,
                   .dropout = Dropout::on});
  s.anchor = Anchor::bottom_right;
  s.right = 5;
  s.drops = 0.25;
  s.keys.head = s.values.head = true;
  check(s);
  s.padded_lse = true;
  s.bias.query = s.bias.head = true;
  check(s);
}

TEST_CASE("what is NaN in a sequence stays in it") {
  Setup s = gappy({.head_dim = 21, .head_dim_v = 33, .bias = Bias::f32});
  s.nan_block = 2;
  check(s);
}

TEST_CASE("pages, some of them shared") {
  Setup s = paged({.head_dim = 33,
                   .head_dim_v = 17,
                   .window_left = Edge::bounded,
                   .window_right = Edge::bounded,
                   .bias = Bias::f16,
                   .dropout = Dropout::on});
  s.anchor = Anchor::bottom_right;
  s.left = 30;
  s.right = 2;
  s.drops = 0.4;
  check(s);
  s.bias.query = true;
  s.keys.head = true;  // but not the values
  check(s);
}

TEST_CASE("a bias of any type, shared by anything") {
  for (const Bias kind : {Bias::f32, Bias::bf16, Bias::boolean}) {
    CAPTURE(codegen::name_of(kind));
    const Setup s{.problem = {.head_dim = 16, .head_dim_v = 16, .bias = kind},
                  .batch = 2,
                  .groups = 2,
                  .heads = 3,
                  .len_q = 61,
                  .len_k = 77};
    for (const Shared& shared : {Shared{},
                                 {.batch = true},
                                 {.group = true},
                                 {.head = true, .query = true},
                                 {true, true, true, true}}) {
      Setup other = s;
      other.bias = shared;
      check(other);
    }
    Setup other = s;
    other.bias_columns_apart = true;
    check(other);
  }
}

TEST_CASE("dropout of dense problems") {
  Setup s{.problem = {.head_dim = 40, .head_dim_v = 24, .dropout = Dropout::on},
          .batch = 2,
          .groups = 1,
          .heads = 2,
          .len_q = 133,
          .len_k = 150};
  for (const double drops : {0.0, 0.3, 1.0}) {
    CAPTURE(drops);
    s.drops = drops;
    check(s);
  }
}

TEST_CASE("heads share keys, values or both") {
  Setup s{.problem = {.head_dim = 24, .head_dim_v = 40},
          .batch = 2,
          .groups = 2,
          .heads = 3,
          .len_q = 55,
          .len_k = 66};
  for (const auto& [keys, values] :
       {std::pair{Shared{.head = true}, Shared{.head = true}},
        {Shared{.group = true, .head = true}, Shared{.group = true, .head = true}},
        {Shared{.group = true}, Shared{.head = true}},
        {Shared{}, Shared{.group = true, .head = true}}}) {
    s.keys = keys;
    s.values = values;
    check(s);
  }
}

TEST_CASE("a gradient of any strides and another type than the inputs") {
  Setup s{.problem = {.dtype = DType::f16, .output_dtype = DType::f32, .head_dim = 24, .head_dim_v = 40},
          .batch = 2,
          .heads = 3,
          .len_q = 55,
          .len_k = 66};
  check(s);
  s.grad_column = 7;
  check(s);
  s.problem.dtype = DType::f32;
  check(s);
}
