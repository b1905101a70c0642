#include "tools/reference/judge.h"

#include "tools/reference/element.h"
#include "tools/reference/plain.h"

#include <algorithm>
#include <vector>

namespace attune::reference {

Judgement judge(const Inputs& inputs, const Values& reference, std::span<const double> output,
                std::span<const double> lse) {
  const Values plain = plain_attention(inputs);
  const std::vector<float> elements = dense(inputs.value);
  const std::vector<double> value(elements.begin(), elements.end());
  const double score = reference.largest_score;
  Judgement result;
  result.output = compare(output, plain.output, reference.output, tiny_of(score, largest_magnitude(value)));
  result.lse.ok = true;
  if (!lse.empty()) {
    result.lse =
        compare(lse, plain.lse, reference.lse, tiny_of(std::max(score, largest_magnitude(reference.lse)), 1));
  }
  return result;
}

}  // namespace attune::reference
