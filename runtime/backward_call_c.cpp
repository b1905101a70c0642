// A backward call of the C ABI that is described once and run with memory after memory.
#include "runtime/c_backward.h"

/// Nothing of it changes, so that threads can share it: what a run replaces, it replaces in a copy.
struct attune_backward_call {
  attune::runtime::BackwardArguments arguments;
};

using attune::runtime::BackwardArguments;
using attune::runtime::guarded;
using attune::runtime::refuse;
using attune::runtime::versioned;

attune_status attune_backward_call_create(const attune_tensor* grad_output, const attune_tensor* output,
                                          const attune_tensor* lse, const attune_tensor* query,
                                          const attune_tensor* key, const attune_tensor* value,
                                          const attune_gradients* gradients, const attune_bias* bias,
                                          const attune_options* options,
                                          const attune_backward_options* backward,
                                          attune_backward_call** call) {
  return guarded([&] {
    if (call == nullptr) refuse("backward_call_create: null call");
    *call = new attune_backward_call{
        BackwardArguments(grad_output, output, lse, query, key, value, gradients, bias, options, backward)};
  });
}

attune_status attune_backward_call_workspace_bytes(const attune_backward_call* call, size_t* bytes) {
  return guarded([&] {
    if (call == nullptr) refuse("backward_call_workspace_bytes: null call");
    if (bytes == nullptr) refuse("backward_call_workspace_bytes: null bytes");
    *bytes = call->arguments.pass_to(
        [](auto&&... arguments) { return attune::backward_workspace_bytes(arguments...); });
  });
}

attune_status attune_backward_call_run(const attune_backward_call* call,
                                       const attune_backward_memory* memory) {
  return guarded([&] {
    if (call == nullptr) refuse("backward_call_run: null call");
    if (memory == nullptr) refuse("backward_call_run: null memory");
    const BackwardArguments placed(call->arguments, versioned("backward memory", memory));
    placed.pass_to([](auto&&... arguments) { attune::memory_efficient_attention_backward(arguments...); });
  });
}

void attune_backward_call_destroy(attune_backward_call* call) {
  delete call;
}
