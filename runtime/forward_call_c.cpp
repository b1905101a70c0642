// A forward call of the C ABI that is described once and run with memory after memory.
#include "runtime/c_arguments.h"

#include <memory>
#include <optional>

/// The arguments of a call. Nothing of it changes, so that threads can share it: what a run replaces, it
/// replaces in copies.
struct attune_forward_call {
  attune::TensorView query, key, value;
  attune::MutableTensorView output;
  std::optional<attune::MutableTensorView> lse;
  attune::AttentionBias bias;
  attune::AttentionOptions options;
};

namespace attune::runtime {
namespace {

void run(const attune_forward_call& call, const attune_forward_memory& memory) {
  AttentionOptions options = call.options;
  options.stream = memory.stream;
  options.dropout = {memory.seed, memory.offset};
  options.workspace = memory.workspace;
  options.workspace_bytes = memory.workspace_bytes;
  const MutableTensorView lse = call.lse ? at(*call.lse, memory.lse) : MutableTensorView();
  const auto run_with = [&](const AttentionBias& bias) {
    memory_efficient_attention_forward(at(call.query, memory.query), at(call.key, memory.key),
                                       at(call.value, memory.value), at(call.output, memory.output),
                                       call.lse ? &lse : nullptr, bias, options);
  };
  if (!call.bias.tensor) return run_with(call.bias);
  AttentionBias bias = call.bias;
  bias.tensor->data = memory.bias;
  run_with(bias);
}

}  // namespace
}  // namespace attune::runtime

using attune::runtime::bias_of;
using attune::runtime::guarded;
using attune::runtime::options_of;
using attune::runtime::refuse;
using attune::runtime::versioned;
using attune::runtime::view_of;

attune_status attune_forward_call_create(const attune_tensor* query, const attune_tensor* key,
                                         const attune_tensor* value, const attune_tensor* output,
                                         const attune_tensor* lse, const attune_bias* bias,
                                         const attune_options* options, attune_forward_call** call) {
  return guarded([&] {
    if (call == nullptr) refuse("forward_call_create: null call");
    auto made = std::make_unique<attune_forward_call>(
        attune_forward_call{.query = view_of<attune::TensorView>("query", query),
                            .key = view_of<attune::TensorView>("key", key),
                            .value = view_of<attune::TensorView>("value", value),
                            .output = view_of<attune::MutableTensorView>("output", output),
                            .lse = {},
                            .bias = bias_of(bias),
                            .options = options_of(options)});
    if (lse != nullptr) made->lse = view_of<attune::MutableTensorView>("lse", lse);
    *call = made.release();
  });
}

attune_status attune_forward_call_workspace_bytes(const attune_forward_call* call, size_t* bytes) {
  return guarded([&] {
    if (call == nullptr) refuse("forward_call_workspace_bytes: null call");
    if (bytes == nullptr) refuse("forward_call_workspace_bytes: null bytes");
    *bytes = attune::forward_workspace_bytes(call->query, call->key, call->value, call->lse.has_value(),
                                             call->bias, call->options);
  });
}

attune_status attune_forward_call_run(const attune_forward_call* call, const attune_forward_memory* memory) {
  return guarded([&] {
    if (call == nullptr) refuse("forward_call_run: null call");
    if (memory == nullptr) refuse("forward_call_run: null memory");
    attune::runtime::run(*call, versioned("forward memory", memory));
  });
}

void attune_forward_call_destroy(attune_forward_call* call) {
  delete call;
}
