#include "tools/reference/mask.h"

#include <fmt/format.h>

namespace attune::reference {

std::string picture(const Mask& mask) {
  const std::vector<bool> visible = mask.dense(0);
  std::string text;
  for (int i = 0; i < mask.len_q(); ++i) {
    for (int j = 0; j < mask.len_k(); ++j) text += visible[std::size_t(i) * mask.len_k() + j] ? '#' : '.';
    text += '\n';
  }
  return text;
}

std::string to_string(const AttentionBias& bias) {
  std::string traits;
  const auto add = [&](const std::string& trait) {
    traits += traits.empty() ? "" : ", ";
    traits += trait;
  };
  if (bias.window.left >= 0 || bias.window.right >= 0) {
    add(bias.window.anchor == Window::Anchor::top_left ? "top_left" : "bottom_right");
  }
  if (bias.window.left >= 0) add(fmt::format("left {}", bias.window.left));
  if (bias.window.right >= 0) add(fmt::format("right {}", bias.window.right));
  if (bias.sequences) add(fmt::format("{} sequences", bias.sequences->count));
  return traits.empty() ? bias.name : fmt::format("{}({})", bias.name, traits);
}

}  // namespace attune::reference
