// Forward on ordinary float units: every dtype, every GPU from sm_60. All arithmetic is float32, 16-bit
// inputs are widened on their way into shared memory.
//
// One block computes one slot (blocks.h), block_m queries of one head, and walks over the visible keys,
// block_n at a time. Both products are register-tiled: threads form a grid of (block_m / tile_m) groups by
// kLanes lanes; a thread holds tile_m rows (group + r * kGroups) of scores for tile_n keys (lane + c *
// kLanes), and of the output for kColumns vectors of 4 columns (lane + c * kLanes). Probabilities cross from
// the first layout to the second through shared memory, inside one warp.
//
// Operands are read from shared memory as vectors of 4 along the summed axis: (tile_m + tile_n) loads feed
// 4 * tile_m * tile_n multiplications. Row pitches are odd numbers of vectors (shared.h): no bank conflicts.
//
// Registers of one thread, 255 at most:
//   head dim  tile_m x tile_n   scores  output  operands  sum
//   32            8 x 8           64      64       36     164
//   64            8 x 8           64      64       36     164
//   128           8 x 4           32      64       24     120
//   256           4 x 4           16      64       24     104
//   512           4 x 2            8     128       24     160
#pragma once

#include "attune/blocks.h"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/shared.h"
#include "attune/cuda/vector.cuh"
#include "attune/num.h"
#include "attune/params.h"
#include "attune/philox.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
class ForwardSimt {
  static constexpr i32 kThreads = S.warps * 32;
  static constexpr i32 kLanes = S.block_n / S.tile_n;
  static constexpr i32 kGroups = kThreads / kLanes;
  static constexpr i32 kDimVectors = ceil_div(S.head_dim, 4);
  static constexpr i32 kValueVectors = ceil_div(S.head_dim_v, 4);
  static constexpr i32 kColumns = ceil_div(kValueVectors, kLanes);
  static constexpr SimtShared kShared{S};

  static_assert(S.family == Family::simt && 32 % kLanes == 0 && S.block_n % 4 == 0);
  static_assert(S.block_m == kGroups * S.tile_m && S.block_n == kLanes * S.tile_n);
  static_assert(S.head_dim >= 1 && S.head_dim <= kMaxHeadDim);
  static_assert(S.head_dim_v >= 1 && S.head_dim_v <= kMaxHeadDim && S.block_v == S.head_dim_v);
  static_assert(S.tile_m * S.tile_n <= 64);  // kept_pairs
  static_assert(kDropoutGroup % S.block_n == 0 || S.block_n % kDropoutGroup == 0);

  using Scores = float[S.tile_m][S.tile_n];

 public:
  static ATTUNE_DEVICE void run(const ForwardParams& params, float4* shared) {
    const Slot slot = slot_of<S>(params, blockIdx.x);
    if (slot.begin < slot.end) ForwardSimt(params, shared, slot).run();
  }

 private:
  ATTUNE_DEVICE ForwardSimt(const ForwardParams& params, float4* shared, const Slot& slot)
      : p_(params),
        slot_(slot),
        window_(window_of_block<S>(params, slot.block)),
        query_tile_(shared),
        key_tile_(shared + kShared.slot_offset),
        probability_tile_(shared + kShared.probability_offset) {}

  ATTUNE_DEVICE void run() {
    load_queries();
    clear();
    const KeyRange visited = visited_keys<S>(window_, slot_.block.len_k, slot_.begin, slot_.end);
#pragma unroll 1
    for (i32 key = first_tile(visited.begin); key < visited.end; key += S.block_n) {
      Scores scores;
      load_keys<S.head_dim>(p_.key, p_.key_strides, key);
      __syncthreads();
      multiply_query_key(scores);
      if constexpr (S.bias != Bias::none) add_bias(scores, key);
      if (!all_visible(key)) hide_invisible(scores, key);
      exponentiate(scores);
      if constexpr (S.dropout == Dropout::on) drop(scores, key);
      store_probabilities(scores);
      __syncthreads();
      load_keys<S.head_dim_v>(p_.value, p_.value_strides, key);
      __syncthreads();
      multiply_probability_value();
      __syncthreads();
    }
    // Which slot it was is computed anew: kept through the loop it would occupy registers.
    finish(slot_of<S>(p_, ptx::opaque(blockIdx.x)));
  }

