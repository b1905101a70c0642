// Forward on ordinary float units: every dtype, every GPU from sm_60. All arithmetic is float32, 16-bit
// inputs are widened on their way into shared memory.
//
// One block computes one slot (blocks.h), block_m queries of one head, and walks over the visible keys,
// block_n at a time. Both products are register-tiled (simt_tile.cuh): a thread holds tile_m rows of scores
// for tile_n keys, and the same rows of the output. Probabilities cross from the first layout to the second
// through shared memory, inside one warp.
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
#include "attune/cuda/simt_scores.cuh"
#include "attune/cuda/simt_tile.cuh"
#include "attune/cuda/vector.cuh"
#include "attune/num.h"
#include "attune/params.h"
#include "attune/philox.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
class ForwardSimt {
  using Tile = SimtTile<S>;
  using Scores = typename Tile::Scores;
  static constexpr i32 kLanes = Tile::kLanes;
  static constexpr SimtShared kShared{S};

  static_assert(S.block_v == S.head_dim_v);
  static_assert(kDropoutGroup % S.block_n == 0 || S.block_n % kDropoutGroup == 0);

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
      Tile::clear(scores);
      __syncthreads();
      Tile::template multiply<S.head_dim, kShared.query_pitch, kShared.slot_pitch>(scores, query_tile_,
                                                                                   key_tile_);
      SimtScores<S>{slot_, window_, {0, slot_.block.len_k}, slot_.begin, key}.finish(scores, p_);
      exponentiate(scores);
      if constexpr (S.dropout == Dropout::on) drop(scores, key);
      Tile::store_weights(probability_tile_, scores);
      __syncthreads();
      load_keys<S.head_dim_v>(p_.value, p_.value_strides, key);
      __syncthreads();
      Tile::template accumulate<S.head_dim_v, kShared.slot_pitch>(output_, probability_tile_, key_tile_);
      __syncthreads();
    }
    // Which slot it was is computed anew: kept through the loop it would occupy registers.
    finish(slot_of<S>(p_, ptx::opaque(blockIdx.x)));
  }

  /// Where the first tile of keys begins: with dropout at a boundary of its groups, so that the keys that a
  /// thread holds share its calls (philox.h).
  static ATTUNE_DEVICE i32 first_tile(i32 key) {
    return S.dropout == Dropout::on ? key - key % min(S.block_n, kDropoutGroup) : key;
  }

  // ---- From global memory ----

  ATTUNE_DEVICE const u8* head_of(const void* tensor, const Strides& strides) const {
    return static_cast<const u8*>(tensor) + head_offset(slot_, strides) * size_of(S.dtype);
  }

  ATTUNE_DEVICE void load_queries() const {
    const u8* rows = head_of(p_.query, p_.query_strides);
    Tile::template load_rows<S.block_m, S.head_dim>(query_tile_, 0, slot_.end - slot_.begin, [&](i32 row) {
      return rows + (slot_.block.q_begin + slot_.begin + row) * p_.query_strides.seq * size_of(S.dtype);
    });
  }

  /// Rows of key or value, from `key` on.
  template <i32 HeadDim>
  ATTUNE_DEVICE void load_keys(const void* tensor, const Strides& strides, i32 key) const {
    const u8* rows = head_of(tensor, strides);
    Tile::template load_rows<S.block_n, HeadDim, HeadDim, kShared.slot_pitch>(
        key_tile_, 0, slot_.block.len_k - key, [&](i32 row) {
          return rows + key_row<S>(p_, slot_.block, key + row) * strides.seq * size_of(S.dtype);
        });
  }

  // ---- One tile ----

  ATTUNE_DEVICE void clear() {
#pragma unroll
    for (i32 r = 0; r < S.tile_m; ++r) {
      row_max_[r] = neg_inf();
      row_sum_[r] = 0.0f;
    }
    Tile::clear(output_);
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
      for (float4& output : output_[r]) output = scale4(output, decay);
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
    for (i32 r = S.tile_m - 1; r >= 0; --r) pairs = pairs << S.tile_n | kept_keys(Tile::row_of(r), key);
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
                            static_cast<u32>(slot_.begin + row), dropout_call(key + Tile::column_of(first)));
#pragma unroll
      for (i32 c = first; c < S.tile_n; c += max(8 / kLanes, 1)) {
        if (c * kLanes / kDropoutGroup != first * kLanes / kDropoutGroup) continue;
        const i32 j = in_group + Tile::column_of(c);
        if (kept(p_.dropout, word_of(bits, dropout_word(j)), j % 2)) keys |= 1u << c;
      }
    }
    return keys;
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
      const i32 query = slot.begin + Tile::row_of(r);
      if (query >= slot.end) continue;
      if (S.lse == Lse::write && Tile::lane() == 0) {
        p_.lse[lse_offset(p_, slot, query)] = (row_max_[r] + log2f(sum)) * kLn2;  // nothing: -inf + log2(0)
      }
      const float rescale = S.dropout == Dropout::on ? p_.dropout.rescale : 1.0f;
      const float factor = inverse_sum(sum) * rescale;
      u8* row = rows + (slot.block.q_begin + query) * p_.output_strides.seq * kBytes;
      Tile::template store_row<S.output_dtype, S.head_dim_v>(row, output_, r, factor);
    }
  }

  const ForwardParams& p_;
  const Slot slot_;
  const Window window_;
  float4* const query_tile_;
  float4* const key_tile_;  // keys, then values
  float4* const probability_tile_;
  typename Tile::template Sums<S.head_dim_v> output_;
  float row_max_[S.tile_m];  // in base 2; -inf until a key was seen
  float row_sum_[S.tile_m];
};

template <KernelSpec S>
ATTUNE_DEVICE void forward_simt(const ForwardParams& params) {
  extern __shared__ float4 shared_vectors[];
  ForwardSimt<S>::run(params, shared_vectors);
}

}  // namespace attune::kernel
