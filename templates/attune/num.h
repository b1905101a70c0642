// Numbers: constants, 16-bit conversions in integer arithmetic, and the decisions of the online softmax that
// every kernel shares (docs/semantics.md). Scores are in base 2 inside a kernel: s2 = scale * log2(e) * q.k.
#pragma once

#include "attune/hd.h"

namespace attune::kernel {

inline constexpr float kLog2e = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

ATTUNE_HD constexpr float nan() {
  return __builtin_bit_cast(float, 0x7fffffffu);
}

/// Neither an infinity nor NaN.
ATTUNE_HD constexpr bool is_finite(float x) {
  return x - x == 0.0f;
}

ATTUNE_HD constexpr float neg_inf() {
  return __builtin_bit_cast(float, 0xff800000u);
}

/// What is subtracted in the exponent. A row that has seen nothing has maximum -inf; subtracting 0 instead
/// keeps exp2(-inf - 0) = 0 and avoids -inf - -inf. F is float or a vector of floats.
template <typename F>
ATTUNE_HD constexpr F safe_max(F row_max) {
  return row_max == F(neg_inf()) ? F(0.0f) : row_max;
}

/// Output factor of a row: 0 for a row that saw nothing, so its output is 0; NaN for NaN. F as above.
template <typename F>
ATTUNE_HD constexpr F inverse_sum(F row_sum) {
  return row_sum == F(0.0f) ? F(0.0f) : F(1.0f) / row_sum;
}

ATTUNE_HD u32 bits_of(float x) {
  return __builtin_bit_cast(u32, x);
}
ATTUNE_HD float float_of(u32 bits) {
  return __builtin_bit_cast(float, bits);
}

ATTUNE_HD float bf16_to_float(u16 h) {
  return float_of(u32{h} << 16);
}

/// Round to nearest even; NaN stays NaN.
ATTUNE_HD u16 float_to_bf16(float x) {
  const u32 b = bits_of(x);
  const u32 rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  return static_cast<u16>(x != x ? (b >> 16) | 0x40u : rounded);
}

ATTUNE_HD float f16_to_float(u16 h) {
  const u32 sign = u32{h & 0x8000u} << 16;
  const u32 magnitude = h & 0x7fffu;
  // Shift into float position and rescale by 2^112: exact for normals and subnormals alike.
  const float scaled = float_of(magnitude << 13) * float_of(0x77800000u);
  const u32 inf_or_nan = (magnitude << 13) + 0x70000000u;  // exponent 31 -> 255
  return float_of(sign | (magnitude >= 0x7c00u ? inf_or_nan : bits_of(scaled)));
}

/// Round to nearest even; overflow becomes infinity; NaN stays NaN.
ATTUNE_HD u16 float_to_f16(float x) {
  const u32 b = bits_of(x);
  const u32 sign = (b >> 16) & 0x8000u;
  const u32 a = b & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<u16>(sign | 0x7e00u);
  if (a >= 0x477ff000u) return static_cast<u16>(sign | 0x7c00u);  // >= 65520 rounds to infinity
  if (a < 0x38800000u) {  // below 2^-14: subnormal; 0.5f's ulp is 2^-24
    const float shifted = float_of(a) + 0.5f;
    return static_cast<u16>(sign | (bits_of(shifted) - 0x3f000000u));
  }
  const u32 rounded = a + 0xfffu + ((a >> 13) & 1u);
  return static_cast<u16>(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace attune::kernel
