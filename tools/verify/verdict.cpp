#include "tools/verify/verdict.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

namespace attune::verify {

std::string damage_of(const std::vector<Part>& parts) {
  for (const Part& part : parts) {
    if (const std::string damage = part.tensor->damage(part.access); !damage.empty()) {
      return fmt::format("{}: {}", part.name, damage);
    }
  }
  return "";
}

std::string text_of(const reference::Judgement& judged, const reference::Extents& e,
                    const reference::Values& reference, const std::vector<double>& output) {
  constexpr double kNothing = -std::numeric_limits<double>::infinity();
  for (std::size_t row = 0; row < reference.lse.size(); ++row) {
    if (reference.lse[row] != kNothing) continue;
    const std::size_t i = row % e.len_q;
    const std::size_t head = row / e.len_q % e.heads;
    const std::size_t b = row / e.len_q / e.heads;
    const double* out = output.data() + ((b * e.len_q + i) * e.heads + head) * e.head_dim_v;
    if (std::any_of(out, out + e.head_dim_v, [](double x) { return x != 0; })) {
      return fmt::format("output: batch {}, query {}, head {} sees no key and is not 0", b, i, head);
    }
  }
  if (!judged.output.ok) return "output: " + judged.output.text();
  if (!judged.lse.ok) return "lse: " + judged.lse.text();
  return "";
}

std::string text_of(const reference::Gradient& plain, const reference::Gradient& reference,
                    const std::vector<double>& gradient) {
  for (std::size_t i = 0; i < gradient.size(); ++i) {
    if (reference.tiny[i] == 0 && gradient[i] != 0) {
      return fmt::format("element {} is {}, but nothing flows to it", i, gradient[i]);
    }
  }
  const reference::Comparison compared = judge(plain, reference, gradient);
  return compared.ok ? "" : compared.text();
}

}  // namespace attune::verify
