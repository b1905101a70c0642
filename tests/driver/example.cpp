#include "tests/driver/example.h"

#include "runtime/check.h"
#include "runtime/raise.h"

namespace attune::test {
namespace {

constexpr std::int64_t kWorkspaceBytes = 4 << 20;  // enough for all kinds

Tensor rows(const Kind& kind, int length) {
  return {kind.dtype, kind.device, {Example::kBatch, length, Example::kHeads, kind.head_dim}};
}

/// The views that gradients are written through.
struct Written {
  explicit Written(const Example& example)
      : query(example.grad_query.view()), key(example.grad_key.view()), value(example.grad_value.view()) {}
  GradientViews views() const { return {&query, &key, &value}; }

  MutableTensorView query, key, value;
};

}  // namespace

const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all{
      {"simt", Family::simt, DType::f32, 32, /*causal=*/true},
      {"mma on Hopper", Family::mma, DType::f16, 64, /*causal=*/true},
      {"mma on Ampere", Family::mma, DType::bf16, 64, /*causal=*/false, kAmpere},
      {"sm90", Family::sm90, DType::bf16, 128, /*causal=*/false},
      {"sm90, causal", Family::sm90, DType::f16, 64, /*causal=*/true},
  };
  return all;
}

Example::Example(const Kind& of, CUstream stream)
    : kind(of),
      query(rows(of, kLenQ)),
      key(rows(of, kLenK)),
      value(rows(of, kLenK)),
      output(rows(of, kLenQ)),
      lse(DType::f32, of.device, {kBatch, kHeads, kLenQ}),
      grad_output(rows(of, kLenQ)),
      grad_query(rows(of, kLenQ)),
      grad_key(rows(of, kLenK)),
      grad_value(rows(of, kLenK)),
      workspace(DType::f32, of.device, {kWorkspaceBytes / 4}),
      options_{.stream = stream, .families = {of.family}} {
  if (of.causal) bias_ = LowerTriangularMask{};
}

void Example::forward() const {
  const MutableTensorView lse_view = lse.view();
  memory_efficient_attention_forward(query.view(), key.view(), value.view(), output.view(), &lse_view, bias_,
                                     options_);
}

void Example::backward() const {
  const Written written(*this);
  memory_efficient_attention_backward(grad_output.view(), output.view(), lse.view(), query.view(), key.view(),
                                      value.view(), written.views(), bias_, options_, backward_options());
}

std::size_t Example::workspace_bytes() const {
  const Written written(*this);
  return backward_workspace_bytes(grad_output.view(), output.view(), lse.view(), query.view(), key.view(),
                                  value.view(), written.views(), bias_, options_, backward_options());
}

runtime::Call Example::forward_call() const {
  const MutableTensorView output_view = output.view(), lse_view = lse.view();
  const TensorView q = query.view(), k = key.view(), v = value.view();
  return runtime::take(
      runtime::check({q, k, v, &output_view, &lse_view, /*with_lse=*/true, bias_, options_}));
}

runtime::BackwardCall Example::backward_call() const {
  const Written written(*this);
  const TensorView q = query.view(), k = key.view(), v = value.view();
  const TensorView out = output.view(), numbers = lse.view(), grad = grad_output.view();
  auto call = runtime::take(runtime::check_backward(
      {grad, out, numbers, q, k, v, written.views(), bias_, options_, backward_options(), /*runs=*/true}));
  call.workspace = workspace.view().data;
  return call;
}

BackwardOptions Example::backward_options() const {
  return {.workspace = workspace.view().data, .workspace_bytes = kWorkspaceBytes};
}

}  // namespace attune::test
