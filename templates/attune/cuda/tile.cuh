// Tiles of 16-bit rows in shared memory: how chunks of 16 bytes are placed, filled from global memory and
// written back to it.
#pragma once

#include "attune/cuda/ptx.cuh"
#include "attune/hd.h"
#include "attune/spec.h"

namespace attune::kernel {

inline constexpr i32 kWarpSize = 32;
inline constexpr i32 kChunkBytes = 16;
inline constexpr i32 kChunkElements = 8;

/// Rows of `Chunks` chunks without padding. A chunk's place in its row is XORed with the row, within groups
/// as large as the row allows, so that any eight consecutive rows (from a multiple of 8) at the same chunk
/// touch all 32 banks once: ldmatrix then never conflicts, for every even number of chunks.
template <i32 Chunks>
struct SwizzledTile {
  static_assert(Chunks % 2 == 0);
  static constexpr i32 kGroup = Chunks % 8 == 0 ? 8 : Chunks % 4 == 0 ? 4 : 2;
  static constexpr i32 kRowBytes = Chunks * kChunkBytes;

  /// Byte offset of a chunk from the tile, whose address is a multiple of 128.
  static ATTUNE_DEVICE u32 offset(i32 row, i32 chunk) {
    const u32 twist = static_cast<u32>(row) / (8 / kGroup) % kGroup;
    return static_cast<u32>(row) * kRowBytes + (static_cast<u32>(chunk) ^ twist) * kChunkBytes;
  }

  /// The address `rows` down (a multiple of 8) and `chunks` to the right (even) of `origin`, whose chunk is 0
  /// or 1. With constants it costs an XOR at most, and one per group of chunks after common subexpressions.
  static ATTUNE_DEVICE u32 moved(u32 origin, i32 rows, i32 chunks) {
    const u32 within = static_cast<u32>(chunks % kGroup * kChunkBytes);
    const u32 beyond = static_cast<u32>((chunks - chunks % kGroup) * kChunkBytes + rows * kRowBytes);
    return (origin ^ within) + beyond;
  }
};

/// How a number of threads share a tile: each stays in one column of chunks and walks down the rows.
template <i32 Rows, i32 HeadDim, i32 Threads>
struct RowWalk {
  static constexpr i32 kChunks = round_up(HeadDim, 16) / kChunkElements;
  static constexpr i32 kLanes = bit_ceil(kChunks);  // threads of one row; those past kChunks idle
  static constexpr i32 kStep = Threads / kLanes;
  static constexpr i32 kPasses = ceil_div(Rows, kStep);
  static_assert(kLanes <= Threads);

  // Unsigned: a signed quotient costs a correction that the compiler cannot see through.
  static ATTUNE_DEVICE i32 first_row(u32 thread) { return static_cast<i32>(thread / kLanes); }
  static ATTUNE_DEVICE i32 first_chunk(u32 thread) { return static_cast<i32>(thread % kLanes); }

  /// Calls visit(row, chunk) for the chunks of `thread`. `Unroll` bounds how many are in flight.
  template <i32 Unroll = kPasses, typename Visit>
  static ATTUNE_DEVICE void for_each(u32 thread, Visit&& visit) {
    const i32 chunk = first_chunk(thread);
    if (kLanes != kChunks && chunk >= kChunks) return;
#pragma unroll Unroll
    for (i32 pass = 0; pass < kPasses; ++pass) {
      const i32 row = first_row(thread) + pass * kStep;
      if (Rows % kStep == 0 || row < Rows) visit(row, chunk);
    }
  }

  /// How many chunks for_each visits.
  static ATTUNE_DEVICE i32 passes(u32 thread) {
    if constexpr (Rows % kStep == 0) return kPasses;
    return first_row(thread) < Rows ? ceil_div(Rows - first_row(thread), kStep) : 0;
  }

