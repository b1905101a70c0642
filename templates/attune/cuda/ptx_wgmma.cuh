// PTX of warpgroup matrix products: wgmma.mma_async m64 n k16, float32 accumulators. sm_90a.
//
// The instruction's text names every accumulator, so there is one definition per n; a macro writes them from
// groups of eight registers. The first operand comes from shared memory or from registers, the second from
// shared memory, 128-byte swizzled: rows are the columns of the product (Major::k, K^T of Q K^T), or its
// summed axis (Major::mn, V of P V).
#pragma once

#include "attune/cuda/ptx.cuh"
#include "attune/hd.h"
#include "attune/spec.h"

namespace attune::kernel::ptx {

/// Orders register accesses before the warpgroup's next products; then products are issued, then committed.
ATTUNE_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
ATTUNE_DEVICE void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Until all but the last `Pending` groups are done.
template <i32 Pending>
ATTUNE_DEVICE void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

/// Keeps the compiler from moving accesses of these registers across this point: products write them behind
/// its back.
template <i32 N>
ATTUNE_DEVICE void pin(float (&registers)[N]) {
#pragma unroll
  for (i32 i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

/// Describes an operand in shared memory: panels of rows of 128 swizzled bytes, 1024 bytes from one group of
/// 8 rows to the next. Build it where it is used: hoisted out of a loop it would occupy registers.
ATTUNE_DEVICE u64 wgmma_descriptor(u32 address, u32 panel_bytes = 16) {
  return u64{(address & 0x3ffffu) >> 4} | u64{panel_bytes >> 4} << 16 | u64{1024 >> 4} << 32 | u64{1} << 62;
}

enum class Major { k, mn };

/// Products of m64 x N x k16. `add`: on top of what the accumulators hold.
template <i32 N>
struct Wgmma;

// Text and constraints of the accumulators, eight by eight.
#define ATTUNE_D0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ATTUNE_D1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define ATTUNE_D2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define ATTUNE_D3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define ATTUNE_D4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define ATTUNE_D5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define ATTUNE_D6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define ATTUNE_D7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define ATTUNE_D8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define ATTUNE_D9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define ATTUNE_D10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define ATTUNE_D11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define ATTUNE_D12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define ATTUNE_D13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define ATTUNE_D14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define ATTUNE_D15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define ATTUNE_R8(k)                                                                                        \
  "+f"(d[8 * (k)]), "+f"(d[8 * (k) + 1]), "+f"(d[8 * (k) + 2]), "+f"(d[8 * (k) + 3]), "+f"(d[8 * (k) + 4]), \
      "+f"(d[8 * (k) + 5]), "+f"(d[8 * (k) + 6]), "+f"(d[8 * (k) + 7])
#define ATTUNE_TEXT0 ATTUNE_D0
#define ATTUNE_REGISTERS0 ATTUNE_R8(0)
#define ATTUNE_TEXT1 ATTUNE_TEXT0 ", " ATTUNE_D1
#define ATTUNE_REGISTERS1 ATTUNE_REGISTERS0, ATTUNE_R8(1)
#define ATTUNE_TEXT2 ATTUNE_TEXT1 ", " ATTUNE_D2
#define ATTUNE_REGISTERS2 ATTUNE_REGISTERS1, ATTUNE_R8(2)
#define ATTUNE_TEXT3 ATTUNE_TEXT2 ", " ATTUNE_D3
#define ATTUNE_REGISTERS3 ATTUNE_REGISTERS2, ATTUNE_R8(3)
#define ATTUNE_TEXT4 ATTUNE_TEXT3 ", " ATTUNE_D4
#define ATTUNE_REGISTERS4 ATTUNE_REGISTERS3, ATTUNE_R8(4)
#define ATTUNE_TEXT5 ATTUNE_TEXT4 ", " ATTUNE_D5
#define ATTUNE_REGISTERS5 ATTUNE_REGISTERS4, ATTUNE_R8(5)
#define ATTUNE_TEXT6 ATTUNE_TEXT5 ", " ATTUNE_D6
#define ATTUNE_REGISTERS6 ATTUNE_REGISTERS5, ATTUNE_R8(6)
#define ATTUNE_TEXT7 ATTUNE_TEXT6 ", " ATTUNE_D7
#define ATTUNE_REGISTERS7 ATTUNE_REGISTERS6, ATTUNE_R8(7)
#define ATTUNE_TEXT8 ATTUNE_TEXT7 ", " ATTUNE_D8
#define ATTUNE_REGISTERS8 ATTUNE_REGISTERS7, ATTUNE_R8(8)
#define ATTUNE_TEXT9 ATTUNE_TEXT8 ", " ATTUNE_D9
#define ATTUNE_REGISTERS9 ATTUNE_REGISTERS8, ATTUNE_R8(9)
#define ATTUNE_TEXT10 ATTUNE_TEXT9 ", " ATTUNE_D10
#define ATTUNE_REGISTERS10 ATTUNE_REGISTERS9, ATTUNE_R8(10)
#define ATTUNE_TEXT11 ATTUNE_TEXT10 ", " ATTUNE_D11
#define ATTUNE_REGISTERS11 ATTUNE_REGISTERS10, ATTUNE_R8(11)
#define ATTUNE_TEXT12 ATTUNE_TEXT11 ", " ATTUNE_D12
#define ATTUNE_REGISTERS12 ATTUNE_REGISTERS11, ATTUNE_R8(12)
#define ATTUNE_TEXT13 ATTUNE_TEXT12 ", " ATTUNE_D13
#define ATTUNE_REGISTERS13 ATTUNE_REGISTERS12, ATTUNE_R8(13)
#define ATTUNE_TEXT14 ATTUNE_TEXT13 ", " ATTUNE_D14
#define ATTUNE_REGISTERS14 ATTUNE_REGISTERS13, ATTUNE_R8(14)
#define ATTUNE_TEXT15 ATTUNE_TEXT14 ", " ATTUNE_D15
#define ATTUNE_REGISTERS15 ATTUNE_REGISTERS14, ATTUNE_R8(15)

#define ATTUNE_WGMMA_SHARED(n, t, a, b, add, majors, text, registers)                              \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #add ", 0; wgmma.mma_async.sync.aligned.m64n" #n \
               "k16.f32." t "." t " {" text "}, %" #a ", %" #b ", p, 1, 1, " majors "; }"          \
               : registers                                                                         \
               : "l"(query), "l"(key), "r"(accumulate))
#define ATTUNE_WGMMA_REGISTERS(n, t, a0, a1, a2, a3, b, add, major, text, registers)               \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #add ", 0; wgmma.mma_async.sync.aligned.m64n" #n \
               "k16.f32." t "." t " {" text "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b    \
               ", p, 1, 1, " #major "; }"                                                          \
               : registers                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(key), "r"(accumulate))

// n, the group count less 1, and the numbers of the operands behind the n / 2 accumulators.
#define ATTUNE_DEFINE_WGMMA(n, g, i0, i1, i2, i3, i4, i5)                                                  \
  template <>                                                                                              \
  struct Wgmma<n> {                                                                                        \
    /* d (+)= query key^T, both from shared memory; M says how the second lies, A how the first. */        \
    template <DType T, Major M = Major::k, Major A = Major::k>                                             \
    static ATTUNE_DEVICE void multiply(float (&d)[n / 2], u64 query, u64 key, bool add) {                  \
      const i32 accumulate = add;                                                                          \
      if constexpr (T == DType::f16 && M == Major::k) {                                                    \
        ATTUNE_WGMMA_SHARED(n, "f16", i0, i1, i2, "0, 0", ATTUNE_TEXT##g, ATTUNE_REGISTERS##g);            \
      } else if constexpr (T == DType::f16 && A == Major::k) {                                             \
        ATTUNE_WGMMA_SHARED(n, "f16", i0, i1, i2, "0, 1", ATTUNE_TEXT##g, ATTUNE_REGISTERS##g);            \
      } else if constexpr (T == DType::f16) {                                                              \
        ATTUNE_WGMMA_SHARED(n, "f16", i0, i1, i2, "1, 1", ATTUNE_TEXT##g, ATTUNE_REGISTERS##g);            \
      } else if constexpr (M == Major::k) {                                                                \
        ATTUNE_WGMMA_SHARED(n, "bf16", i0, i1, i2, "0, 0", ATTUNE_TEXT##g, ATTUNE_REGISTERS##g);           \
      } else if constexpr (A == Major::k) {                                                                \
        ATTUNE_WGMMA_SHARED(n, "bf16", i0, i1, i2, "0, 1", ATTUNE_TEXT##g, ATTUNE_REGISTERS##g);           \
      } else {                                                                                             \
        ATTUNE_WGMMA_SHARED(n, "bf16", i0, i1, i2, "1, 1", ATTUNE_TEXT##g, ATTUNE_REGISTERS##g);           \
      }                                                                                                    \
    }                                                                                                      \
    /* The same with the first operand in registers. */                                                    \
    template <DType T, Major M>                                                                            \
    static ATTUNE_DEVICE void multiply(float (&d)[n / 2], const u32* a, u64 key, bool add) {               \
      const i32 accumulate = add;                                                                          \
      if constexpr (T == DType::f16 && M == Major::k) {                                                    \
        ATTUNE_WGMMA_REGISTERS(n, "f16", i0, i1, i2, i3, i4, i5, 0, ATTUNE_TEXT##g, ATTUNE_REGISTERS##g);  \
      } else if constexpr (T == DType::f16) {                                                              \
        ATTUNE_WGMMA_REGISTERS(n, "f16", i0, i1, i2, i3, i4, i5, 1, ATTUNE_TEXT##g, ATTUNE_REGISTERS##g);  \
      } else if constexpr (M == Major::k) {                                                                \
        ATTUNE_WGMMA_REGISTERS(n, "bf16", i0, i1, i2, i3, i4, i5, 0, ATTUNE_TEXT##g, ATTUNE_REGISTERS##g); \
      } else {                                                                                             \
        ATTUNE_WGMMA_REGISTERS(n, "bf16", i0, i1, i2, i3, i4, i5, 1, ATTUNE_TEXT##g, ATTUNE_REGISTERS##g); \
      }                                                                                                    \
    }                                                                                                      \
  }

ATTUNE_DEFINE_WGMMA(16, 0, 8, 9, 10, 11, 12, 13);
ATTUNE_DEFINE_WGMMA(32, 1, 16, 17, 18, 19, 20, 21);
ATTUNE_DEFINE_WGMMA(48, 2, 24, 25, 26, 27, 28, 29);
ATTUNE_DEFINE_WGMMA(64, 3, 32, 33, 34, 35, 36, 37);
ATTUNE_DEFINE_WGMMA(80, 4, 40, 41, 42, 43, 44, 45);
ATTUNE_DEFINE_WGMMA(96, 5, 48, 49, 50, 51, 52, 53);
ATTUNE_DEFINE_WGMMA(112, 6, 56, 57, 58, 59, 60, 61);
ATTUNE_DEFINE_WGMMA(128, 7, 64, 65, 66, 67, 68, 69);
ATTUNE_DEFINE_WGMMA(144, 8, 72, 73, 74, 75, 76, 77);
ATTUNE_DEFINE_WGMMA(160, 9, 80, 81, 82, 83, 84, 85);
ATTUNE_DEFINE_WGMMA(176, 10, 88, 89, 90, 91, 92, 93);
ATTUNE_DEFINE_WGMMA(192, 11, 96, 97, 98, 99, 100, 101);
ATTUNE_DEFINE_WGMMA(208, 12, 104, 105, 106, 107, 108, 109);
ATTUNE_DEFINE_WGMMA(224, 13, 112, 113, 114, 115, 116, 117);
ATTUNE_DEFINE_WGMMA(240, 14, 120, 121, 122, 123, 124, 125);
ATTUNE_DEFINE_WGMMA(256, 15, 128, 129, 130, 131, 132, 133);

#undef ATTUNE_D0
#undef ATTUNE_TEXT0
#undef ATTUNE_REGISTERS0
#undef ATTUNE_D1
#undef ATTUNE_TEXT1
#undef ATTUNE_REGISTERS1
#undef ATTUNE_D2
#undef ATTUNE_TEXT2
#undef ATTUNE_REGISTERS2
#undef ATTUNE_D3
#undef ATTUNE_TEXT3
#undef ATTUNE_REGISTERS3
#undef ATTUNE_D4
#undef ATTUNE_TEXT4
#undef ATTUNE_REGISTERS4
#undef ATTUNE_D5
#undef ATTUNE_TEXT5
#undef ATTUNE_REGISTERS5
#undef ATTUNE_D6
#undef ATTUNE_TEXT6
#undef ATTUNE_REGISTERS6
#undef ATTUNE_D7
#undef ATTUNE_TEXT7
#undef ATTUNE_REGISTERS7
#undef ATTUNE_D8
#undef ATTUNE_TEXT8
#undef ATTUNE_REGISTERS8
#undef ATTUNE_D9
#undef ATTUNE_TEXT9
#undef ATTUNE_REGISTERS9
#undef ATTUNE_D10
#undef ATTUNE_TEXT10
#undef ATTUNE_REGISTERS10
#undef ATTUNE_D11
#undef ATTUNE_TEXT11
#undef ATTUNE_REGISTERS11
#undef ATTUNE_D12
#undef ATTUNE_TEXT12
#undef ATTUNE_REGISTERS12
#undef ATTUNE_D13
#undef ATTUNE_TEXT13
#undef ATTUNE_REGISTERS13
#undef ATTUNE_D14
#undef ATTUNE_TEXT14
#undef ATTUNE_REGISTERS14
#undef ATTUNE_D15
#undef ATTUNE_TEXT15
#undef ATTUNE_REGISTERS15
#undef ATTUNE_R8
#undef ATTUNE_WGMMA_SHARED
#undef ATTUNE_WGMMA_REGISTERS
#undef ATTUNE_DEFINE_WGMMA

}  // namespace attune::kernel::ptx
