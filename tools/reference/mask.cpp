#include "tools/reference/mask.h"

#include <fmt/format.h>

namespace attune::reference {
namespace {

using kernel::Anchor;
using kernel::Edge;

struct MaskMaker {
  int len_q;
  int len_k;

  /// A negative reach has no bound.
  Mask make(Anchor anchor, std::int64_t left, std::int64_t right) const {
    return {.left = left < 0 ? Edge::open : Edge::bounded,
            .right = right < 0 ? Edge::open : Edge::bounded,
            .window = kernel::make_window(anchor, left, right, len_q, len_k),
            .len_q = len_q,
            .len_k = len_k};
  }
  Mask operator()(std::monostate) const { return make(Anchor::top_left, -1, -1); }
  Mask operator()(LowerTriangularMask) const { return make(Anchor::top_left, -1, 0); }
  Mask operator()(LowerTriangularFromBottomRightMask) const { return make(Anchor::bottom_right, -1, 0); }
  Mask operator()(LowerTriangularFromBottomRightLocalAttentionMask bias) const {
    return make(Anchor::bottom_right, bias.window_size - 1, 0);
  }
  Mask operator()(LocalAttentionFromBottomRightMask bias) const {
    return make(Anchor::bottom_right, bias.window_left, bias.window_right);
  }
};

struct Namer {
  std::string operator()(std::monostate) const { return "None"; }
  std::string operator()(LowerTriangularMask) const { return "LowerTriangularMask"; }
  std::string operator()(LowerTriangularFromBottomRightMask) const {
    return "LowerTriangularFromBottomRightMask";
  }
  std::string operator()(LowerTriangularFromBottomRightLocalAttentionMask bias) const {
    return fmt::format("LowerTriangularFromBottomRightLocalAttentionMask(window_size={})", bias.window_size);
  }
  std::string operator()(LocalAttentionFromBottomRightMask bias) const {
    return fmt::format("LocalAttentionFromBottomRightMask(window_left={}, window_right={})", bias.window_left,
                       bias.window_right);
  }
};

}  // namespace

bool Mask::visible(int i, int j) const {
  constexpr kernel::KernelSpec kOpen{};
  constexpr kernel::KernelSpec kLeft{.window_left = Edge::bounded};
  constexpr kernel::KernelSpec kRight{.window_right = Edge::bounded};
  constexpr kernel::KernelSpec kBoth{.window_left = Edge::bounded, .window_right = Edge::bounded};
  if (left == Edge::bounded && right == Edge::bounded) return kernel::visible<kBoth>(window, len_k, i, j);
  if (left == Edge::bounded) return kernel::visible<kLeft>(window, len_k, i, j);
  if (right == Edge::bounded) return kernel::visible<kRight>(window, len_k, i, j);
  return kernel::visible<kOpen>(window, len_k, i, j);
}

Mask mask_of(const AttentionBias& bias, int len_q, int len_k) {
  return std::visit(MaskMaker{len_q, len_k}, bias);
}

std::string picture(const Mask& mask) {
  std::string text;
  for (int i = 0; i < mask.len_q; ++i) {
    for (int j = 0; j < mask.len_k; ++j) text += mask.visible(i, j) ? '#' : '.';
    text += '\n';
  }
  return text;
}

std::string to_string(const AttentionBias& bias) {
  return std::visit(Namer{}, bias);
}

}  // namespace attune::reference
