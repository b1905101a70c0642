// A kernel's results against the reference and the plain implementation, under the one tolerance.
#pragma once

#include "tools/reference/reference.h"
#include "tools/reference/tolerance.h"

#include <span>

namespace attune::reference {

struct Judgement {
  Comparison output;
  Comparison lse;
};

/// `reference` is reference_attention(inputs); output and lse are dense, in its order. An empty lse was not
/// written and is not judged: its comparison is ok.
Judgement judge(const Inputs& inputs, const Values& reference, std::span<const double> output,
                std::span<const double> lse);
/// `reference` is reference_merge(inputs).
Judgement judge(const MergeInputs& inputs, const Values& reference, std::span<const double> output,
                std::span<const double> lse);

/// One of the gradients of reference_backward() and of plain_backward(), for the same inputs.
Comparison judge(const Gradient& plain, const Gradient& reference, std::span<const double> gradient);

}  // namespace attune::reference
