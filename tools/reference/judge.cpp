#include "tools/reference/judge.h"

#include "tools/reference/plain.h"

#include <algorithm>

namespace attune::reference {
namespace {

Judgement judge(const Values& plain, const Values& reference, std::span<const double> output,
                std::span<const double> lse) {
  const double score = reference.score_magnitude;
  Judgement result;
  result.output = compare(output, plain.output, reference.output, tiny_of(score, reference.value_magnitude));
  result.lse.ok = true;
  if (!lse.empty()) {
    result.lse =
        compare(lse, plain.lse, reference.lse, tiny_of(std::max(score, largest_magnitude(reference.lse)), 1));
  }
  return result;
}

}  // namespace

Judgement judge(const Inputs& inputs, const Values& reference, std::span<const double> output,
                std::span<const double> lse) {
  return judge(plain_attention(inputs), reference, output, lse);
}

Judgement judge(const MergeInputs& inputs, const Values& reference, std::span<const double> output,
                std::span<const double> lse) {
  return judge(plain_merge(inputs), reference, output, lse);
}

Comparison judge(const Gradient& plain, const Gradient& reference, std::span<const double> gradient) {
  return compare(gradient, plain.values, reference.values, reference.tiny);
}

}  // namespace attune::reference