  static ATTUNE_DEVICE i32 lane() {
    return static_cast<i32>(threadIdx.x % kLanes);
  }
  static ATTUNE_DEVICE i32 group() {
    return static_cast<i32>(threadIdx.x / kLanes);
  }
  static ATTUNE_DEVICE i32 row_of(i32 r) {
    return group() + r * kGroups;
  }
  /// Of the tile that begins at `key`, the c-th key that this thread holds.
  static ATTUNE_DEVICE i32 key_of(i32 key, i32 c) {
    return key + lane() + c * kLanes;
  }

  /// Where the first tile of keys begins: with dropout at a boundary of its groups, so that the keys that a
  /// thread holds share its calls (philox.h).
  static ATTUNE_DEVICE i32 first_tile(i32 key) {
    return S.dropout == Dropout::on ? key - key % min(S.block_n, kDropoutGroup) : key;
  }

  // ---- From global memory ----

  template <typename AnyStrides>
  ATTUNE_DEVICE const u8* head_of(const void* tensor, const AnyStrides& strides, i32 element_bytes) const {
    return static_cast<const u8*>(tensor) + head_offset(slot_, strides) * element_bytes;
  }

  ATTUNE_DEVICE void load_queries() const {
    const u8* rows = head_of(p_.query, p_.query_strides, size_of(S.dtype));
    load_tile<S.block_m, S.head_dim, kShared.query_pitch>(query_tile_, slot_.end - slot_.begin, [&](i32 row) {
      return rows + (slot_.block.q_begin + slot_.begin + row) * p_.query_strides.seq * size_of(S.dtype);
    });
  }

  /// Rows of key or value, from `key` on.
  template <i32 HeadDim>
  ATTUNE_DEVICE void load_keys(const void* tensor, const Strides& strides, i32 key) const {
    const u8* rows = head_of(tensor, strides, size_of(S.dtype));
    load_tile<S.block_n, HeadDim, kShared.slot_pitch>(key_tile_, slot_.block.len_k - key, [&](i32 row) {
      return rows + key_row<S>(p_, slot_.block, key + row) * strides.seq * size_of(S.dtype);
    });
  }

  /// Fills a tile of shared memory with rows of global memory. Rows past `valid_rows` and columns past
  /// HeadDim become zero: what lies there in memory, NaN included, is never read. Loads are in flight by the
  /// batch.
  template <i32 Rows, i32 HeadDim, i32 Pitch, typename RowAt>
  static ATTUNE_DEVICE void load_tile(float4* tile, i32 valid_rows, RowAt&& row_at) {
    constexpr i32 kVectors = ceil_div(HeadDim, 4);
    constexpr i32 kRowLanes = min(bit_ceil(kVectors), kThreads);
    constexpr i32 kStep = kThreads / kRowLanes;
    constexpr i32 kBatch = min(ceil_div(Rows, kStep), 8);
    const i32 first_row = static_cast<i32>(threadIdx.x / kRowLanes);
#pragma unroll
    for (i32 first_vector = 0; first_vector < kVectors; first_vector += kRowLanes) {
      const i32 vector = first_vector + static_cast<i32>(threadIdx.x % kRowLanes);
      if (kVectors % kRowLanes != 0 && vector >= kVectors) return;
      const i32 valid = HeadDim % 4 == 0 ? 4 : HeadDim - vector * 4;
#pragma unroll 1
      for (i32 begin = first_row; begin < Rows; begin += kBatch * kStep) {
        float4 batch[kBatch];
#pragma unroll
        for (i32 b = 0; b < kBatch; ++b) {
          const i32 row = begin + b * kStep;
          batch[b] = float4{0, 0, 0, 0};
          if (row < valid_rows) {
            batch[b] = load4<S.dtype, S.copy_bytes>(row_at(row) + vector * 4 * size_of(S.dtype), valid);
          }
        }
#pragma unroll
        for (i32 b = 0; b < kBatch; ++b) {
          const i32 row = begin + b * kStep;
          if (Rows % (kBatch * kStep) == 0 || row < Rows) tile[row * Pitch + vector] = batch[b];
        }
      }
    }
  }

