// Dropout in a kernel that has few issue slots to spare. Philox (philox.h) keeps a GPU's integer units busy:
// products take both halves from one instruction, and pairs are dropped in float arithmetic.
#pragma once

#include "attune/cuda/ptx.cuh"
#include "attune/hd.h"
#include "attune/num.h"
#include "attune/philox.h"

namespace attune::kernel {

/// The word that Philox works on. Both halves of a product are of the same instruction: the compiler sees two
/// equal ones, and keeps one.
struct DropoutWord {
  u32 bits;

  ATTUNE_DEVICE explicit DropoutWord(u32 x) : bits(x) {}
  friend ATTUNE_DEVICE DropoutWord operator^(DropoutWord a, DropoutWord b) {
    return DropoutWord(a.bits ^ b.bits);
  }
  friend ATTUNE_DEVICE DropoutWord operator*(DropoutWord a, DropoutWord b) {
    return DropoutWord(static_cast<u32>(ptx::mul_wide_u32(a.bits, b.bits)));
  }
};

template <>
struct MultiplyHigh<DropoutWord> {
  static ATTUNE_DEVICE DropoutWord of(DropoutWord a, u32 b) {
    return DropoutWord(static_cast<u32>(ptx::mul_wide_u32(a.bits, b) >> 32));
  }
};

/// kept() of philox.h as a factor, 1 or 0: 16 bits - threshold + 1, clamped, where 0x4b000000 + n are the
/// bits of the float 2^23 + n.
ATTUNE_DEVICE float keep_factor(const DropoutParams& p, DropoutWord word, i32 half) {
  const float drawn = float_of(ptx::prmt(word.bits, 0x4b000000u, half == 0 ? 0x7610u : 0x7632u));
  return ptx::add_sat_f32(drawn, -float_of(0x4b000000u + p.threshold - 1));
}

}  // namespace attune::kernel