  /// Bytes of elements from a chunk to the end of its row, which has `columns` elements: 16 or more when the
  /// chunk is full, 0 or less when it is padding. Not clamped: ptxas 13.0 turns "clamped == 16" into the
  /// predicate output of the clamp's VIMNMX instruction, and gets it inverted.
  static ATTUNE_DEVICE i32 bytes_left(i32 chunk, i32 columns) {
    if (columns == HeadDim && HeadDim % 16 == 0) return kChunkBytes;
    return columns * 2 - chunk * kChunkBytes;
  }
};

/// One chunk from global to shared memory; only `valid` bytes are read, the others become zero. Asynchronous
/// unless CopyBytes is 2.
template <i32 CopyBytes>
ATTUNE_DEVICE void copy_chunk(u32 destination, const u16* source, i32 valid) {
  if constexpr (CopyBytes == 2) {
    // Elements are held in registers on their way, so few are in flight.
#pragma unroll 2
    for (i32 byte = 0; byte < kChunkBytes; byte += 4) {
      const u32 low = byte < valid ? source[byte / 2] : 0;
      const u32 high = byte + 2 < valid ? source[byte / 2 + 1] : 0;
      ptx::st_shared_b32(destination + byte, low | high << 16);
    }
  } else {
#pragma unroll
    for (i32 byte = 0; byte < kChunkBytes; byte += CopyBytes) {
      ptx::cp_async<CopyBytes>(destination + byte, source + byte / 2, clamp(valid - byte, 0, CopyBytes));
    }
  }
}

/// Chunks that a thread copies without waiting for each other. One that is copied in pieces needs registers
/// for each, so few are unrolled.
template <i32 CopyBytes>
inline constexpr i32 kCopiesInFlight = CopyBytes == 16  ? 16
                                       : CopyBytes == 2 ? 1
                                                        : 2;

/// Fills swizzled tiles with consecutive rows of global memory. Holds where this thread reads next, nothing
/// else: in a kernel whose registers are full of accumulators, every address kept is one too many.
template <i32 Rows, i32 HeadDim, i32 CopyBytes, i32 Threads>
class TileSource {
  using Walk = RowWalk<Rows, HeadDim, Threads>;
  using Tile = SwizzledTile<Walk::kChunks>;

 public:
  ATTUNE_DEVICE TileSource(const u16* rows, i64 stride, i32 first)
      : next_(rows + (first + Walk::first_row(threadIdx.x)) * stride +
              Walk::first_chunk(threadIdx.x) * kChunkElements) {}

  /// Copies the next `Rows` rows, of which those in [first_row, valid_rows) exist and `columns` elements of
  /// each. All others become zero: what lies there in memory, NaN included, is never read.
  ATTUNE_DEVICE void copy(u32 tile, i64 stride, i32 valid_rows, i32 columns, i32 first_row = 0) {
    const i64 step = ptx::opaque(Walk::kStep * stride);
    constexpr i32 kUnroll = min(Walk::kPasses, kCopiesInFlight<CopyBytes>);
    Walk::template for_each<kUnroll>(threadIdx.x, [&](i32 row, i32 chunk) {
      const i32 valid = first_row <= row && row < valid_rows ? Walk::bytes_left(chunk, columns) : 0;
      copy_chunk<CopyBytes>(tile + Tile::offset(row, chunk), next_, valid);
      next_ += step;
    });
    next_ += (Rows - Walk::passes(threadIdx.x) * Walk::kStep) * stride;
  }

 private:
  const u16* next_;
};

/// Fills a swizzled tile with rows of global memory, of which those in [first, last) exist; the others become
/// zero. `rows` is where the tile's first row lies.
template <i32 Rows, i32 HeadDim, i32 CopyBytes, i32 Threads>
ATTUNE_DEVICE void copy_rows(u32 tile, const u16* rows, i64 stride, i32 first, i32 last) {
  using Walk = RowWalk<Rows, HeadDim, Threads>;
  constexpr i32 kUnroll = min(Walk::kPasses, min(kCopiesInFlight<CopyBytes>, 4));
  const u32 thread = ptx::opaque(threadIdx.x);  // or what follows from it is kept in registers
  Walk::template for_each<kUnroll>(thread, [&](i32 row, i32 chunk) {
    const bool exists = first <= row && row < last;
    copy_chunk<CopyBytes>(tile + SwizzledTile<Walk::kChunks>::offset(row, chunk),
                          rows + row * stride + chunk * kChunkElements,
                          exists ? Walk::bytes_left(chunk, HeadDim) : 0);
  });
}

/// Fills swizzled tiles with rows of key or value, which are either consecutive or behind a table.
template <Keys K, i32 Rows, i32 HeadDim, i32 CopyBytes, i32 Threads>
class KeyTileSource : TileSource<Rows, HeadDim, CopyBytes, Threads> {
  using Base = TileSource<Rows, HeadDim, CopyBytes, Threads>;

