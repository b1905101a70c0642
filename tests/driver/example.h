// A small problem in the memory of a stand-in device, and the calls on it.
#pragma once

#include "attune/attune.h"
#include "runtime/engine.h"

#include <cuda.h>

#include <vector>

namespace attune::test {

inline constexpr Device kHopper{DeviceType::cuda, 0};
inline constexpr Device kAmpere{DeviceType::cuda, 1};

/// What an example is, as far as kernels differ.
struct Kind {
  const char* name;
  Family family;
  DType dtype;
  int head_dim;
  bool causal = false;
  Device device = kHopper;
};

/// One of each family with masks and without.
const std::vector<Kind>& kinds();

/// Its calls are all on one stream, and take nothing from the heap that Attune does not.
class Example {
 public:
  explicit Example(const Kind& kind, CUstream stream = nullptr);

  // By the API, in the process's engine.
  void forward() const;
  void backward() const;
  std::size_t workspace_bytes() const;

  // Checked, for an engine of the caller's.
  runtime::Call forward_call() const;
  runtime::BackwardCall backward_call() const;

  static constexpr int kBatch = 2, kLenQ = 200, kLenK = 333, kHeads = 3;
  Kind kind;
  Tensor query, key, value, output, lse, grad_output, grad_query, grad_key, grad_value, workspace;

 private:
  BackwardOptions backward_options() const;

  AttentionBias bias_;
  AttentionOptions options_;
};

}  // namespace attune::test
