// What kernels random problems are run by. Cases of one class share a kernel, whatever their lengths, strides
// and windows are.
#pragma once

#include "codegen/arch.h"
#include "codegen/choose.h"
#include "tools/verify/mask_classes.h"

#include <span>
#include <vector>

namespace attune::verify {

/// What its cases call: attention and merges, or the backward of either.
enum class Pass { forward, backward };

struct KernelClass {
  codegen::Problem
      problem;  // forward: the whole call's, where its keys are split, too; backward: a merge's, or key's and
                // value's with the output's type; where that adds up the query's gradient, it always does
  kernel::Family family = kernel::Family::cpu;  // the one that will run it
  const MaskClass* mask = nullptr;              // that its first case draws; null: a merge
  bool deterministic = true;  // backward: has the family kernels for that mode, if it adds up the gradient?
};

/// `count` classes. Every mask class meets every type and family as evenly as the count allows; head_dims and
/// head_dim_vs spread evenly over 1 to 512, with those of well-known models among them; everything else is
/// drawn independently, as far as the family goes; a mask that it has no kernel for is passed over. Fails
/// with unsupported when the families have none for any.
Result<std::vector<KernelClass>> random_classes(Random& random, int count, const codegen::Arch& arch,
                                                std::span<const kernel::Family> families,
                                                Pass pass = Pass::forward);

/// What kernels the cases of a class need: one; for merges those of the rounds that many chunks take; for a
/// backward pass those of its steps, and the forward pass's.
std::vector<codegen::Problem> problems_of(const KernelClass& kernel_class, const codegen::Arch& arch);

/// A step of a class's backward pass.
codegen::Problem step_of(const codegen::Problem& backward, kernel::Operation operation,
                         kernel::QueryGradient query_gradient = kernel::QueryGradient::apart);

/// Gives a problem the traits of a class's masks, but no tensor.
void set_mask(const MaskClass& mask, codegen::Problem& problem);

/// What every row of contiguous tensors of a problem is aligned for, as far as align_bytes counts.
int contiguous_alignment(const codegen::Problem& problem);

/// The widest power of two up to 16 that rows of so many bytes are aligned for.
int row_alignment(std::int64_t bytes);

}  // namespace attune::verify
