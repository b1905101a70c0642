// PTX, one function per instruction and named after it. Inline assembly stands here alone. Every comment
// gives the contract and the oldest architecture; where none is given, sm_60.
#pragma once

#include "attune/hd.h"
#include "attune/spec.h"

#define ATTUNE_DEVICE __device__ __forceinline__

namespace attune::kernel::ptx {

/// The address of an object in shared memory as the 32-bit number that the instructions below take.
ATTUNE_DEVICE u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

/// The same value, whose origin the compiler cannot see. What is computed from it inside a loop is computed
/// there: hoisted out, it would occupy registers that the tiles need.
template <typename T>
ATTUNE_DEVICE T opaque(T x) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(x));
  } else {
    asm volatile("" : "+r"(x));
  }
  return x;
}

// ---- Arithmetic ----

/// 2^x to 2 ulp; exp2(-inf) = 0; results below 2^-126 flush to 0.
ATTUNE_DEVICE float ex2_approx_ftz(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// float32 from the bits of a float16; exact.
ATTUNE_DEVICE float cvt_f32_f16(u16 bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}

/// The bits of a float16, rounded to nearest even.
ATTUNE_DEVICE u16 cvt_rn_f16_f32(float x) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

/// Two float16 in one register, rounded to nearest even. sm_80.
ATTUNE_DEVICE u32 cvt_rn_f16x2_f32(float low, float high) {
  u32 bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

/// Two bfloat16 in one register, rounded to nearest even. sm_80.
ATTUNE_DEVICE u32 cvt_rn_bf16x2_f32(float low, float high) {
  u32 bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

/// Four bytes of a (numbers 0 to 3) and b (4 to 7), by the four hexadecimal digits of `bytes`.
ATTUNE_DEVICE u32 prmt(u32 a, u32 b, u32 bytes) {
  u32 word;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(bytes));
  return word;
}

/// All 64 bits of a product, in one instruction: the compiler takes two for the halves of a product in C++.
ATTUNE_DEVICE u64 mul_wide_u32(u32 a, u32 b) {
  u64 product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

// ---- Shared memory ----

struct Chunk {
  u32 word[4];
};

/// 16 bytes; the address is a multiple of 16.
ATTUNE_DEVICE Chunk ld_shared_v4(u32 address) {
  Chunk c;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(c.word[0]), "=r"(c.word[1]), "=r"(c.word[2]), "=r"(c.word[3])
               : "r"(address)
               : "memory");
  return c;
}

/// 16 bytes; the address is a multiple of 16.
ATTUNE_DEVICE void st_shared_v4(u32 address, const Chunk& c) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(address), "r"(c.word[0]), "r"(c.word[1]), "r"(c.word[2]), "r"(c.word[3])
               : "memory");
}

ATTUNE_DEVICE u32 ld_shared_u8(u32 address) {
  u32 byte;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(address) : "memory");
  return byte;
}

ATTUNE_DEVICE void st_shared_u8(u32 address, u32 byte) {
  asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(byte) : "memory");
}

/// 2 bytes; the address is a multiple of 2.
ATTUNE_DEVICE u16 ld_shared_u16(u32 address) {
  u16 word;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(word) : "r"(address) : "memory");
  return word;
}

/// 8 bytes; the address is a multiple of 8.
ATTUNE_DEVICE void ld_shared_v2_f32(float& low, float& high, u32 address) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(low), "=f"(high) : "r"(address) : "memory");
}

/// 8 bytes; the address is a multiple of 8.
ATTUNE_DEVICE void st_shared_v2_f32(u32 address, float low, float high) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" : : "r"(address), "f"(low), "f"(high) : "memory");
}

/// Lets the launch behind this one begin, where it was made to, as soon as all blocks have come here or
/// ended. Nothing before sm_90.
ATTUNE_DEVICE void griddepcontrol_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// Waits until the launch before this one, where this one began before its end, is done and its memory seen.
/// Nothing before sm_90.
ATTUNE_DEVICE void griddepcontrol_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// 4 bytes; the address is a multiple of 4.
ATTUNE_DEVICE u32 ld_shared_b32(u32 address) {
  u32 word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

/// 4 bytes; the address is a multiple of 4.
ATTUNE_DEVICE void st_shared_b32(u32 address, u32 word) {
  asm volatile("st.shared.b32 [%0], %1;" : : "r"(address), "r"(word) : "memory");
}

/// Four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8, a multiple of
/// 16. Lane l receives elements 2 * (l % 4) and the next of row l / 4 of each matrix. Whole warp. sm_75.
ATTUNE_DEVICE void ldmatrix_x4(u32 (&d)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

/// Four, with every matrix transposed. Whole warp. sm_75.
ATTUNE_DEVICE void ldmatrix_x4_trans(u32 (&d)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// ---- Reductions in global memory: added there, in any order ----

ATTUNE_DEVICE void red_add_f32(float* destination, float x) {
  asm volatile("red.global.add.f32 [%0], %1;"
               :
               : "l"(__cvta_generic_to_global(destination)), "f"(x)
               : "memory");
}

/// Can two neighbours be added at once?
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr bool kHasVectorReductions = true;
#else
inline constexpr bool kHasVectorReductions = false;
#endif

/// The address is a multiple of 8. sm_90.
ATTUNE_DEVICE void red_add_v2_f32(float* destination, float x, float y) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};"
               :
               : "l"(__cvta_generic_to_global(destination)), "f"(x), "f"(y)
               : "memory");
}

/// The address is a multiple of 16. sm_90.
ATTUNE_DEVICE void red_add_v4_f32(float* destination, const float* x) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(destination)), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}

// ---- Asynchronous copies, global to shared. Both addresses are multiples of the size. sm_80 ----

/// Copies 16, 8 or 4 bytes, of which only the first `valid` count; the rest becomes zero. With valid = 0 the
/// source is not accessed. The hardware fetches the aligned 16, 8 or 4 bytes whole: compute-sanitizer reports
/// that when an allocation ends inside them, though no page can.
template <i32 Bytes>
ATTUNE_DEVICE void cp_async(u32 destination, const void* source, i32 valid) {
  const u64 from = __cvta_generic_to_global(source);
  if constexpr (Bytes == 16) {  // past the L1 cache: a tile is read once per block
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(destination), "l"(from), "r"(valid)
                 : "memory");
  } else {
    static_assert(Bytes == 8 || Bytes == 4);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(destination), "l"(from), "n"(Bytes), "r"(valid)
                 : "memory");
  }
}

/// Closes the group of this thread's copies since the last one; an empty group is fine.
ATTUNE_DEVICE void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" : : : "memory");
}

/// Waits until at most `Pending` of this thread's newest groups are under way.
template <i32 Pending>
ATTUNE_DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" : : "n"(Pending) : "memory");
}

// ---- Matrix multiply-accumulate ----

/// d += a * b on the tensor cores: a is 16x16 by rows, b 16x8 by columns, d 16x8 in float32. With g = lane /
/// 4 and t = lane % 4, each register holding two elements: a[0] is row g, columns 2t; a[1] row g + 8; a[2]
/// row g, columns 2t + 8; a[3] row g + 8, columns 2t + 8. b0 is rows 2t of column g, b1 rows 2t + 8. d[0],
/// d[1] are row g, columns 2t, 2t + 1; d[2], d[3] row g + 8. Whole warp. sm_80.
template <DType T>
ATTUNE_DEVICE void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  static_assert(T == DType::f16 || T == DType::bf16);
  if constexpr (T == DType::f16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace attune::kernel::ptx
