#include "tools/verify/case.h"

#include "tools/verify/grad_merge_case.h"

namespace attune::verify {

std::unique_ptr<Case> random_case(Random& random, const KernelClass& kernel_class, const MaskClass* mask) {
  if (kernel_class.problem.operation == kernel::Operation::grad_merge) {
    return std::make_unique<GradMergeCase>(random, kernel_class);
  }
  if (kernel_class.mask == nullptr) return std::make_unique<MergeCase>(random, kernel_class);
  const MaskClass& drawn = mask == nullptr ? *kernel_class.mask : *mask;
  if (kernel_class.problem.operation == kernel::Operation::forward) {
    return std::make_unique<AttentionCase>(random, kernel_class, drawn);
  }
  return std::make_unique<BackwardCase>(random, kernel_class, drawn);
}

}  // namespace attune::verify
