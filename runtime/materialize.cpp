// AttentionBias::materialize: the bias as a matrix, from the same checks and the same mask as a call.
#include "attune/attn_bias.h"
#include "attune/num.h"
#include "runtime/check.h"
#include "runtime/check_tensors.h"
#include "runtime/cuda/cuda_backend.h"
#include "runtime/mask_matrix.h"
#include "runtime/raise.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstddef>
#include <cstring>

namespace attune {
namespace {

using kernel::i64;
using runtime::raise;
using runtime::refuse;
using runtime::take;

/// The axes of [queries, keys], [batch, queries, keys], [batch, heads, queries, keys] or [batch, groups,
/// heads, queries, keys].
struct Axes {
  std::int64_t batch = 1, groups = 1, heads = 1, len_q = 0, len_k = 0;
};

Axes axes_of(const std::vector<std::int64_t>& shape) {
  const std::size_t rank = shape.size();
  if (rank < 2 || rank > 5) {
    refuse("materialize: a shape of {} axes; expected [..., queries, keys] of 2 to 5 axes", rank);
  }
  return {.batch = rank > 2 ? shape[0] : 1,
          .groups = rank > 4 ? shape[1] : 1,
          .heads = rank > 3 ? shape[rank - 3] : 1,
          .len_q = shape[rank - 2],
          .len_k = shape[rank - 1]};
}

/// The bias as a call with tensors of these extents would take it. Their data are never read.
kernel::ForwardParams checked_params(const AttentionBias& bias, const Axes& axes,
                                     const std::vector<std::int64_t>& shape) {
  static const float anything = 0;
  const Device device = bias.tensor ? bias.tensor->device : Device{};
  const std::int64_t batch = bias.sequences ? 1 : axes.batch;  // masks of sequences are alike for all
  const bool grouped = shape.size() == 5;
  const auto rows = [&](std::int64_t len) {
    TensorView view =
        grouped ? TensorView(&anything, DType::f32, {batch, len, axes.groups, axes.heads, 1}, device)
                : TensorView(&anything, DType::f32, {batch, len, axes.heads, 1}, device);
    view.strides = {};
    return view;
  };
  const TensorView query = rows(axes.len_q);
  const TensorView key = rows(axes.len_k);
  const AttentionOptions options;
  const auto call =
      runtime::check({.query = query, .key = key, .value = key, .bias = bias, .options = options});
  if (!call.ok()) {
    raise({call.failure().kind,
           fmt::format("materialize of shape [{}]: {}", fmt::join(shape, ", "), call.failure().message)});
  }
  return call->params;
}

/// The elements of a bias tensor, in the host's memory.
class Elements {
 public:
  explicit Elements(const TensorView& tensor)
      : dtype_(tensor.dtype), data_(static_cast<const std::byte*>(tensor.data)) {
    if (tensor.device.type == DeviceType::cpu) return;
    const runtime::Memory memory = take(runtime::check_memory("attn_bias", tensor, runtime::LastStride::any));
    const auto* begin =
        reinterpret_cast<const std::byte*>(memory.begin);  // NOLINT(performance-no-int-to-ptr)
    copy_.resize(memory.end - memory.begin);
    if (copy_.empty()) return;
    take(runtime::cuda_copy_to_host(tensor.device.index, copy_.data(), begin, copy_.size()));
    data_ = copy_.data() + (data_ - begin);
  }

  /// What is added to a score.
  float at(i64 offset) const {
    const std::byte* address = data_ + offset * item_bytes(dtype_);
    if (dtype_ == DType::boolean) return *address != std::byte{} ? 0.0f : kernel::neg_inf();
    if (dtype_ == DType::f32) return load<float>(address);
    const auto bits = load<kernel::u16>(address);
    return dtype_ == DType::f16 ? kernel::f16_to_float(bits) : kernel::bf16_to_float(bits);
  }

 private:
  template <typename T>
  static T load(const std::byte* address) {
    T value;
    std::memcpy(&value, address, sizeof value);
    return value;
  }

  DType dtype_;
  const std::byte* data_;
  std::vector<std::byte> copy_;
};

void store(DType dtype, void* data, std::size_t index, float value) {
  switch (dtype) {
    case DType::f16: static_cast<kernel::u16*>(data)[index] = kernel::float_to_f16(value); return;
    case DType::bf16: static_cast<kernel::u16*>(data)[index] = kernel::float_to_bf16(value); return;
    default: static_cast<float*>(data)[index] = value; return;
  }
}

}  // namespace

Tensor AttentionBias::materialize(const std::vector<std::int64_t>& shape, DType dtype) const {
  if (dtype != DType::f32 && dtype != DType::f16 && dtype != DType::bf16) {
    refuse("materialize: expected dtype f32, f16 or bf16, which hold -inf");
  }
  const Axes axes = axes_of(shape);
  const kernel::ForwardParams params = checked_params(*this, axes, shape);
  const std::vector<bool> visible = runtime::MaskMatrix(*this, 1, params.len_q, params.len_k).dense(0);
  std::optional<Elements> elements;
  if (tensor) elements.emplace(*tensor);

  Tensor matrix(dtype, Device{}, shape);
  const kernel::BiasStrides& strides = params.bias_strides;
  std::size_t index = 0;
  for (i64 batch = 0; batch < axes.batch; ++batch) {
    for (i64 head = 0; head < axes.groups * axes.heads; ++head) {
      const i64 base =
          batch * strides.batch + head / params.heads * strides.group + head % params.heads * strides.head;
      std::size_t pair = 0;
      for (i64 i = 0; i < axes.len_q; ++i) {
        for (i64 j = 0; j < axes.len_k; ++j, ++pair, ++index) {
          const float shown = elements ? elements->at(base + i * strides.query + j * strides.key) : 0.0f;
          store(dtype, matrix.data(), index, visible[pair] ? shown : kernel::neg_inf());
        }
      }
    }
  }
  return matrix;
}

}  // namespace attune
