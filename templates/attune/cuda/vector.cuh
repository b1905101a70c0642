// Vectors of four floats, and how they are read from and written to rows of any dtype and alignment.
#pragma once

#include "attune/cuda/ptx.cuh"
#include "attune/hd.h"
#include "attune/num.h"
#include "attune/spec.h"

namespace attune::kernel {

ATTUNE_DEVICE float4 scale4(float4 a, float factor) {
  return {a.x * factor, a.y * factor, a.z * factor, a.w * factor};
}

ATTUNE_DEVICE float dot4(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

/// sum + factor * a
ATTUNE_DEVICE float4 add_scaled4(float4 sum, float factor, float4 a) {
  return {fmaf(factor, a.x, sum.x), fmaf(factor, a.y, sum.y), fmaf(factor, a.z, sum.z),
          fmaf(factor, a.w, sum.w)};
}

ATTUNE_DEVICE float element(const float4& a, i32 index) {
  return index == 0 ? a.x : index == 1 ? a.y : index == 2 ? a.z : a.w;
}

ATTUNE_DEVICE float widen(DType dtype, u16 bits) {
  return dtype == DType::f16 ? ptx::cvt_f32_f16(bits) : bf16_to_float(bits);
}

ATTUNE_DEVICE u16 narrow(DType dtype, float x) {
  return dtype == DType::f16 ? ptx::cvt_rn_f16_f32(x) : float_to_bf16(x);
}

/// As it is after rounding to the dtype.
template <DType T>
ATTUNE_DEVICE float4 rounded4(float4 a) {
  if constexpr (T == DType::f32) return a;
  const auto rounded = [](float x) { return widen(T, narrow(T, x)); };
  return {rounded(a.x), rounded(a.y), rounded(a.z), rounded(a.w)};
}

template <DType T>
ATTUNE_DEVICE float load1(const u8* source) {
  if constexpr (T == DType::f32) return *reinterpret_cast<const float*>(source);
  return widen(T, *reinterpret_cast<const u16*>(source));
}

template <DType T>
ATTUNE_DEVICE void store1(u8* destination, float x) {
  if constexpr (T == DType::f32) {
    *reinterpret_cast<float*>(destination) = x;
  } else {
    *reinterpret_cast<u16*>(destination) = narrow(T, x);
  }
}

/// Of the elements of a bias tensor that holds numbers.
ATTUNE_HD constexpr DType bias_dtype(Bias bias) {
  return bias == Bias::f32 ? DType::f32 : bias == Bias::f16 ? DType::f16 : DType::bf16;
}

/// An element of a bias tensor, as with_bias (semantics.h) takes it.
template <Bias B>
ATTUNE_DEVICE float load_bias(const u8* source) {
  if constexpr (B == Bias::boolean) return *source;
  return load1<bias_dtype(B)>(source);
}

/// Four elements in memory, by the widest accesses that CopyBytes allows; one element is always aligned.
template <typename Element, i32 CopyBytes>
struct Quad {
  static constexpr i32 kElement = sizeof(Element);
  static constexpr i32 kBytes = clamp(CopyBytes, kElement, 4 * kElement);
  struct alignas(kBytes) Piece {
    Element value[kBytes / sizeof(Element)];
  };
  struct Pieces {
    Piece piece[4 * sizeof(Element) / kBytes];
  };
};

/// The first `valid` of four elements (more than 4 means all), as floats; the others are zero and not read.
template <DType T, i32 CopyBytes>
ATTUNE_DEVICE float4 load4(const u8* source, i32 valid) {
  alignas(16) float x[4] = {0, 0, 0, 0};
  if constexpr (T == DType::f32) {
    const float* elements = reinterpret_cast<const float*>(source);
    if (valid >= 4) {
      *reinterpret_cast<typename Quad<float, CopyBytes>::Pieces*>(x) =
          *reinterpret_cast<const typename Quad<float, CopyBytes>::Pieces*>(elements);
    } else {
#pragma unroll
      for (i32 e = 0; e < 3; ++e) {
        if (e < valid) x[e] = elements[e];
      }
    }
  } else {
    const u16* elements = reinterpret_cast<const u16*>(source);
    alignas(8) u16 bits[4] = {0, 0, 0, 0};
    if (valid >= 4) {
      *reinterpret_cast<typename Quad<u16, CopyBytes>::Pieces*>(bits) =
          *reinterpret_cast<const typename Quad<u16, CopyBytes>::Pieces*>(elements);
    } else {
#pragma unroll
      for (i32 e = 0; e < 3; ++e) {
        if (e < valid) bits[e] = elements[e];
      }
    }
#pragma unroll
    for (i32 e = 0; e < 4; ++e) x[e] = widen(T, bits[e]);
  }
  return {x[0], x[1], x[2], x[3]};
}

/// load4 of elements that lie `step` bytes apart and are read one by one.
template <DType T>
ATTUNE_DEVICE float4 gather4(const u8* source, i64 step, i32 valid) {
  float x[4] = {0, 0, 0, 0};
#pragma unroll
  for (i32 e = 0; e < 4; ++e) {
    if (e < valid) x[e] = load1<T>(source + e * step);
  }
  return {x[0], x[1], x[2], x[3]};
}

/// The widest access that every row of a contiguous tensor is aligned for.
ATTUNE_HD constexpr i32 packed_alignment(i32 row_bytes) {
  return min(row_bytes & -row_bytes, 16);
}

/// Writes the first `valid` of four elements; more than 4 means all. Callers do not clamp (see
/// RowWalk::bytes_left).
template <DType T, i32 CopyBytes>
ATTUNE_DEVICE void store4(u8* destination, float4 a, i32 valid) {
  if constexpr (T == DType::f32) {
    float* elements = reinterpret_cast<float*>(destination);
    alignas(16) const float x[4] = {a.x, a.y, a.z, a.w};
    if (valid >= 4) {
      *reinterpret_cast<typename Quad<float, CopyBytes>::Pieces*>(elements) =
          *reinterpret_cast<const typename Quad<float, CopyBytes>::Pieces*>(x);
    } else {
#pragma unroll
      for (i32 e = 0; e < 3; ++e) {
        if (e < valid) elements[e] = x[e];
      }
    }
  } else {
    u16* elements = reinterpret_cast<u16*>(destination);
    alignas(8) const u16 bits[4] = {narrow(T, a.x), narrow(T, a.y), narrow(T, a.z), narrow(T, a.w)};
    if (valid >= 4) {
      *reinterpret_cast<typename Quad<u16, CopyBytes>::Pieces*>(elements) =
          *reinterpret_cast<const typename Quad<u16, CopyBytes>::Pieces*>(bits);
    } else {
#pragma unroll
      for (i32 e = 0; e < 3; ++e) {
        if (e < valid) elements[e] = bits[e];
      }
    }
  }
}

}  // namespace attune::kernel
