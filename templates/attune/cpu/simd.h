// Vectors: what CPU kernels compute with. Clang's ext_vector_type makes arithmetic, comparison and selection
// plain operators, so only loads, conversions, transposition and the two transcendental functions stand here.
#pragma once

#include "attune/hd.h"
#include "attune/num.h"
#include "attune/philox.h"
#include "attune/spec.h"

namespace attune::kernel {

template <i32 L>
using Floats = float __attribute__((ext_vector_type(L)));
/// Integers, and the masks that comparisons of Floats give: all ones or zero.
template <i32 L>
using Ints = i32 __attribute__((ext_vector_type(L)));
template <i32 L>
using Words = u32 __attribute__((ext_vector_type(L)));

/// 0, 1, 2, ...
template <i32 L>
ATTUNE_HD Ints<L> lane_numbers() {
  Ints<L> lane;
  for (i32 i = 0; i < L; ++i) lane[i] = i;
  return lane;
}

// ---- Memory ----

template <typename V, typename T>
ATTUNE_HD V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <typename T, typename V>
ATTUNE_HD void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

/// The element of a tensor in memory.
template <DType D>
struct ElementOf {
  using type = u16;
};
template <>
struct ElementOf<DType::f32> {
  using type = float;
};
template <DType D>
using Element = typename ElementOf<D>::type;

/// L elements of a tensor as float32.
template <DType D, i32 L>
ATTUNE_HD Floats<L> load_as_float(const Element<D>* p) {
  if constexpr (D == DType::f32) {
    return load<Floats<L>>(p);
  } else if constexpr (D == DType::f16) {
    typedef _Float16 Halves __attribute__((ext_vector_type(L)));
    return __builtin_convertvector(load<Halves>(p), Floats<L>);
  } else {
    typedef u16 Halves __attribute__((ext_vector_type(L)));
    return __builtin_bit_cast(Floats<L>, __builtin_convertvector(load<Halves>(p), Ints<L>) << 16);
  }
}

template <DType D>
ATTUNE_HD float load_as_float(const Element<D>* p) {
  if constexpr (D == DType::f32) return *p;
  if constexpr (D == DType::f16) return static_cast<float>(load<_Float16>(p));
  if constexpr (D == DType::bf16) return bf16_to_float(*p);
}

/// Rounds to nearest even, as num.h does.
template <DType D, i32 L>
ATTUNE_HD void store_as(Element<D>* p, Floats<L> v) {
  if constexpr (D == DType::f32) {
    store(p, v);
  } else if constexpr (D == DType::f16) {
    typedef _Float16 Halves __attribute__((ext_vector_type(L)));
    store(p, __builtin_convertvector(v, Halves));
  } else {
    typedef u16 Halves __attribute__((ext_vector_type(L)));
    const Words<L> bits = __builtin_bit_cast(Words<L>, v);
    const Words<L> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    store(p, __builtin_convertvector(v != v ? (bits >> 16) | 0x40u : rounded, Halves));
  }
}

template <DType D>
ATTUNE_HD void store_as(Element<D>* p, float x) {
  if constexpr (D == DType::f32) *p = x;
  if constexpr (D == DType::f16) store(p, static_cast<_Float16>(x));
  if constexpr (D == DType::bf16) *p = float_to_bf16(x);
}

/// The element of a bias tensor in memory, and its widening: a boolean becomes 0 or something else.
template <Bias B>
struct BiasElementOf {
  static constexpr DType dtype = B == Bias::f16 ? DType::f16 : B == Bias::bf16 ? DType::bf16 : DType::f32;
  using type = Element<dtype>;
};
template <>
struct BiasElementOf<Bias::boolean> {
  using type = u8;
};
template <Bias B>
using BiasElement = typename BiasElementOf<B>::type;

template <Bias B, i32 L>
ATTUNE_HD Floats<L> load_bias_as_float(const BiasElement<B>* p) {
  if constexpr (B == Bias::boolean) {
    typedef u8 Bytes __attribute__((ext_vector_type(L)));
    return __builtin_convertvector(load<Bytes>(p), Floats<L>);
  } else {
    return load_as_float<BiasElementOf<B>::dtype, L>(p);
  }
}

template <Bias B>
ATTUNE_HD float load_bias_as_float(const BiasElement<B>* p) {
  if constexpr (B == Bias::boolean) {
    return *p;
  } else {
    return load_as_float<BiasElementOf<B>::dtype>(p);
  }
}

// ---- Arithmetic ----

template <i32 L>
ATTUNE_HD Floats<L> fma(Floats<L> a, Floats<L> b, Floats<L> c) {
  return __builtin_elementwise_fma(a, b, c);
}

/// The larger of the two; `b` where `a` is NaN.
template <i32 L>
ATTUNE_HD Floats<L> max(Floats<L> a, Floats<L> b) {
  return a > b ? a : b;
}

template <i32 L>
struct MultiplyHigh<Words<L>> {
  static ATTUNE_HD Words<L> of(Words<L> a, u32 b) {
    typedef u64 Wide __attribute__((ext_vector_type(L)));
    return __builtin_convertvector(__builtin_convertvector(a, Wide) * Wide(b) >> 32, Words<L>);
  }
};

/// 2^x for x <= 0, with a relative error below 1.2e-7; exactly 0 for -inf and exactly 1 for 0; NaN for NaN.
/// Results below 2^-126 are flushed or wrong by less than 2^-126.
template <i32 L>
ATTUNE_HD Floats<L> exp2(Floats<L> x) {
  using F = Floats<L>;
#if defined(__AVX512DQ__)
  static_assert(L == 16, "AVX-512 has 16 lanes");
  // Both instructions take care of -inf: its fraction is 0, and its scale 0.
  typedef float Native __attribute__((vector_size(64)));
  constexpr int kFloorQuietly = 0x09;
  constexpr int kCurrentRounding = 4;
  const Native native = __builtin_bit_cast(Native, x);
  const F fraction = __builtin_bit_cast(
      F, __builtin_ia32_reduceps512_mask(native, kFloorQuietly, native, u16(-1), kCurrentRounding));
#else
  x = max<L>(F(-127.0f), x);
  const F whole = __builtin_elementwise_floor(x);
  const F fraction = x - whole;
#endif
  // Minimax on [0, 1] in relative error, 2e-9, through 1 at 0.
  F p = F(0.0002161291594410278f);
  p = fma<L>(p, fraction, F(0.0012467846173865845f));
  p = fma<L>(p, fraction, F(0.009675451593586043f));
  p = fma<L>(p, fraction, F(0.05548528060794735f));
  p = fma<L>(p, fraction, F(0.24022930555352395f));
  p = fma<L>(p, fraction, F(0.6931470444433983f));
  p = fma<L>(p, fraction, F(1.0f));
#if defined(__AVX512DQ__)
  const Native scaled =
      __builtin_ia32_scalefps512_mask(__builtin_bit_cast(Native, p), native, native, u16(-1),
                                      kCurrentRounding);  // p * 2^floor(x)
  return __builtin_bit_cast(F, scaled);
#else
  // Adds to the exponent. At -127 the bits of 1 become those of 0.
  return __builtin_bit_cast(F,
                            __builtin_bit_cast(Ints<L>, p) + (__builtin_convertvector(whole, Ints<L>) << 23));
#endif
}

/// log2 of positive normal numbers, with an error below 2e-7; NaN for NaN.
template <i32 L>
ATTUNE_HD Floats<L> log2(Floats<L> x) {
  using F = Floats<L>;
  using I = Ints<L>;
  constexpr i32 kSqrtHalf = 0x3f3504f3;
  // x = 2^exponent * mantissa, mantissa in [sqrt(1/2), sqrt(2))
  const I bits = __builtin_bit_cast(I, x);
  const I exponent = (bits - kSqrtHalf) >> 23;
  const F mantissa = __builtin_bit_cast(F, bits - (exponent << 23));
  // ln(mantissa) = 2 artanh(t)
  const F t = (mantissa - 1.0f) / (mantissa + 1.0f);
  const F t2 = t * t;
  F series = F(1.0f / 9);
  series = fma<L>(series, t2, F(1.0f / 7));
  series = fma<L>(series, t2, F(1.0f / 5));
  series = fma<L>(series, t2, F(1.0f / 3));
  series = fma<L>(series, t2, F(1.0f));
  const F nan_or_zero = x - x;
  return fma<L>(2.0f * kLog2e * t, series, __builtin_convertvector(exponent, F)) + nan_or_zero;
}

// ---- Transposition ----

template <i32 L>
ATTUNE_HD void interleave(Floats<L> a, Floats<L> b, Floats<L>& low, Floats<L>& high) {
  if constexpr (L == 16) {
    low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else {
    static_assert(L == 8, "vectors have 16 or 8 lanes");
    low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  }
}

/// Transposes an L x L tile in place: log2(L) perfect shuffles of its rows.
template <i32 L>
ATTUNE_HD void transpose(Floats<L> (&rows)[L]) {
#pragma clang loop unroll(full)
  for (i32 step = 1; step < L; step *= 2) {
    Floats<L> shuffled[L];
#pragma clang loop unroll(full)
    for (i32 i = 0; i < L / 2; ++i) {
      interleave<L>(rows[i], rows[i + L / 2], shuffled[2 * i], shuffled[2 * i + 1]);
    }
#pragma clang loop unroll(full)
    for (i32 i = 0; i < L; ++i) rows[i] = shuffled[i];
  }
}

}  // namespace attune::kernel