  // ---- One tile ----

  ATTUNE_DEVICE void clear() {
#pragma unroll
    for (i32 r = 0; r < S.tile_m; ++r) {
      row_max_[r] = neg_inf();
      row_sum_[r] = 0.0f;
#pragma unroll
      for (i32 c = 0; c < kColumns; ++c) output_[r][c] = float4{0, 0, 0, 0};
    }
  }

  /// scores = scale * log2(e) * Q K^T: in base 2. The scale, of any sign, comes after the sum, where it
  /// rounds once.
  ATTUNE_DEVICE void multiply_query_key(Scores& scores) const {
#pragma unroll
    for (i32 r = 0; r < S.tile_m; ++r) {
#pragma unroll
      for (i32 c = 0; c < S.tile_n; ++c) scores[r][c] = 0.0f;
    }
    const float4* query_rows = query_tile_ + group() * kShared.query_pitch;
    const float4* key_rows = key_tile_ + lane() * kShared.slot_pitch;
#pragma unroll 1
    for (i32 v = 0; v < kDimVectors; ++v) {
      float4 key[S.tile_n];
#pragma unroll
      for (i32 c = 0; c < S.tile_n; ++c) key[c] = key_rows[c * kLanes * kShared.slot_pitch + v];
#pragma unroll
      for (i32 r = 0; r < S.tile_m; ++r) {
        const float4 query = query_rows[r * kGroups * kShared.query_pitch + v];
#pragma unroll
        for (i32 c = 0; c < S.tile_n; ++c) scores[r][c] = dot4(query, key[c], scores[r][c]);
      }
    }
    const float scale2 = p_.scale * kLog2e;
#pragma unroll
    for (i32 r = 0; r < S.tile_m; ++r) {
#pragma unroll
      for (i32 c = 0; c < S.tile_n; ++c) scores[r][c] *= scale2;
    }
  }

  /// Each thread reads the elements of its own scores, and none outside the block: those scores are hidden
  /// afterwards. Neighbouring lanes hold neighbouring keys.
  ATTUNE_DEVICE void add_bias(Scores& scores, i32 key) const {
    constexpr i32 kBytes = size_of(S.bias);
    const i64 stride =
        ptx::opaque(p_.bias_strides.query * kBytes);  // or its multiples are kept through the loop
    const u8* rows =
        head_of(p_.bias, p_.bias_strides, kBytes) + (slot_.block.q_begin + slot_.begin + group()) * stride;
#pragma unroll
    for (i32 c = 0; c < S.tile_n; ++c) {
      const i32 j = key_of(key, c);
      if (j >= slot_.block.len_k) continue;
      const u8* column = rows + key_row<S>(p_, slot_.block, j) * p_.bias_strides.key * kBytes;
#pragma unroll
      for (i32 r = 0; r < S.tile_m; ++r) {
        if (slot_.begin + row_of(r) >= slot_.end) continue;
        scores[r][c] = with_bias<S.bias>(scores[r][c], load_bias<S.bias>(column + r * kGroups * stride));
      }
    }
  }

  /// Needs no query of the block a mask in the tile of keys at `key`? Computed anew for each tile: bounds
  /// kept through the loop would occupy registers.
  ATTUNE_DEVICE bool all_visible(i32 key) const {
    const i32 begin = ptx::opaque(slot_.begin);
    const KeyRange unmasked = unmasked_keys<S>(window_, slot_.block.len_k, begin, slot_.end);
    return key >= unmasked.begin && key + S.block_n <= unmasked.end;
  }

