#include "attune/params.h"
#include "codegen/names.h"
#include "tools/verify/case.h"
#include "tools/verify/verdict.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace attune::verify {
namespace {

using namespace reference;  // NOLINT: cases speak of references and plain values all the time
using codegen::name_of;

constexpr int kFewestOutputs = 64;

int random_chunks(Random& random) {
  const double kind = random.unit();
  if (kind < 0.1) return 1;
  if (kind < 0.2) return kernel::kMaxChunks + random.integer(-1, 1);
  if (kind < 0.3) return random.integer(kernel::kMaxChunks, 60);
  return random.integer(2, 12);
}

/// The chunk's slice of a stacked tensor, or a tensor of its own.
TensorView chunk_of(const std::vector<TensorView>& tensors, bool stacked, int chunk) {
  if (!stacked) return tensors[chunk];
  TensorView slice = tensors[0];
  slice.data = static_cast<const std::byte*>(slice.data) + chunk * slice.strides[0] * item_bytes(slice.dtype);
  std::shift_left(slice.shape.begin(), slice.shape.end(), 1);
  std::shift_left(slice.strides.begin(), slice.strides.end(), 1);
  --slice.rank;
  return slice;
}

/// A tensor for every chunk, or one for all of them.
std::vector<GuardedTensor> random_chunk_tensors(
    bool stacked, int chunks, std::vector<std::int64_t> shape,
    const std::function<GuardedTensor(std::vector<std::int64_t>)>& draw) {
  if (stacked) shape.insert(shape.begin(), chunks);
  std::vector<GuardedTensor> tensors(stacked ? 1 : chunks);
  for (GuardedTensor& tensor : tensors) tensor = draw(shape);
  return tensors;
}

std::vector<TensorView> views_of(const std::vector<GuardedTensor>& tensors) {
  std::vector<TensorView> views(tensors.size());
  std::ranges::transform(tensors, views.begin(), &GuardedTensor::view);
  return views;
}

}  // namespace

MergeCase::MergeCase(Random& random, const KernelClass& kernel_class) : class_(kernel_class) {
  chunks_ = random_chunks(random);
  stacked_ = random.chance(0.5);
  into_ = chunks_ > kernel::kMaxChunks || random.chance(0.5);  // rounds share kernels if all align alike
  heads_.resize(random.pick({0, 1, 1, 1, 2, 2}));
  for (std::int64_t& axis : heads_) axis = random.integer(1, 3);
  len_ = random.chance(0.05) ? 0 : random.chance(0.2) ? 1 : random.integer(2, 40);
  const int outputs = std::max(1, len_) * class_.problem.head_dim_v;
  batch_ = random.chance(0.05) ? 0 : random.integer(0, 2) + std::max(1, kFewestOutputs / outputs);
  draw_lse(random);
  draw_attn(random);
  poison_hidden();
  describe();
}

/// [B, H, M] or [B, G, H, M].
std::vector<std::int64_t> MergeCase::lse_shape(int len) const {
  std::vector<std::int64_t> shape = heads_.empty() ? std::vector<std::int64_t>{1} : heads_;
  shape.insert(shape.begin(), batch_);
  shape.push_back(len);
  return shape;
}

void MergeCase::draw_lse(Random& random) {
  lse_spread_ = random.pick({1.0, 5.0, 100.0});
  hidden_ = random.pick({0.0, 0.1, 0.6});
  const double shift = 20 * random.normal();
  const int padded = len_ + random.pick({0, 0, 3});  // a padded lse is longer
  lse_ =
      random_chunk_tensors(stacked_, chunks_, lse_shape(padded), [&](const std::vector<std::int64_t>& shape) {
        const int rank = static_cast<int>(shape.size());
        GuardedTensor tensor(DType::f32, shape, random_strides(random, rank));
        tensor.fill([&] {
          return random.chance(hidden_) ? -std::numeric_limits<float>::infinity()
                                        : static_cast<float>(shift + lse_spread_ * random.normal());
        });
        tensor.poison_unused([&](const Index& index) { return index[rank - 1] < len_; });
        return tensor;
      });
  lse_out_ = GuardedTensor(DType::f32, lse_shape(len_), Layout{});
}

void MergeCase::draw_attn(Random& random) {
  const codegen::Problem& p = class_.problem;
  const auto dtype = static_cast<DType>(p.dtype);
  const auto output_dtype = static_cast<DType>(p.output_dtype);
  const double large = dtype == DType::f16 || output_dtype == DType::f16 ? 1e4 : 1e30;
  value_spread_ = random.pick({1.0, 1.0, 1e-2, large});
  std::vector<std::int64_t> shape{batch_, len_};
  shape.insert(shape.end(), heads_.begin(), heads_.end());
  shape.push_back(p.head_dim_v);
  attn_ = random_chunk_tensors(stacked_, chunks_, shape, [&](const std::vector<std::int64_t>& own) {
    const int rank = static_cast<int>(own.size());
    GuardedTensor tensor(dtype, own, random_layout(random, dtype, rank, p.align_bytes, Access::read));
    tensor.fill([&] { return static_cast<float>(value_spread_ * std::clamp(random.normal(), -6.0, 6.0)); });
    return tensor;
  });
  const int rank = static_cast<int>(shape.size());
  output_ = GuardedTensor(output_dtype, shape,
                          random_layout(random, output_dtype, rank, p.align_bytes, Access::write));
}

