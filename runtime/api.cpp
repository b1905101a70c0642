// The C++ API: check, run, and failures as exceptions.
#include "attune/attune.h"
#include "runtime/check.h"
#include "runtime/cuda/cuda_backend.h"
#include "runtime/engine.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <cstdlib>
#include <utility>

namespace attune {
namespace {

constexpr std::size_t kHostAlignment = 64;

[[noreturn]] void raise(const Failure& failure) {
  throw Error(failure.kind, failure.message);
}

template <typename T>
T take(Result<T> result) {
  if (!result.ok()) raise(result.failure());
  return std::move(*result);
}

void take(const Result<void>& result) {
  if (!result.ok()) raise(result.failure());
}

runtime::Engine& engine() {
  return *take(runtime::Engine::global());
}

std::size_t bytes_of(DType dtype, const std::vector<std::int64_t>& shape) {
  std::size_t bytes = dtype == DType::f32 ? 4 : 2;
  for (const std::int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(bytes, static_cast<std::size_t>(size), &bytes)) {
      raise(invalid_argument("Tensor: a negative or overflowing shape"));
    }
  }
  return bytes;
}

void* allocate(Device device, std::size_t bytes, void* stream) {
  if (bytes == 0) return nullptr;
  if (device.type == DeviceType::cuda) return take(runtime::cuda_allocate(device.index, bytes, stream));
  void* memory =
      std::aligned_alloc(kHostAlignment, (bytes + kHostAlignment - 1) / kHostAlignment * kHostAlignment);
  if (memory == nullptr) raise(environment_failure(fmt::format("out of memory: {} bytes", bytes)));
  return memory;
}

void release(const MutableTensorView& view) noexcept {
  if (view.data == nullptr) return;
  if (view.device.type == DeviceType::cuda) {
    runtime::cuda_free(view.device.index, view.data);
  } else {
    std::free(view.data);
  }
}

/// The shape of an attention's output: the query's, with the value's last axis.
std::vector<std::int64_t> output_shape(const TensorView& query, const TensorView& value) {
  std::vector<std::int64_t> shape(query.shape.begin(), query.shape.begin() + query.rank);
  shape.back() = value.shape[value.rank - 1];
  return shape;
}

Attention allocate_and_run(const TensorView& query, const TensorView& key, const TensorView& value,
                           bool with_lse, const AttentionBias& bias, const AttentionOptions& options) {
  // Checked before anything is allocated; the allocating call checks again with the outputs.
  const runtime::Call call =
      take(runtime::check({query, key, value, nullptr, nullptr, with_lse, bias, options}));
  Attention result;
  result.output = Tensor(query.dtype, query.device, output_shape(query, value), options.stream);
  if (with_lse) {
    result.lse = Tensor(DType::f32, query.device, {call.params.batch, call.params.heads, call.params.len_q},
                        options.stream);
  }
  const MutableTensorView lse = result.lse.view();
  memory_efficient_attention_forward(query, key, value, result.output.view(), with_lse ? &lse : nullptr, bias,
                                     options);
  return result;
}

}  // namespace

Tensor::Tensor() = default;

Tensor::Tensor(DType dtype, Device device, const std::vector<std::int64_t>& shape, void* stream) {
  if (shape.size() > kMaxRank)
    raise(invalid_argument(fmt::format("Tensor: rank {}, at most {}", shape.size(), kMaxRank)));
  const std::size_t bytes = bytes_of(dtype, shape);
  view_.dtype = dtype;
  view_.device = device;
  view_.rank = static_cast<int>(shape.size());
  std::int64_t stride = 1;
  for (int axis = view_.rank - 1; axis >= 0; --axis) {
    view_.shape[axis] = shape[axis];
    view_.strides[axis] = stride;
    stride *= shape[axis] > 0 ? shape[axis] : 1;
  }
  view_.data = allocate(device, bytes, stream);
}

Tensor::Tensor(Tensor&& other) noexcept : view_(std::exchange(other.view_, {})) {}

Tensor& Tensor::operator=(Tensor&& other) noexcept {
  if (this != &other) {
    release(view_);
    view_ = std::exchange(other.view_, {});
  }
  return *this;
}

Tensor::~Tensor() {
  release(view_);
}

void memory_efficient_attention_forward(const TensorView& query, const TensorView& key,
                                        const TensorView& value, const MutableTensorView& output,
                                        const MutableTensorView* lse, const AttentionBias& bias,
                                        const AttentionOptions& options) {
  const runtime::Call call =
      take(runtime::check({query, key, value, &output, lse, lse != nullptr, bias, options}));
  take(engine().run(call));
}

Tensor memory_efficient_attention(const TensorView& query, const TensorView& key, const TensorView& value,
                                  const AttentionBias& bias, const AttentionOptions& options) {
  return allocate_and_run(query, key, value, /*with_lse=*/false, bias, options).output;
}

Attention memory_efficient_attention_forward_requires_grad(const TensorView& query, const TensorView& key,
                                                           const TensorView& value, const AttentionBias& bias,
                                                           const AttentionOptions& options) {
  return allocate_and_run(query, key, value, /*with_lse=*/true, bias, options);
}

void prepare(const TensorView& query, const TensorView& key, const TensorView& value, bool with_lse,
             const AttentionBias& bias, const AttentionOptions& options) {
  const runtime::Call call =
      take(runtime::check({query, key, value, nullptr, nullptr, with_lse, bias, options}));
  take(engine().prepare(call.problem, call.device, call.stream));
}

std::string explain(const TensorView& query, const TensorView& key, const TensorView& value, bool with_lse,
                    const AttentionBias& bias, const AttentionOptions& options) {
  const runtime::Call call =
      take(runtime::check({query, key, value, nullptr, nullptr, with_lse, bias, options}));
  const codegen::Arch& arch = take(runtime::backend_of(call.device))->arch();
  return runtime::to_json(take(engine().explain(call.problem, arch, call.device))).dump();
}

Counters counters() {
  return engine().counters();
}

std::string last_kernel() {
  return runtime::last_kernel_name();
}

}  // namespace attune
