// A backward pass: the launches that it takes, and the workspace between them (templates/attune/backward.h
// says which kernel computes what).
#pragma once

#include "attune/attune.h"
#include "attune/params.h"
#include "base/result.h"
#include "codegen/arch.h"
#include "codegen/problem.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace attune::runtime {

/// How many heads of a tensor there are: each axis is the query's, or 1 where the tensor serves all.
struct HeadExtents {
  kernel::i32 groups = 0;
  kernel::i32 heads = 0;
  bool operator==(const HeadExtents&) const = default;
};

/// One backward call, checked and reduced.
struct BackwardCall {
  codegen::Problem problem;       // that of the forward pass; output_dtype: of output and grad_output;
                                  // boxes: of query, key, value and grad_output
  kernel::BackwardParams params;  // without what lies in the workspace
  HeadExtents key_heads;
  HeadExtents value_heads;
  bool copies_grad_output = false;  // into the workspace, as only delta can read it where it lies
  bool deterministic = false;
  Device device;
  void* stream = nullptr;
  void* workspace = nullptr;
};

/// What a backward pass launches, one after the other.
struct BackwardPlan {
  struct Step {
    codegen::Problem problem;
    kernel::BackwardParams params;
  };
  std::array<Step, 5> steps;  // delta, two of key and value, query, bias
  std::size_t count = 0;
  std::size_t main = 0;  // the first step of the gradients: key's and value's, if they are wanted
  std::size_t workspace_bytes = 0;

  const Step* begin() const { return steps.data(); }
  const Step* end() const { return steps.data() + count; }
};

/// Where grad_output lies for the kernels after delta.
kernel::Strides read_grad_output_strides(const BackwardCall& call);

/// Into a new plan: the launches of a call on an architecture, with pointers into call.workspace (none where
/// it is null). Fails with invalid_argument when the workspace would be larger than any memory.
Result<void> plan_of(const BackwardCall& call, const codegen::Arch& arch, BackwardPlan& plan);

/// The problem of one operation of a backward pass: of the forward pass's traits those that its kernel looks
/// at.
codegen::Problem problem_of(const codegen::Problem& forward, kernel::Operation operation);

/// The problems of a pass that wants every gradient, in the order of their launches.
std::vector<codegen::Problem> problems_of_pass(const codegen::Problem& forward, const codegen::Arch& arch,
                                               bool deterministic);

}  // namespace attune::runtime