/// What a chunk holds where its lse is -inf is not even read.
void MergeCase::poison_hidden() {
  const MergeInputs drawn = inputs();
  for (std::size_t t = 0; t < attn_.size(); ++t) {
    attn_[t].poison_unused([&](const Index& index) {
      const std::int64_t* own = index.data() + (stacked_ ? 1 : 0);
      const TensorView& lse = drawn.lse[stacked_ ? index[0] : static_cast<std::int64_t>(t)];
      std::int64_t at = own[0] * lse.strides[0] + own[1] * lse.strides[lse.rank - 1];
      for (int axis = 1; axis < lse.rank - 1; ++axis) {
        const bool has_heads = drawn.attn[0].rank > 3;
        at += (has_heads ? own[axis + 1] : 0) * lse.strides[axis];
      }
      return std::isfinite(static_cast<const float*>(lse.data)[at]);
    });
  }
}

void MergeCase::describe() {
  const codegen::Problem& p = class_.problem;
  bias = "(merge)";
  aspects = {{"type", std::string(name_of(p.dtype))},
             {"output type", std::string(name_of(p.output_dtype))},
             {"function", "merge_attentions"},
             {"merge", fmt::format("{}, {}", stacked_ ? "stacked" : "list",
                                   chunks_ > kernel::kMaxChunks ? "in rounds"
                                   : chunks_ == 1               ? "one chunk"
                                                                : "at once")},
             {"family", std::string(name_of(class_.family))}};
  name = fmt::format("merge {} -> {} {} chunks {} B{} M{} heads {} Kv{} align {} spreads {} {} hidden {}{}",
                     name_of(p.dtype), name_of(p.output_dtype), chunks_, stacked_ ? "stacked" : "in a list",
                     batch_, len_, heads_, p.head_dim_v, p.align_bytes, value_spread_, lse_spread_, hidden_,
                     writes_lse() ? " with lse" : "");
}

reference::MergeInputs MergeCase::inputs() const {
  const std::vector<TensorView> attn = views_of(attn_), lse = views_of(lse_);
  MergeInputs result{.output_dtype = static_cast<DType>(class_.problem.output_dtype)};
  for (int i = 0; i < chunks_; ++i) {
    result.attn.push_back(chunk_of(attn, stacked_, i));
    result.lse.push_back(chunk_of(lse, stacked_, i));
  }
  return result;
}

int MergeCase::launches() const {
  if (batch_ == 0 || len_ == 0) return 0;
  if (chunks_ <= kernel::kMaxChunks) return 1;
  return kernel::ceil_div(chunks_, kernel::kMaxChunks) + 1;
}

codegen::Problem MergeCase::last(const codegen::Arch& arch) const {
  return problems_of(class_, arch).back();
}

std::vector<Part> MergeCase::parts() const {
  std::vector<Part> all{{"output", &output_, Access::write},
                        {"lse", &lse_out_, writes_lse() ? Access::write : Access::read}};
  for (const GuardedTensor& chunk : attn_) all.push_back({"attn", &chunk, Access::read});
  for (const GuardedTensor& chunk : lse_) all.push_back({"chunk's lse", &chunk, Access::read});
  return all;
}

void MergeCase::run(Arena& arena) {
  arena.begin(parts());
  std::vector<TensorView> attn, lse;
  for (const GuardedTensor& chunk : attn_) attn.push_back(arena.put(chunk));
  for (const GuardedTensor& chunk : lse_) lse.push_back(arena.put(chunk));
  AttentionOptions options;
  if (output_.view().dtype != attn_[0].view().dtype) options.output_dtype = output_.view().dtype;
  if (into_) {
    std::vector<TensorView> attn_chunks, lse_chunks;
    for (int i = 0; i < chunks_; ++i) {
      attn_chunks.push_back(chunk_of(attn, stacked_, i));
      lse_chunks.push_back(chunk_of(lse, stacked_, i));
    }
    const MutableTensorView out = arena.put(output_), lse_out = arena.put(lse_out_);
    merge_attentions(attn_chunks, lse_chunks, out, writes_lse() ? &lse_out : nullptr, options);
    return arena.finish();
  }
  const Attention merged = stacked_ ? merge_attentions(attn[0], lse[0], writes_lse(), options)
                                    : merge_attentions(attn, lse, writes_lse(), options);
  arena.take(merged.output, output_);
  if (writes_lse()) arena.take(merged.lse, lse_out_);
  arena.finish();
}

std::string MergeCase::verdict() const {
  if (std::string damage = damage_of(parts()); !damage.empty()) return damage;
  const MergeInputs problem = inputs();
  const Values right = reference_merge(problem);
  const std::vector<double> values = output_.values();
  const std::vector<double> lse_values = writes_lse() ? lse_out_.values() : std::vector<double>();
  return text_of(judge(problem, right, values, lse_values), extents_of(problem), right, values);
}

}  // namespace attune::verify
