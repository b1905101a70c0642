#include "tools/verify/grad_merge_case.h"

#include "attune/params.h"
#include "codegen/names.h"
#include "tools/reference/element.h"
#include "tools/verify/verdict.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

namespace attune::verify {
namespace {

using namespace reference;  // NOLINT: cases speak of references and plain values all the time
using codegen::name_of;

constexpr double kNothing = -std::numeric_limits<double>::infinity();
constexpr int kFewestOutputs = 64;

int random_chunks(Random& random) {
  const double kind = random.unit();
  if (kind < 0.1) return 1;
  if (kind < 0.2) return kernel::kMaxGradChunks + random.integer(-1, 1);
  if (kind < 0.3) return random.integer(kernel::kMaxGradChunks, 45);
  return random.integer(2, 12);
}

Layout one_number() {
  Layout layout;
  layout.broadcast.fill(true);
  return layout;
}

/// One chunk and what it was merged to, dense.
struct Merged {
  MergeRows rows;
  std::vector<double> chunk, chunk_lse, output, lse, grad_output, grad_lse;
};

/// exp(chunk's lse - lse), or 0 where no key was seen.
template <typename Number>
Number weight_of(const Merged& m, std::size_t number) {
  if (m.chunk_lse[number] == kNothing || m.lse[number] == kNothing) return 0;
  return std::exp(static_cast<Number>(m.chunk_lse[number]) - static_cast<Number>(m.lse[number]));
}

/// A weight is off by the rounding of the lse's difference, or where it is below the normal floats gone.
double tiny_of_term(const Merged& m, std::size_t number, double weight, double magnitude) {
  if (weight == 0) return 0;
  const double score = std::abs(m.chunk_lse[number] - m.lse[number]);
  return tiny_of(score, weight * magnitude) + double{std::numeric_limits<float>::min()} * magnitude;
}

/// Of the chunk's output, rounded to its type, and of its lse, computed in Number.
struct ChunkGradients {
  Gradient attn, lse;
};
template <typename Number>
ChunkGradients gradients_of(const Merged& m, DType dtype) {
  const MergeRows& rows = m.rows;
  ChunkGradients result;
  result.lse = {std::vector<double>(rows.count()), std::vector<double>(rows.count())};
  for (std::size_t row = 0; row < rows.count(); ++row) {
    const std::size_t number = rows.number_of(row);
    const auto weight = weight_of<Number>(m, number);
    Number sum = static_cast<Number>(m.grad_lse[number]);
    double magnitude = std::abs(m.grad_lse[number]);
    for (std::size_t at = row * rows.columns; at < (row + 1) * rows.columns; ++at) {
      const auto grad = static_cast<Number>(m.grad_output[at]);
      const Number product = weight == 0 ? 0 : weight * grad;
      const bool rounds = std::is_same_v<Number, float>;
      result.attn.values.push_back(rounds ? rounded(dtype, static_cast<float>(product)) : double(product));
      result.attn.tiny.push_back(tiny_of_term(m, number, weight, std::abs(m.grad_output[at])));
      if (weight == 0) continue;  // its chunk may hold NaN
      sum += (static_cast<Number>(m.chunk[at]) - static_cast<Number>(m.output[at])) * grad;
      magnitude += (std::abs(m.chunk[at]) + std::abs(m.output[at])) * std::abs(m.grad_output[at]);
    }
    result.lse.values[number] = weight == 0 ? 0 : weight * sum;
    result.lse.tiny[number] = tiny_of_term(m, number, weight, magnitude);
  }
  return result;
}

}  // namespace

GradMergeCase::GradMergeCase(Random& random, const KernelClass& kernel_class)
    : class_(kernel_class),
      chunks_(random_chunks(random)),
      into_(random.chance(0.5)),
      has_grad_lse_(random.chance(0.7)) {
  heads_.resize(random.pick({0, 1, 1, 1, 2, 2}));
  for (std::int64_t& axis : heads_) axis = random.integer(1, 3);
  len_ = random.chance(0.05) ? 0 : random.chance(0.2) ? 1 : random.integer(2, 24);
  const int outputs = std::max(1, len_) * class_.problem.head_dim_v;
  batch_ = random.chance(0.05) ? 0 : random.integer(0, 1) + std::max(1, kFewestOutputs / outputs);
  draw_spreads(random);
  draw_chunks(random);
  draw_merged(random);
  draw_gradients(random);
  describe();
}

DType GradMergeCase::dtype() const {
  return static_cast<DType>(class_.problem.dtype);
}
DType GradMergeCase::output_dtype() const {
  return static_cast<DType>(class_.problem.output_dtype);
}

/// Products of values and gradients, summed up over a row, are finite.
void GradMergeCase::draw_spreads(Random& random) {
  const bool half = dtype() == DType::f16 || output_dtype() == DType::f16;
  const double large = half ? 1e4 : 1e30;
  value_spread_ = random.pick({1.0, 1.0, 1e-2, large});
  grad_spread_ = random.pick({1.0, 1.0, 1e-2, value_spread_ > 1 ? 1.0 : large});
  lse_spread_ = random.pick({1.0, 5.0, 100.0});
  hidden_ = random.pick({0.0, 0.1, 0.6});
}

MergeRows GradMergeCase::rows() const {
  std::size_t heads = 1;
  for (const std::int64_t axis : heads_) heads *= static_cast<std::size_t>(axis);
  return {static_cast<std::size_t>(batch_), static_cast<std::size_t>(len_), heads,
          static_cast<std::size_t>(class_.problem.head_dim_v)};
}

/// A tensor of [B, M, heads, Kv].
GuardedTensor GradMergeCase::random_rows(DType dtype, const Layout& layout,
                                         const std::function<float()>& next) const {
  GuardedTensor tensor(dtype, shape(), layout);
  tensor.fill(next);
  return tensor;
}

/// [B, M, Kv], [B, M, H, Kv] or [B, M, G, H, Kv].
std::vector<std::int64_t> GradMergeCase::shape() const {
  std::vector<std::int64_t> shape{batch_, len_};
  shape.insert(shape.end(), heads_.begin(), heads_.end());
  shape.push_back(class_.problem.head_dim_v);
  return shape;
}
/// [B, H, M] or [B, G, H, M].
std::vector<std::int64_t> GradMergeCase::lse_shape(int len) const {
  std::vector<std::int64_t> shape = heads_.empty() ? std::vector<std::int64_t>{1} : heads_;
  shape.insert(shape.begin(), batch_);
  shape.push_back(len);
  return shape;
}

Layout GradMergeCase::aligned_rows(Random& random, DType dtype, Access access) const {
  return random_layout(random, dtype, static_cast<int>(shape().size()), class_.problem.align_bytes, access);
}

/// Longer than it must be, or not; of any strides.
GuardedTensor GradMergeCase::random_numbers(Random& random, const std::vector<double>& numbers) const {
  const int padded = len_ + random.pick({0, 0, 3});
  const std::vector<std::int64_t> shape = lse_shape(padded);
  Layout layout = random_strides(random, static_cast<int>(shape.size()));
  layout.broadcast = {};
  GuardedTensor tensor(DType::f32, shape, layout);
  auto next = numbers.begin();
  int i = 0;
  tensor.fill([&] { return i++ % padded < len_ ? static_cast<float>(*next++) : std::nanf(""); });
  return tensor;
}

/// Without what is longer.
std::vector<double> GradMergeCase::numbers_of(const GuardedTensor& tensor) const {
  TensorView view = tensor.view();
  view.shape[view.rank - 1] = len_;
  const std::vector<float> elements = dense(view);
  return {elements.begin(), elements.end()};
}

/// Rows whose lse says that they saw no key are not even read.
void GradMergeCase::poison_hidden(GuardedTensor& tensor, const std::vector<double>& lse) const {
  const int rank = static_cast<int>(shape().size());
  tensor.poison_unused([&](const Index& index) {
    std::size_t row = 0;
    for (int axis = 0; axis < rank - 1; ++axis) {
      row = row * static_cast<std::size_t>(shape()[axis]) + static_cast<std::size_t>(index[axis]);
    }
    return lse[rows().number_of(row)] != kNothing;
  });
}

void GradMergeCase::draw_chunks(Random& random) {
  const double shift = 20 * random.normal();
  for (int i = 0; i < chunks_; ++i) {
    std::vector<double> lse(rows().count());
    for (double& one : lse) {
      one = random.chance(hidden_) ? kNothing : shift + lse_spread_ * random.normal();
    }
    attn_lse_.push_back(random_numbers(random, lse));
    attn_.push_back(random_rows(dtype(), aligned_rows(random, dtype(), Access::read), [&] {
      return static_cast<float>(value_spread_ * std::clamp(random.normal(), -6.0, 6.0));
    }));
    poison_hidden(attn_.back(), lse);
  }
}

/// What the reference makes of the chunks, rounded.
void GradMergeCase::draw_merged(Random& random) {
  MergeInputs chunks;
  for (const GuardedTensor& one : attn_) chunks.attn.push_back(one.view());
  for (const GuardedTensor& one : attn_lse_) chunks.lse.push_back(one.view());
  Values merged = reference_merge(chunks);
  // A caller may say that a row saw no key, whatever its chunks say.
  const double silenced = random.chance(0.1) ? 0.2 : 0;
  for (double& one : merged.lse) {
    if (random.chance(silenced)) one = kNothing;
  }
  Layout layout = aligned_rows(random, output_dtype(), Access::read);
  layout.broadcast = {};
  auto next = merged.output.begin();
  output_ = random_rows(output_dtype(), layout, [&] { return static_cast<float>(*next++); });
  poison_hidden(output_, merged.lse);
  lse_ = random_numbers(random, merged.lse);
}

void GradMergeCase::draw_gradients(Random& random) {
  const auto next = [&](double spread) {
    return static_cast<float>(spread * std::clamp(random.normal(), -6.0, 6.0));
  };
  const double kind = class_.problem.head_dim_v == 1 ? 0 : random.unit();
  Layout layout = aligned_rows(random, output_dtype(), Access::read);
  grad_output_layout_ = "aligned rows";
  if (kind > 0.8) {
    grad_output_layout_ = "one number";
    layout = one_number();
  } else if (kind > 0.5) {
    grad_output_layout_ = "any strides";
    // Neighbouring columns would be read by accesses as wide as rows are aligned, which may not be the
    // class's.
    layout = random_scattered(random, output_dtype(), shape());
  }
  grad_output_ = random_rows(output_dtype(), layout, [&] { return next(grad_spread_); });
  poison_hidden(grad_output_, numbers_of(lse_));
  if (has_grad_lse_) {
    std::vector<double> grad_lse(rows().count());
    // As much as reaches an lse through the output.
    for (double& one : grad_lse) one = next(grad_spread_ * value_spread_);
    grad_lse_ = random_numbers(random, grad_lse);
  }
  for (int i = 0; i < chunks_; ++i) {
    grad_attn_.emplace_back(dtype(), shape(), aligned_rows(random, dtype(), Access::write));
    grad_attn_lse_.emplace_back(DType::f32, lse_shape(len_), Layout{});
  }
}

void GradMergeCase::describe() {
  const codegen::Problem& p = class_.problem;
  bias = "(merge)";
  aspects = {{"type", std::string(name_of(p.dtype))},
             {"output type", std::string(name_of(p.output_dtype))},
             {"function", into_ ? "into" : "allocate"},
             {"grad_lse", has_grad_lse_ ? "packed" : "none"},
             {"grad_output", grad_output_layout_},
             {"merge", chunks_ > kernel::kMaxGradChunks ? "several launches"
                       : chunks_ == 1                   ? "one chunk"
                                                        : "at once"},
             {"family", std::string(name_of(class_.family))}};
  name = fmt::format(
      "backward of merge {} -> {} {} chunks B{} M{} heads {} Kv{} align {} grad_output {} spreads {} {} {} "
      "hidden {}{}{}",
      name_of(p.dtype), name_of(p.output_dtype), chunks_, batch_, len_, heads_, p.head_dim_v, p.align_bytes,
      grad_output_layout_, value_spread_, grad_spread_, lse_spread_, hidden_,
      has_grad_lse_ ? " with grad_lse" : "", into_ ? " into" : "");
}

int GradMergeCase::launches() const {
  return batch_ == 0 || len_ == 0 ? 0 : kernel::ceil_div(chunks_, kernel::kMaxGradChunks);
}

std::vector<Part> GradMergeCase::parts() const {
  std::vector<Part> all{{"output", &output_, Access::read},
                        {"grad_output", &grad_output_, Access::read},
                        {"lse", &lse_, Access::read}};
  if (has_grad_lse_) all.push_back({"grad_lse", &grad_lse_, Access::read});
  const auto add = [&](const char* part, const std::vector<GuardedTensor>& tensors, Access access) {
    for (const GuardedTensor& one : tensors) all.push_back({part, &one, access});
  };
  add("attn", attn_, Access::read);
  add("attn_lse", attn_lse_, Access::read);
  add("grad_attn", grad_attn_, Access::write);
  add("grad_attn_lse", grad_attn_lse_, Access::write);
  return all;
}

void GradMergeCase::run(Arena& arena) {
  arena.begin(parts());
  const auto put = [&](const std::vector<GuardedTensor>& tensors) {
    std::vector<MutableTensorView> views;
    for (const GuardedTensor& one : tensors) views.push_back(arena.put(one));
    return views;
  };
  const auto attn = put(attn_), attn_lse = put(attn_lse_);
  const std::vector<TensorView> chunks(attn.begin(), attn.end()), lses(attn_lse.begin(), attn_lse.end());
  const TensorView output = arena.put(output_), lse = arena.put(lse_), grad_output = arena.put(grad_output_);
  TensorView grad_lse;
  if (has_grad_lse_) grad_lse = arena.put(grad_lse_);
  const TensorView* given = has_grad_lse_ ? &grad_lse : nullptr;
  if (into_) {
    const auto grad_attn = put(grad_attn_), grad_attn_lse = put(grad_attn_lse_);
    merge_attentions_backward(grad_output, given, output, lse, chunks, lses, grad_attn, grad_attn_lse);
    return arena.finish();
  }
  const auto gradients = merge_attentions_backward(grad_output, given, output, lse, chunks, lses);
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    arena.take(gradients[i].output, grad_attn_[i]);
    arena.take(gradients[i].lse, grad_attn_lse_[i]);
  }
  arena.finish();
}

std::string GradMergeCase::verdict() const {
  if (std::string damage = damage_of(parts()); !damage.empty()) return damage;
  Merged merged{.rows = rows(),
                .output = output_.values(),
                .lse = numbers_of(lse_),
                .grad_output = grad_output_.values(),
                .grad_lse = has_grad_lse_ ? numbers_of(grad_lse_) : std::vector<double>(rows().count())};
  for (std::size_t i = 0; i < attn_.size(); ++i) {
    merged.chunk = attn_[i].values();
    merged.chunk_lse = numbers_of(attn_lse_[i]);
    const auto right = gradients_of<double>(merged, dtype()), plain = gradients_of<float>(merged, dtype());
    if (auto wrong = text_of(plain.attn, right.attn, grad_attn_[i].values()); !wrong.empty()) {
      return fmt::format("grad_attn[{}]: {}", i, wrong);
    }
    if (auto wrong = text_of(plain.lse, right.lse, grad_attn_lse_[i].values()); !wrong.empty()) {
      return fmt::format("grad_attn_lse[{}]: {}", i, wrong);
    }
  }
  return "";
}

}  // namespace attune::verify