  /// Score -inf where the mask says no; `key` is the tile's first.
  ATTUNE_DEVICE void hide_invisible(Scores& scores, i32 key) const {
#pragma unroll
    for (i32 r = 0; r < S.tile_m; ++r) {
#pragma unroll
      for (i32 c = 0; c < S.tile_n; ++c) {
        const i32 i = slot_.begin + row_of(r);
        if (!visible<S>(window_, slot_.block.len_k, i, key_of(key, c))) scores[r][c] = neg_inf();
      }
    }
  }

  /// Online softmax: scores become probabilities relative to the new row maxima; output and row sums are
  /// rescaled to them. Row sums stay per thread, over its own keys, until finish().
  ATTUNE_DEVICE void exponentiate(Scores& scores) {
#pragma unroll
    for (i32 r = 0; r < S.tile_m; ++r) {
      float largest = scores[r][0];
#pragma unroll
      for (i32 c = 1; c < S.tile_n; ++c) largest = fmaxf(largest, scores[r][c]);
#pragma unroll
      for (i32 distance = 1; distance < kLanes; distance *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
      }
      const float before = row_max_[r];
      row_max_[r] = fmaxf(before, largest);
      const float shift = safe_max(row_max_[r]);
      const float decay = ptx::ex2_approx_ftz(before - shift);
      float sum = 0.0f;
#pragma unroll
      for (i32 c = 0; c < S.tile_n; ++c) {
        scores[r][c] = ptx::ex2_approx_ftz(scores[r][c] - shift);
        sum += scores[r][c];
      }
      row_sum_[r] = fmaf(row_sum_[r], decay, sum);
#pragma unroll
      for (i32 c = 0; c < kColumns; ++c) output_[r][c] = scale4(output_[r][c], decay);
    }
  }

  /// Drops probabilities, which row sums do not notice; the survivors are scaled up in finish().
  ATTUNE_DEVICE void drop(Scores& scores, i32 key) const {
    const u64 pairs = kept_pairs(key);
#pragma unroll
    for (i32 r = 0; r < S.tile_m; ++r) {
#pragma unroll
      for (i32 c = 0; c < S.tile_n; ++c) {
        if ((pairs >> (r * S.tile_n + c) & 1u) == 0) scores[r][c] = 0.0f;
      }
    }
  }

  /// Bit r * tile_n + c: is that pair of this thread kept? Row by row, as bits: unrolled, the generator's
  /// state would occupy more registers than are left.
  ATTUNE_DEVICE u64 kept_pairs(i32 key) const {
    u64 pairs = 0;
#pragma unroll 1
    for (i32 r = S.tile_m - 1; r >= 0; --r) pairs = pairs << S.tile_n | kept_keys(row_of(r), key);
    return pairs;
  }

  /// Bit c: is the pair of this row and this thread's key c kept? Tiles begin at multiples of a dropout group
  /// or divide it, so keys that agree in c * kLanes by group and modulo 8 share a call.
  ATTUNE_DEVICE u32 kept_keys(i32 row, i32 key) const {
    const i32 in_group = S.block_n % kDropoutGroup == 0 ? 0 : key % kDropoutGroup;
    u32 keys = 0;
#pragma unroll
    for (i32 first = 0; first < S.tile_n; ++first) {
      if (first * kLanes % kDropoutGroup >= 8) continue;  // the call of an earlier key serves it
      const Philox<u32> bits =
          dropout_bits<u32>(p_.dropout, slot_.block.index, head_number(p_, slot_),
                            static_cast<u32>(slot_.begin + row), dropout_call(key_of(key, first)));
#pragma unroll
      for (i32 c = first; c < S.tile_n; c += max(8 / kLanes, 1)) {
        if (c * kLanes / kDropoutGroup != first * kLanes / kDropoutGroup) continue;
        const i32 j = key_of(in_group, c);
        if (kept(p_.dropout, word_of(bits, dropout_word(j)), j % 2)) keys |= 1u << c;
      }
    }
    return keys;
  }

