// 16-bit conversions against every bit pattern and against the rounding of a double; the softmax's decisions.
#include "attune/num.h"

#include "tests/support/random.h"

#include <doctest/doctest.h>
#include <fmt/format.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

using namespace attune::kernel;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// A 16-bit binary format: bits of the significand with the hidden one, and the smallest normal's exponent.
struct Format {
  int precision;
  int min_exponent;
  int max_exponent;
};
constexpr Format kF16{11, -14, 15};
constexpr Format kBf16{8, -126, 127};

/// The value of a bit pattern by the definition of the format.
double value_of(Format format, u16 bits) {
  const int fraction_bits = format.precision - 1;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const int exponent = (bits & 0x7fff) >> fraction_bits;
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == format.max_exponent - format.min_exponent + 2) {
    return fraction != 0 ? kNan : sign * kInf;
  }
  if (exponent == 0) return sign * std::ldexp(fraction, format.min_exponent - fraction_bits);
  return sign *
         std::ldexp((1 << fraction_bits) + fraction, format.min_exponent + exponent - 1 - fraction_bits);
}

/// The nearest value of the format, ties to even, by scaling so that the last place is 1.
double nearest(Format format, double x) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), format.min_exponent);
  const double last_place = std::ldexp(1.0, exponent - (format.precision - 1));
  const double rounded = std::nearbyint(x / last_place) * last_place;
  const double largest = std::ldexp(2 - std::ldexp(1.0, 1 - format.precision), format.max_exponent);
  return std::abs(rounded) > largest ? std::copysign(std::numeric_limits<double>::infinity(), x) : rounded;
}

void check_rounding(float x) {
  const double f16 = f16_to_float(float_to_f16(x));
  const double bf16 = bf16_to_float(float_to_bf16(x));
  const bool right = std::isnan(x)
                         ? std::isnan(f16) && std::isnan(bf16)
                         : f16 == nearest(kF16, x) && bf16 == nearest(kBf16, x) &&
                               std::signbit(f16) == std::signbit(x) && std::signbit(bf16) == std::signbit(x);
  if (!right) FAIL(fmt::format("{:a} (0x{:08x}) rounds to f16 {:a} and bf16 {:a}", x, bits_of(x), f16, bf16));
}

}  // namespace

TEST_CASE("every 16-bit pattern has its value and survives the way there and back") {
  for (u32 pattern = 0; pattern <= 0xffff; ++pattern) {
    CAPTURE(pattern);
    const u16 bits = static_cast<u16>(pattern);
    const double f16 = value_of(kF16, bits);
    const double bf16 = value_of(kBf16, bits);
    if (std::isnan(f16)) {
      REQUIRE(std::isnan(f16_to_float(bits)));
      REQUIRE(std::isnan(value_of(kF16, float_to_f16(f16_to_float(bits)))));
    } else {
      REQUIRE(f16_to_float(bits) == f16);
      REQUIRE(float_to_f16(f16_to_float(bits)) == bits);
    }
    if (std::isnan(bf16)) {
      REQUIRE(std::isnan(bf16_to_float(bits)));
      REQUIRE(std::isnan(value_of(kBf16, float_to_bf16(bf16_to_float(bits)))));
    } else {
      REQUIRE(bf16_to_float(bits) == bf16);
      REQUIRE(float_to_bf16(bf16_to_float(bits)) == bits);
    }
  }
}

TEST_CASE("floats round to the nearest, ties to even, at every boundary") {
  for (u32 pattern = 0; pattern <= 0xffff; ++pattern) {
    const float f16 = f16_to_float(static_cast<u16>(pattern));
    const float bf16 = bf16_to_float(static_cast<u16>(pattern));
    for (const u32 bits : {bits_of(f16), bits_of(bf16)}) {
      // The value, its float neighbours, and the ties half a place further with theirs.
      for (const u32 step : {0u, 1u, ~0u, 0x1000u, 0xfffu, 0x1001u, 0x8000u, 0x7fffu, 0x8001u}) {
        check_rounding(float_of(bits + step));
      }
    }
  }
  // Below float16's smallest subnormal, and its ties.
  for (const float x : {0x1p-24f, 0x1p-25f, 0x1.000002p-25f, 0x1.8p-24f, 0x1p-26f, 0x1p-149f, 65504.0f,
                        65519.996f, 65520.0f, 3.3961775e38f, 0.0f, kInf, kNan}) {
    check_rounding(x);
    check_rounding(-x);
  }
}

TEST_CASE("random floats round to the nearest") {
  attune::test::Random random(attune::test::test_seed());
  for (int round = 0; round < 1'000'000; ++round) {
    check_rounding(float_of(static_cast<u32>(random.bits())));
    // float16 knows few exponents; draw one of them.
    check_rounding(static_cast<float>(std::ldexp(random.unit() - 0.5, random.integer(-26, 18))));
  }
}

TEST_CASE("conversions are those of IEEE hardware") {
#if defined(__FLT16_MANT_DIG__)
  attune::test::Random random(attune::test::test_seed(), 1);
  for (int round = 0; round < 200'000; ++round) {
    const auto x = static_cast<float>(std::ldexp(random.unit() - 0.5, random.integer(-26, 18)));
    REQUIRE(float_to_f16(x) == std::bit_cast<u16>(static_cast<_Float16>(x)));
  }
#else
  MESSAGE("this compiler has no _Float16; the double's rounding stands alone");
#endif
}

TEST_CASE("a row that has seen nothing subtracts 0 and is multiplied by 0") {
  CHECK(neg_inf() == -kInf);
  CHECK(safe_max(neg_inf()) == 0.0f);
  CHECK(std::exp2(neg_inf() - safe_max(neg_inf())) == 0.0f);
  CHECK(inverse_sum(0.0f) == 0.0f);
}

TEST_CASE("every other row is left alone, NaN included") {
  for (const float x : {-1e30f, -1.0f, 0.0f, 3.5f, 1e30f, kInf}) CHECK(safe_max(x) == x);
  CHECK(std::isnan(safe_max(kNan)));
  CHECK(inverse_sum(4.0f) == 0.25f);
  CHECK(inverse_sum(1e-38f) == 1 / 1e-38f);
  CHECK(std::isnan(inverse_sum(kNan)));
  CHECK(kLog2e * kLn2 == doctest::Approx(1).epsilon(1e-7));
}
