// The C++ API: check, run, and failures as exceptions.
#include "attune/attune.h"
#include "codegen/choose.h"
#include "runtime/check.h"
#include "runtime/check_tensors.h"
#include "runtime/cuda/cuda_backend.h"
#include "runtime/engine.h"
#include "runtime/raise.h"
#include "runtime/split_keys.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <deque>
#include <utility>
#include <vector>

namespace attune {
namespace {

constexpr std::size_t kHostAlignment = 64;
constexpr std::int64_t kMaxStacked = 65536;

using runtime::raise;
using runtime::take;

runtime::Engine& engine() {
  return *take(runtime::Engine::global());
}

// ---- Memory ----

/// Row-major, without memory. Refuses shapes that cannot be.
MutableTensorView contiguous(DType dtype, Device device, const std::vector<std::int64_t>& shape) {
  if (shape.size() > kMaxRank)
    raise(invalid_argument(fmt::format("Tensor: rank {}, at most {}", shape.size(), kMaxRank)));
  MutableTensorView view;
  view.dtype = dtype;
  view.device = device;
  view.rank = static_cast<int>(shape.size());
  std::int64_t stride = 1;
  for (int axis = view.rank - 1; axis >= 0; --axis) {
    view.shape[axis] = shape[static_cast<std::size_t>(axis)];
    view.strides[axis] = stride;
    const std::int64_t size = view.shape[axis];
    if (size < 0 || __builtin_mul_overflow(stride, size > 0 ? size : 1, &stride)) {
      raise(invalid_argument("Tensor: a negative or overflowing shape"));
    }
  }
  return view;
}

std::size_t bytes_of(const MutableTensorView& view) {
  std::size_t bytes = static_cast<std::size_t>(item_bytes(view.dtype));
  for (int axis = 0; axis < view.rank; ++axis) {
    if (__builtin_mul_overflow(bytes, static_cast<std::size_t>(view.shape[axis]), &bytes)) {
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

void release(const MutableTensorView& view, void* stream) noexcept {
  if (view.data == nullptr) return;
  if (view.device.type == DeviceType::cuda) {
    runtime::cuda_free(view.device.index, view.data, stream);
  } else {
    std::free(view.data);
  }
}

/// What lives between two kernels of a stream: freed in its order.
class Temporary {
 public:
  Temporary(DType dtype, Device device, const std::vector<std::int64_t>& shape, void* stream)
      : view_(contiguous(dtype, device, shape)), stream_(stream) {
    view_.data = allocate(device, bytes_of(view_), stream);
  }
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;
  ~Temporary() { release(view_, stream_); }

  const MutableTensorView& view() const { return view_; }

 private:
  MutableTensorView view_;
  void* stream_;
};

/// The shape of a tensor of float32 that has so many bytes, or some more.
std::vector<std::int64_t> floats_of(std::size_t bytes) {
  constexpr std::size_t kFloat = sizeof(float);
  return {static_cast<std::int64_t>((bytes + kFloat - 1) / kFloat)};
}

std::vector<std::int64_t> shape_of(const TensorView& tensor) {
  return {tensor.shape.begin(), tensor.shape.begin() + tensor.rank};
}

// ---- Forward ----

/// A call without its outputs: what prepare, explain and the reasons are about.
Result<runtime::Call> check_without_output(const TensorView& query, const TensorView& key,
                                           const TensorView& value, bool with_lse, const AttentionBias& bias,
                                           const AttentionOptions& options) {
  return runtime::check({query, key, value, nullptr, nullptr, with_lse, bias, options});
}

/// Likewise, with the number of parts that its keys are split into.
runtime::Call plan_without_output(const TensorView& query, const TensorView& key, const TensorView& value,
                                  bool with_lse, const AttentionBias& bias, const AttentionOptions& options) {
  runtime::Call call = take(check_without_output(query, key, value, with_lse, bias, options));
  take(engine().plan(call));
  return call;
}

/// Allocates the results of a call and runs it; `dtype` is the output's unless options have another.
Attention allocate_and_run(const TensorView& query, const TensorView& key, const TensorView& value,
                           bool with_lse, const AttentionBias& bias, const AttentionOptions& options,
                           DType dtype) {
  // Checked before anything is allocated; the allocating call checks again with the outputs.
  take(check_without_output(query, key, value, with_lse, bias, options));
  std::vector<std::int64_t> shape = shape_of(query);
  shape.back() = value.shape[value.rank - 1];
  Attention result;
  result.output = Tensor(options.output_dtype.value_or(dtype), query.device, shape, options.stream);
  if (with_lse) {
    result.lse = Tensor(DType::f32, query.device, shape_of(runtime::lse_like(query)), options.stream);
  }
  const MutableTensorView lse = result.lse.view();
  memory_efficient_attention_forward(query, key, value, result.output.view(), with_lse ? &lse : nullptr, bias,
                                     options);
  return result;
}

// ---- Backward ----

/// The arguments of the backward calls that do not run, which all take the same.
runtime::BackwardCall check_backward(const TensorView& grad_output, const TensorView& output,
                                     const TensorView& lse, const TensorView& query, const TensorView& key,
                                     const TensorView& value, const GradientViews& gradients,
                                     const AttentionBias& bias, const AttentionOptions& options,
                                     const BackwardOptions& backward) {
  return take(runtime::check_backward(
      {grad_output, output, lse, query, key, value, gradients, bias, options, backward, /*runs=*/false}));
}

runtime::BackwardPlan plan_of(const runtime::BackwardCall& call) {
  runtime::BackwardPlan plan;
  take(engine().plan(call, plan));
  return plan;
}

void check_workspace(const char* pass, std::size_t given, std::size_t needed) {
  if (given >= needed) return;
  raise(invalid_argument(fmt::format(
      "workspace: {} bytes, expected at least the {} that {}_workspace_bytes() says", given, needed, pass)));
}

// ---- Merging ----

using Views = std::span<const TensorView>;

/// More chunks than one kernel takes: neighbours are merged into float32, then those.
void merge_in_rounds(Views attn, Views lse, const MutableTensorView& output, const MutableTensorView* lse_out,
                     const AttentionOptions& options) {
  std::deque<Temporary> memory;
  std::vector<TensorView> attn_of_groups;
  std::vector<TensorView> lse_of_groups;
  const auto allocate_like = [&](const TensorView& tensor) -> const MutableTensorView& {
    return memory.emplace_back(DType::f32, tensor.device, shape_of(tensor), options.stream).view();
  };
  for (std::size_t begin = 0; begin < attn.size(); begin += kernel::kMaxChunks) {
    const std::size_t count = std::min<std::size_t>(kernel::kMaxChunks, attn.size() - begin);
    const MutableTensorView& group = allocate_like(attn[0]);
    const MutableTensorView& group_lse = allocate_like(runtime::lse_like(attn[0]));
    merge_attentions(attn.subspan(begin, count), lse.subspan(begin, count), group, &group_lse, options);
    attn_of_groups.push_back(group);
    lse_of_groups.push_back(group_lse);
  }
  merge_attentions(attn_of_groups, lse_of_groups, output, lse_out, options);
}

/// The chunks of a stacked tensor.
std::vector<TensorView> unstacked(const char* name, const TensorView& stacked) {
  if (stacked.rank < 4 || stacked.rank > kMaxRank || stacked.shape[0] > kMaxStacked) {
    raise(invalid_argument(
        fmt::format("merge_attentions: stacked {} has {}, expected [chunks, ...] over what a chunk has, at "
                    "most {} chunks; "
                    "or pass a list",
                    name,
                    stacked.rank >= 1 && stacked.rank <= kMaxRank ? "shape " + runtime::shape_text(stacked)
                                                                  : fmt::format("rank {}", stacked.rank),
                    kMaxStacked)));
  }
  take(runtime::check_kind(name, stacked));
  take(runtime::check_memory(name, stacked, runtime::LastStride::any));
  TensorView chunk = stacked;
  chunk.rank = stacked.rank - 1;
  std::copy_n(stacked.shape.begin() + 1, chunk.rank, chunk.shape.begin());
  std::copy_n(stacked.strides.begin() + 1, chunk.rank, chunk.strides.begin());
  std::vector<TensorView> chunks;
  const std::int64_t step = runtime::stride_of(stacked, 0) * item_bytes(stacked.dtype);
  for (std::int64_t i = 0; i < stacked.shape[0]; ++i) {
    if (stacked.data != nullptr) chunk.data = static_cast<const std::byte*>(stacked.data) + i * step;
    chunks.push_back(chunk);
  }
  return chunks;
}

// ---- Introspection ----

kernel::Family kernel_family(Family family) {
  return static_cast<kernel::Family>(static_cast<int>(family) - 1);
}

/// Why the family cannot run one of the operations on a call's problem.
std::vector<std::string> reasons_against(Family family, const Result<runtime::Call>& call,
                                         std::initializer_list<kernel::Operation> operations) {
  if (static_cast<unsigned>(family) > static_cast<unsigned>(Family::sm90)) {
    raise(invalid_argument(fmt::format("unknown family {}", static_cast<int>(family))));
  }
  if (!call.ok()) return {call.failure().message};
  const auto backend = runtime::backend_of(call->device);
  if (!backend.ok()) return {backend.failure().message};
  const codegen::Arch& arch = (*backend)->arch();
  for (const kernel::Operation operation : operations) {
    codegen::Problem problem = call->problem;
    problem.operation = operation;
    if (family != Family::automatic) {
      const auto reasons = codegen::not_supported_reasons(kernel_family(family), problem, arch);
      if (!reasons.empty()) return reasons;
    } else if (const auto choice = codegen::choose(problem, arch); !choice.ok()) {
      return {choice.failure().message};
    }
  }
  return {};
}

}  // namespace

Tensor::Tensor() = default;

Tensor::Tensor(DType dtype, Device device, const std::vector<std::int64_t>& shape, void* stream)
    : view_(contiguous(dtype, device, shape)) {
  view_.data = allocate(device, bytes_of(view_), stream);
}

Tensor::Tensor(Tensor&& other) noexcept : view_(std::exchange(other.view_, {})) {}

Tensor& Tensor::operator=(Tensor&& other) noexcept {
  if (this != &other) {
    release(view_, nullptr);
    view_ = std::exchange(other.view_, {});
  }
  return *this;
}

Tensor::~Tensor() {
  release(view_, nullptr);
}

void memory_efficient_attention_forward(const TensorView& query, const TensorView& key,
                                        const TensorView& value, const MutableTensorView& output,
                                        const MutableTensorView* lse, const AttentionBias& bias,
                                        const AttentionOptions& options) {
  runtime::Call call;
  take(runtime::check({query, key, value, &output, lse, lse != nullptr, bias, options}, call));
  take(engine().plan(call));
  const std::size_t needed = runtime::workspace_bytes(call);
  if (needed == 0) return take(engine().run(call));
  if (options.workspace != nullptr) {
    check_workspace("forward", options.workspace_bytes, needed);
    call.workspace = options.workspace;
    return take(engine().run(call));
  }
  const Temporary workspace(DType::f32, query.device, floats_of(needed), options.stream);
  call.workspace = workspace.view().data;
  take(engine().run(call));
}

std::size_t forward_workspace_bytes(const TensorView& query, const TensorView& key, const TensorView& value,
                                    bool with_lse, const AttentionBias& bias,
                                    const AttentionOptions& options) {
  return runtime::workspace_bytes(plan_without_output(query, key, value, with_lse, bias, options));
}

Tensor memory_efficient_attention(const TensorView& query, const TensorView& key, const TensorView& value,
                                  const AttentionBias& bias, const AttentionOptions& options) {
  return allocate_and_run(query, key, value, /*with_lse=*/false, bias, options, query.dtype).output;
}

Attention memory_efficient_attention_forward_requires_grad(const TensorView& query, const TensorView& key,
                                                           const TensorView& value, const AttentionBias& bias,
                                                           const AttentionOptions& options) {
  return allocate_and_run(query, key, value, /*with_lse=*/true, bias, options, query.dtype);
}

Attention memory_efficient_attention_partial(const TensorView& query, const TensorView& key,
                                             const TensorView& value, const AttentionBias& bias,
                                             const AttentionOptions& options) {
  if (options.p != 0) {
    raise(
        unsupported(fmt::format("memory_efficient_attention_partial: dropout is not supported. p is {}, "
                                "expected 0",
                                options.p)));
  }
  return allocate_and_run(query, key, value, /*with_lse=*/true, bias, options, DType::f32);
}

void memory_efficient_attention_backward(const TensorView& grad_output, const TensorView& output,
                                         const TensorView& lse, const TensorView& query,
                                         const TensorView& key, const TensorView& value,
                                         const GradientViews& gradients, const AttentionBias& bias,
                                         const AttentionOptions& options, const BackwardOptions& backward) {
  runtime::BackwardCall call;
  take(runtime::check_backward(
      {grad_output, output, lse, query, key, value, gradients, bias, options, backward,
       /*runs=*/true},
      call));
  const runtime::BackwardPlan plan = plan_of(call);
  if (backward.workspace != nullptr) {
    check_workspace("backward", backward.workspace_bytes, plan.workspace_bytes);
    return take(engine().run(call, plan));
  }
  const Temporary workspace(DType::f32, query.device, floats_of(plan.workspace_bytes), options.stream);
  call.workspace = workspace.view().data;
  take(engine().run(call));
}

Gradients memory_efficient_attention_backward(const TensorView& grad_output, const TensorView& output,
                                              const TensorView& lse, const TensorView& query,
                                              const TensorView& key, const TensorView& value,
                                              const AttentionBias& bias, const AttentionOptions& options,
                                              const BackwardOptions& backward) {
  if (backward.bias_gradient && !bias.tensor) {
    raise(invalid_argument("bias_gradient: the bias has no tensor whose gradient could be computed"));
  }
  check_backward(grad_output, output, lse, query, key, value, {}, bias, options,
                 backward);  // before anything is allocated
  const auto like = [&](const TensorView& tensor) {
    return Tensor(tensor.dtype, tensor.device, shape_of(tensor), options.stream);
  };
  Gradients result{like(query), like(key), like(value), {}};
  if (backward.bias_gradient) result.bias = like(*bias.tensor);
  const MutableTensorView grad_query = result.query.view();
  const MutableTensorView grad_key = result.key.view();
  const MutableTensorView grad_value = result.value.view();
  const MutableTensorView grad_bias = result.bias.view();
  memory_efficient_attention_backward(
      grad_output, output, lse, query, key, value,
      {&grad_query, &grad_key, &grad_value, backward.bias_gradient ? &grad_bias : nullptr}, bias, options,
      backward);
  return result;
}

std::size_t backward_workspace_bytes(const TensorView& grad_output, const TensorView& output,
                                     const TensorView& lse, const TensorView& query, const TensorView& key,
                                     const TensorView& value, const GradientViews& gradients,
                                     const AttentionBias& bias, const AttentionOptions& options,
                                     const BackwardOptions& backward) {
  const runtime::BackwardCall call =
      check_backward(grad_output, output, lse, query, key, value, gradients, bias, options, backward);
  return plan_of(call).workspace_bytes;
}

void prepare_backward(const TensorView& grad_output, const TensorView& output, const TensorView& lse,
                      const TensorView& query, const TensorView& key, const TensorView& value,
                      const GradientViews& gradients, const AttentionBias& bias,
                      const AttentionOptions& options, const BackwardOptions& backward) {
  const runtime::BackwardCall call =
      check_backward(grad_output, output, lse, query, key, value, gradients, bias, options, backward);
  const runtime::BackwardPlan plan = plan_of(call);
  for (const auto& step : plan) {
    take(engine().prepare(step.problem, call.device, call.stream));
  }
}

void merge_attentions(Views attn, Views lse, const MutableTensorView& output,
                      const MutableTensorView* lse_out, const AttentionOptions& options) {
  const runtime::MergeCall call = take(runtime::check_merge({attn, lse, &output, lse_out, options.stream}));
  if (attn.size() > kernel::kMaxChunks) return merge_in_rounds(attn, lse, output, lse_out, options);
  take(engine().run(call));
}

Attention merge_attentions(Views attn, Views lse, bool write_lse, const AttentionOptions& options) {
  take(runtime::check_merge({attn, lse}));  // before anything is allocated
  const TensorView& first = attn[0];
  Attention result;
  result.output =
      Tensor(options.output_dtype.value_or(first.dtype), first.device, shape_of(first), options.stream);
  if (write_lse) {
    result.lse = Tensor(DType::f32, first.device, shape_of(runtime::lse_like(first)), options.stream);
  }
  const MutableTensorView lse_out = result.lse.view();
  merge_attentions(attn, lse, result.output.view(), write_lse ? &lse_out : nullptr, options);
  return result;
}

Attention merge_attentions(const TensorView& attn, const TensorView& lse, bool write_lse,
                           const AttentionOptions& options) {
  const auto attn_chunks = unstacked("attn", attn);
  const auto lse_chunks = unstacked("lse", lse);
  return merge_attentions(attn_chunks, lse_chunks, write_lse, options);
}

void merge_attentions_backward(const TensorView& grad_output, const TensorView* grad_lse,
                               const TensorView& output, const TensorView& lse, Views attn, Views attn_lse,
                               std::span<const MutableTensorView> grad_attn,
                               std::span<const MutableTensorView> grad_attn_lse,
                               const AttentionOptions& options) {
  take(engine().run(take(runtime::check_grad_merge(
      {grad_output, grad_lse, output, lse, attn, attn_lse, grad_attn, grad_attn_lse, options.stream}))));
}

std::vector<Attention> merge_attentions_backward(const TensorView& grad_output, const TensorView* grad_lse,
                                                 const TensorView& output, const TensorView& lse, Views attn,
                                                 Views attn_lse, const AttentionOptions& options) {
  // Checked before anything is allocated.
  take(runtime::check_grad_merge({.grad_output = grad_output,
                                  .grad_lse = grad_lse,
                                  .output = output,
                                  .lse = lse,
                                  .attn = attn,
                                  .attn_lse = attn_lse,
                                  .with_gradients = false}));
  std::vector<Attention> gradients;
  std::vector<MutableTensorView> grad_attn, grad_attn_lse;
  for (const TensorView& chunk : attn) {
    const auto allocate_like = [&](const TensorView& tensor) {
      return Tensor(tensor.dtype, tensor.device, shape_of(tensor), options.stream);
    };
    gradients.push_back({allocate_like(chunk), allocate_like(runtime::lse_like(chunk))});
    grad_attn.push_back(gradients.back().output.view());
    grad_attn_lse.push_back(gradients.back().lse.view());
  }
  merge_attentions_backward(grad_output, grad_lse, output, lse, attn, attn_lse, grad_attn, grad_attn_lse,
                            options);
  return gradients;
}

void prepare(const TensorView& query, const TensorView& key, const TensorView& value, bool with_lse,
             const AttentionBias& bias, const AttentionOptions& options) {
  const runtime::Call call = plan_without_output(query, key, value, with_lse, bias, options);
  for (const codegen::Problem& problem : runtime::problems_of(call)) {
    take(engine().prepare(problem, call.device, call.stream));
  }
}

std::vector<std::string> not_supported_reasons(Family family, const TensorView& query, const TensorView& key,
                                               const TensorView& value, const AttentionBias& bias,
                                               const AttentionOptions& options) {
  const auto call = check_without_output(query, key, value, /*with_lse=*/false, bias, options);
  return reasons_against(family, call, {kernel::Operation::forward});
}

std::vector<std::string> backward_not_supported_reasons(Family family, const TensorView& query,
                                                        const TensorView& key, const TensorView& value,
                                                        const AttentionBias& bias,
                                                        const AttentionOptions& options) {
  const auto call = check_without_output(query, key, value, /*with_lse=*/false, bias, options);
  return reasons_against(family, call, {kernel::Operation::grad_key_value, kernel::Operation::grad_query});
}

std::string explain(const TensorView& query, const TensorView& key, const TensorView& value, bool with_lse,
                    const AttentionBias& bias, const AttentionOptions& options) {
  const runtime::Call call = plan_without_output(query, key, value, with_lse, bias, options);
  const codegen::Arch& arch = take(runtime::backend_of(call.device))->arch();
  const auto explained = [&](const codegen::Problem& problem) {
    return runtime::to_json(take(engine().explain(problem, arch, call.device)));
  };
  const auto problems = runtime::problems_of(call);
  nlohmann::json json = explained(problems.front());
  if (call.params.splits > 1) {
    json["splits"] = call.params.splits;
    json["merge"] = explained(problems.back());
  }
  return json.dump();
}

std::string explain_backward(const TensorView& grad_output, const TensorView& output, const TensorView& lse,
                             const TensorView& query, const TensorView& key, const TensorView& value,
                             const GradientViews& gradients, const AttentionBias& bias,
                             const AttentionOptions& options, const BackwardOptions& backward) {
  const runtime::BackwardCall call =
      check_backward(grad_output, output, lse, query, key, value, gradients, bias, options, backward);
  const codegen::Arch& arch = take(runtime::backend_of(call.device))->arch();
  const runtime::BackwardPlan plan = plan_of(call);
  nlohmann::json kernels = nlohmann::json::array();
  for (const auto& step : plan) {
    kernels.push_back(runtime::to_json(take(engine().explain(step.problem, arch, call.device))));
  }
  return nlohmann::json{{"kernels", kernels}, {"workspace_bytes", plan.workspace_bytes}}.dump();
}

Counters counters() {
  return engine().counters();
}

std::string last_kernel() {
  return runtime::last_kernel_name();
}

}  // namespace attune
