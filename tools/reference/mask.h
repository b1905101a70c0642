// A bias as a mask that tests can ask. Which keys a window lets through is semantics.h's business alone; here
// stands only what each class of the documentation means in its terms.
#pragma once

#include "attune/attune.h"
#include "attune/semantics.h"

#include <string>

namespace attune::reference {

struct Mask {
  kernel::Edge left = kernel::Edge::open;
  kernel::Edge right = kernel::Edge::open;
  kernel::Window window;
  int len_q = 0;
  int len_k = 0;

  bool visible(int i, int j) const;
};

Mask mask_of(const AttentionBias& bias, int len_q, int len_k);

/// One line per query, '#' for a visible key, '.' for a hidden one.
std::string picture(const Mask& mask);

/// "LocalAttentionFromBottomRightMask(window_left=1, window_right=2)"
std::string to_string(const AttentionBias& bias);

}  // namespace attune::reference