  /// Without an address, so that the words stay in registers.
  static ATTUNE_DEVICE u32 word_of(const Philox<u32>& bits, i32 index) {
    const u32 low = index % 2 == 0 ? bits.word[0] : bits.word[1];
    const u32 high = index % 2 == 0 ? bits.word[2] : bits.word[3];
    return index < 2 ? low : high;
  }

  /// A row's probabilities are written and read by the lanes of one group, which is part of one warp; the
  /// block's barriers around the value tile order them.
  ATTUNE_DEVICE void store_probabilities(const Scores& scores) const {
    float* rows = reinterpret_cast<float*>(probability_tile_);
#pragma unroll
    for (i32 r = 0; r < S.tile_m; ++r) {
#pragma unroll
      for (i32 c = 0; c < S.tile_n; ++c) {
        rows[row_of(r) * kShared.probability_pitch * 4 + lane() + c * kLanes] = scores[r][c];
      }
    }
  }

  /// output += P V, four keys at a time.
  ATTUNE_DEVICE void multiply_probability_value() {
    const float4* probability_rows = probability_tile_ + group() * kShared.probability_pitch;
#pragma unroll 1
    for (i32 v = 0; v < S.block_n / 4; ++v) {
      float4 probability[S.tile_m];
#pragma unroll
      for (i32 r = 0; r < S.tile_m; ++r) {
        probability[r] = probability_rows[r * kGroups * kShared.probability_pitch + v];
      }
#pragma unroll
      for (i32 k = 0; k < 4; ++k) {
#pragma unroll
        for (i32 c = 0; c < kColumns; ++c) {
          // Lanes past the last column repeat it; they do not store.
          const i32 column = min(lane() + c * kLanes, kValueVectors - 1);
          const float4 value = key_tile_[(v * 4 + k) * kShared.slot_pitch + column];
#pragma unroll
          for (i32 r = 0; r < S.tile_m; ++r) {
            output_[r][c] = add_scaled4(output_[r][c], element(probability[r], k), value);
          }
        }
      }
    }
  }

  // ---- The end ----

  ATTUNE_DEVICE void finish(const Slot& slot) const {
    constexpr i32 kBytes = size_of(S.output_dtype);
    u8* rows = static_cast<u8*>(p_.output) + head_offset(slot, p_.output_strides) * kBytes;
#pragma unroll
    for (i32 r = 0; r < S.tile_m; ++r) {
      float sum = row_sum_[r];
#pragma unroll
      for (i32 distance = 1; distance < kLanes; distance *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      }
      const i32 query = slot.begin + row_of(r);
      if (query >= slot.end) continue;
      if (S.lse == Lse::write && lane() == 0) {
        p_.lse[lse_offset(p_, slot, query)] = (row_max_[r] + log2f(sum)) * kLn2;  // nothing: -inf + log2(0)
      }
      const float rescale = S.dropout == Dropout::on ? p_.dropout.rescale : 1.0f;
      const float factor = inverse_sum(sum) * rescale;
      u8* row = rows + (slot.block.q_begin + query) * p_.output_strides.seq * kBytes;
#pragma unroll
      for (i32 c = 0; c < kColumns; ++c) {
        const i32 column = lane() + c * kLanes;
        if (column >= kValueVectors) continue;
        store4<S.output_dtype, S.copy_bytes>(row + column * 4 * kBytes, scale4(output_[r][c], factor),
                                             S.head_dim_v - column * 4);
      }
    }
  }

  const ForwardParams& p_;
  const Slot slot_;
  const Window window_;
  float4* const query_tile_;
  float4* const key_tile_;  // keys, then values
  float4* const probability_tile_;
  float4 output_[S.tile_m][kColumns];
  float row_max_[S.tile_m];  // in base 2; -inf until a key was seen
  float row_sum_[S.tile_m];
};

template <KernelSpec S>
ATTUNE_DEVICE void forward_simt(const ForwardParams& params) {
  extern __shared__ float4 shared_vectors[];
  ForwardSimt<S>::run(params, shared_vectors);
}

}  // namespace attune::kernel
