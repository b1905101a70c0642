// The freestanding base of every template. Four compilers read these headers, none with a standard library:
// the host compiler, NVRTC (GPU kernels), the Clang plugin (CPU kernels) and, in tests, whatever is at hand.
#pragma once

#if defined(__CUDACC__)
#define ATTUNE_HD __host__ __device__ __forceinline__
#else
#define ATTUNE_HD inline __attribute__((always_inline))
#endif

namespace attune::kernel {

using i32 = int;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;
using u16 = unsigned short;
using u8 = unsigned char;
static_assert(sizeof(u16) == 2 && sizeof(i32) == 4 && sizeof(i64) == 8);

ATTUNE_HD constexpr i32 min(i32 a, i32 b) {
  return a < b ? a : b;
}
ATTUNE_HD constexpr i32 max(i32 a, i32 b) {
  return a > b ? a : b;
}
ATTUNE_HD constexpr i32 ceil_div(i32 a, i32 b) {
  return (a + b - 1) / b;
}
ATTUNE_HD constexpr i32 round_up(i32 a, i32 b) {
  return ceil_div(a, b) * b;
}
ATTUNE_HD constexpr i32 clamp(i32 x, i32 low, i32 high) {
  return max(low, min(x, high));
}
/// The smallest power of two that is at least x.
ATTUNE_HD constexpr i32 bit_ceil(i32 x) {
  i32 power = 1;
  while (power < x) power *= 2;
  return power;
}

}  // namespace attune::kernel
