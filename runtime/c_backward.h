// The arguments of a backward pass in the C ABI.
#pragma once

#include "runtime/c_arguments.h"

#include <array>
#include <cstddef>

namespace attune::runtime {

/// The structs of a call in the terms of the C++ API, whose pointers lead back into it.
struct BackwardArguments {
  TensorView grad_output, output, lse, query, key, value;
  std::array<MutableTensorView, 4> memory;
  GradientViews gradients;  // into `memory`
  AttentionBias bias;
  AttentionOptions options;
  TensorView grad_lse;
  BackwardOptions backward;

  BackwardArguments(const attune_tensor* given_grad_output, const attune_tensor* given_output,
                    const attune_tensor* given_lse, const attune_tensor* given_query,
                    const attune_tensor* given_key, const attune_tensor* given_value,
                    const attune_gradients* given_gradients, const attune_bias* given_bias,
                    const attune_options* given_options, const attune_backward_options* given_backward)
      : grad_output(view_of<TensorView>("grad_output", given_grad_output)),
        output(view_of<TensorView>("output", given_output)),
        lse(view_of<TensorView>("lse", given_lse)),
        query(view_of<TensorView>("query", given_query)),
        key(view_of<TensorView>("key", given_key)),
        value(view_of<TensorView>("value", given_value)),
        bias(bias_of(given_bias)),
        options(options_of(given_options)) {
    const attune_gradients wanted = versioned("gradients", given_gradients);
    gradients = {gradient(0, "grad_query", wanted.query), gradient(1, "grad_key", wanted.key),
                 gradient(2, "grad_value", wanted.value), gradient(3, "grad_bias", wanted.bias)};
    const attune_backward_options chosen = versioned("backward options", given_backward);
    backward.deterministic = chosen.deterministic != 0;
    backward.workspace = chosen.workspace;
    backward.workspace_bytes = chosen.workspace_bytes;
    if (chosen.grad_lse == nullptr) return;
    grad_lse = view_of<TensorView>("grad_lse", chosen.grad_lse);
    backward.grad_lse = &grad_lse;
  }

  /// The same call with memory of its own.
  BackwardArguments(const BackwardArguments& other, const attune_backward_memory& given)
      : grad_output(at(other.grad_output, given.grad_output)),
        output(at(other.output, given.output)),
        lse(at(other.lse, given.lse)),
        query(at(other.query, given.query)),
        key(at(other.key, given.key)),
        value(at(other.value, given.value)),
        memory(other.memory),
        bias(other.bias),
        options(other.options),
        grad_lse(at(other.grad_lse, given.grad_lse)),
        backward(other.backward) {
    const auto placed = [&](std::size_t index, const MutableTensorView* wanted, void* data) {
      memory[index].data = data;
      return wanted == nullptr ? nullptr : &memory[index];
    };
    gradients = {
        placed(0, other.gradients.query, given.grad_query), placed(1, other.gradients.key, given.grad_key),
        placed(2, other.gradients.value, given.grad_value), placed(3, other.gradients.bias, given.grad_bias)};
    if (bias.tensor) bias.tensor->data = given.bias;
    if (backward.grad_lse != nullptr) backward.grad_lse = &grad_lse;
    options.stream = given.stream;
    options.dropout = {given.seed, given.offset};
    backward.workspace = given.workspace;
    backward.workspace_bytes = given.workspace_bytes;
  }
  BackwardArguments(const BackwardArguments&) = delete;  // it points into itself
  BackwardArguments& operator=(const BackwardArguments&) = delete;

  /// Calls one of the C++ functions with all of them.
  template <typename Function>
  auto pass_to(Function&& function) const {
    return function(grad_output, output, lse, query, key, value, gradients, bias, options, backward);
  }

 private:
  const MutableTensorView* gradient(std::size_t index, const char* name, const attune_tensor* given) {
    if (given == nullptr) return nullptr;
    memory[index] = view_of<MutableTensorView>(name, given);
    return &memory[index];
  }
};

}  // namespace attune::runtime
