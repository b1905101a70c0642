// A bias as tests ask it: pictures and names on top of the host's mask.
#pragma once

#include "attune/attn_bias.h"
#include "runtime/mask_matrix.h"

#include <string>

namespace attune::reference {

using Mask = runtime::MaskMatrix;

/// One line per query row of batch entry 0, '#' for a visible key, '.' for a hidden one.
std::string picture(const Mask& mask);

/// "LocalAttentionFromBottomRightMask(bottom_right, left 1, right 2)": name, window and number of sequences.
std::string to_string(const AttentionBias& bias);

}  // namespace attune::reference