 public:
  using Base::Base;
  template <typename RowAt>
  ATTUNE_DEVICE void copy(u32 tile, i64 stride, i32 valid_rows, i32 columns, RowAt&&, i32 first_row = 0) {
    Base::copy(tile, stride, valid_rows, columns, first_row);
  }
};

/// row_at(row) says where a row of the tile lies. It is asked for rows that exist alone, once by each thread
/// that copies a chunk of it.
template <i32 Rows, i32 HeadDim, i32 CopyBytes, i32 Threads>
class KeyTileSource<Keys::paged, Rows, HeadDim, CopyBytes, Threads> {
  using Walk = RowWalk<Rows, HeadDim, Threads>;
  using Tile = SwizzledTile<Walk::kChunks>;

 public:
  ATTUNE_DEVICE KeyTileSource(const u16* rows, i64, i32)
      : column_(rows + Walk::first_chunk(threadIdx.x) * kChunkElements) {}

  template <typename RowAt>
  ATTUNE_DEVICE void copy(u32 tile, i64 stride, i32 valid_rows, i32 columns, RowAt&& row_at,
                          i32 first_row = 0) const {
    constexpr i32 kUnroll = min(Walk::kPasses, min(kCopiesInFlight<CopyBytes>, 4));
    Walk::template for_each<kUnroll>(threadIdx.x, [&](i32 row, i32 chunk) {
      const bool exists = first_row <= row && row < valid_rows;
      const u16* source = column_ + (exists ? row_at(row) : 0) * stride;
      copy_chunk<CopyBytes>(tile + Tile::offset(row, chunk), source,
                            exists ? Walk::bytes_left(chunk, columns) : 0);
    });
  }

 private:
  const u16* column_;  // of row 0
};

/// One chunk to global memory, of which the first `valid` bytes are written; more than 16 means all.
template <i32 CopyBytes>
ATTUNE_DEVICE void store_chunk(u16* destination, const ptx::Chunk& chunk, i32 valid) {
  const u32(&w)[4] = chunk.word;
  if (CopyBytes > 2 && valid >= kChunkBytes) {
    if constexpr (CopyBytes == 16) {
      *reinterpret_cast<uint4*>(destination) = make_uint4(w[0], w[1], w[2], w[3]);
    } else if constexpr (CopyBytes == 8) {
      reinterpret_cast<uint2*>(destination)[0] = make_uint2(w[0], w[1]);
      reinterpret_cast<uint2*>(destination)[1] = make_uint2(w[2], w[3]);
    } else {
#pragma unroll
      for (i32 word = 0; word < 4; ++word) reinterpret_cast<u32*>(destination)[word] = w[word];
    }
    return;
  }
#pragma unroll
  for (i32 element = 0; element < kChunkElements; ++element) {
    if (element * 2 < valid) destination[element] = static_cast<u16>(w[element / 2] >> element % 2 * 16);
  }
}

/// Two neighbouring float32 to global memory, of which the first `valid` are written; more than 2 means all.
template <i32 CopyBytes>
ATTUNE_DEVICE void store_pair(float* destination, float low, float high, i32 valid) {
  if (CopyBytes >= 8 && valid >= 2) {
    *reinterpret_cast<float2*>(destination) = make_float2(low, high);
  } else {
    if (valid >= 1) destination[0] = low;
    if (valid >= 2) destination[1] = high;
  }
}

/// Adds two neighbouring float32 to a row of `Columns` in global memory, of which `valid` are left.
template <i32 Columns>
ATTUNE_DEVICE void add_pair(float* destination, float low, float high, i32 valid) {
  const bool whole = Columns % 16 == 0;
  if constexpr (ptx::kHasVectorReductions && Columns % 2 == 0) {
    if (whole || valid >= 2) ptx::red_add_v2_f32(destination, low, high);
  } else {
    if (whole || valid >= 1) ptx::red_add_f32(destination, low);
    if (whole || valid >= 2) ptx::red_add_f32(destination + 1, high);
  }
}

/// Two floats as one register of 16-bit elements.
template <DType T>
ATTUNE_DEVICE u32 pack(float low, float high) {
  if constexpr (T == DType::f16) return ptx::cvt_rn_f16x2_f32(low, high);
  return ptx::cvt_rn_bf16x2_f32(low, high);
}

/// Over the four lanes that hold a row of an accumulator.
ATTUNE_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
ATTUNE_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
/// Word j of lane i becomes word i of lane j, within each quad.
ATTUNE_DEVICE void quad_transpose(u32 (&word)[4]) {
#pragma unroll
  for (i32 distance = 1; distance <= 2; ++distance) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (i32 i = 0; i < 4; ++i) {
      if (i & distance) continue;
      const u32 got = __shfl_xor_sync(0xffffffffu, upper ? word[i] : word[i + distance], distance);
      (upper ? word[i] : word[i + distance]) = got;
    }
  }
}

}  // namespace attune::kernel
