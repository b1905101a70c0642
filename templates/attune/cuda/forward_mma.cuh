// Forward on tensor cores for sm_80 and up, f16 and bf16: the FlashAttention-2 loop (Dao, arXiv 2307.08691)
// on mma.m16n8k16.
//
// One block computes block_m queries of one (batch, head); a warp owns 16 * tile_m of them and walks over all
// visible keys, block_n at a time. Scores, probabilities and the output stay in registers: the accumulator
// of Q K^T, rounded to 16 bits, is the A fragment of P V.
//
// Keys and values alternate on one ring of shared-memory slots (shared.h): K0 V0 K1 V1 ... Consuming load l
// is: wait for it, let every warp finish load l - 1, refill that one's slot with load l + stages, compute.
//
// Registers of one thread, 255 at most (O: output, S: scores, Q: query fragments when they are kept):
//   head dims   tile_m  block_n   O    S    Q   sum
//   64 / 64        2      64      64   64   32  160
//   128 / 128      1      64      64   32   32  128
//   128 / 128      2      64     128   64    -  192
//   256 / 256      1      64     128   32    -  160
#pragma once

#include "attune/cuda/position.cuh"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/shared.h"
#include "attune/cuda/tile.cuh"
#include "attune/num.h"
#include "attune/params.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
class ForwardMma {
  static_assert(S.family == Family::mma && S.dtype != DType::f32);
  static_assert(S.block_m == 16 * S.tile_m * S.warps && S.block_n % 16 == 0);
  static_assert(S.head_dim >= 1 && S.head_dim <= 256 && S.head_dim_v >= 1 && S.head_dim_v <= 256);

  static constexpr i32 kThreads = S.warps * kWarpSize;
  static constexpr i32 kWarpRows = 16 * S.tile_m;
  static constexpr i32 kDimSteps = ceil_div(S.head_dim, 16);      // k16 steps of Q K^T
  static constexpr i32 kKeySteps = S.block_n / 16;                // k16 steps of P V
  static constexpr i32 kValuePairs = ceil_div(S.head_dim_v, 16);  // pairs of n8 tiles of O
  static constexpr i32 kRegisters = S.tile_m * (S.block_n / 2 + kValuePairs * 8);
  static constexpr bool kKeepQuery = kRegisters + S.tile_m * kDimSteps * 4 <= 176;
  static constexpr MmaShared kShared{S};

  using QueryTile = SwizzledTile<kDimSteps * 2>;  // and key tiles
  using ValueTile = SwizzledTile<kValuePairs * 2>;
  using QueryFragments = u32[S.tile_m][4];
  using Scores = float[S.tile_m][kKeySteps * 2][4];

  using KeySource = TileSource<S.block_n, S.head_dim, S.copy_bytes, kThreads>;
  using ValueSource = TileSource<S.block_n, S.head_dim_v, S.copy_bytes, kThreads>;

 public:
  static ATTUNE_DEVICE void run(const ForwardParams& params, u32 shared) {
    const Position<S> position(params, blockIdx.x);
    ForwardMma(params, shared, position).run(position);
  }

 private:
  ATTUNE_DEVICE ForwardMma(const ForwardParams& params, u32 shared, const Position<S>& queries)
      : p_(params),
        keys_(visited_keys<S>(params.window, params.len_k, queries.begin, queries.end)),
        key_source_(rows_of(params.key) + queries.offset(params.key_strides, keys_.begin),
                    params.key_strides.seq),
        value_source_(rows_of(params.value) + queries.offset(params.value_strides, keys_.begin),
                      params.value_strides.seq),
        query_tile_(shared),
        ring_(shared + kShared.query_bytes) {}

  ATTUNE_DEVICE void run(const Position<S>& queries) {
    start(queries);
#pragma unroll 1
    for (i32 key = keys_.begin; key < keys_.end; key += S.block_n) {
      Scores scores;
      consume<S.stages>(key);
      multiply_query_key(scores);
      if (!all_visible(queries.begin, key)) hide_invisible(scores, queries.begin, key);
      consume<S.stages + 1>(key);
      exponentiate(scores);
      multiply_probability_value(scores);
    }
    // Where the block stands is computed anew: kept through the loop it would occupy registers.
    finish(Position<S>(p_, ptx::opaque(blockIdx.x)));
  }

  static ATTUNE_DEVICE const u16* rows_of(const void* tensor) {
    return static_cast<const u16*>(tensor);
  }
  static ATTUNE_DEVICE u32 lane() {
    return threadIdx.x % kWarpSize;
  }
  static ATTUNE_DEVICE u32 warp_row() {
    return threadIdx.x / kWarpSize * kWarpRows;
  }

  // ---- The pipeline ----

  /// Fills the free slot with load `Load`, counted from the key tile at `key`: keys when even, values when
  /// odd. The group is closed even when there is nothing to load, so that groups can be counted.
  template <i32 Load>
  ATTUNE_DEVICE void refill(i32 key) {
    const i32 first = key + Load / 2 * S.block_n;
    if (first < keys_.end) {
      if constexpr (Load % 2 == 0) {
        key_source_.copy(free_slot_, p_.key_strides.seq, p_.len_k - first);
      } else {
        value_source_.copy(free_slot_, p_.value_strides.seq, p_.len_k - first);
      }
    }
    ptx::cp_async_commit_group();
  }

  /// Makes the next load the one to read, frees the one before it and refills its slot.
  template <i32 Load>
  ATTUNE_DEVICE void consume(i32 key) {
    ptx::cp_async_wait_group<S.stages - 1>();
    __syncthreads();
    free_slot_ = slot_;
    slot_ += kShared.slot_bytes;
    if (slot_ == ring_ + kShared.slots * kShared.slot_bytes) slot_ = ring_;
    refill<Load>(key);
  }

  /// Loads the queries and the first `stages` tiles.
  ATTUNE_DEVICE void start(const Position<S>& queries) {
    const i64 stride = p_.query_strides.seq;
    TileSource<S.block_m, S.head_dim, S.copy_bytes, kThreads> source(
        rows_of(p_.query) + queries.offset(p_.query_strides, queries.begin), stride);
    source.copy(query_tile_, stride, queries.end - queries.begin);
    free_slot_ = ring_;
    refill<0>(keys_.begin);
    if constexpr (S.stages == 2) {
      free_slot_ += kShared.slot_bytes;
      refill<1>(keys_.begin);
    }
    slot_ = ring_ + (kShared.slots - 1) * kShared.slot_bytes;

    ptx::cp_async_wait_group<S.stages - 1>();
    if (!(p_.scale > 0.0f)) fold_sign_into_query();
    __syncthreads();
    if constexpr (kKeepQuery) {
#pragma unroll
      for (i32 step = 0; step < kDimSteps; ++step) load_query(query_[step], step);
    }
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
      for (i32 half = 0; half < 2; ++half) {
        row_max_[m][half] = neg_inf();
        row_sum_[m][half] = 0.0f;
      }
#pragma unroll
      for (i32 n = 0; n < kValuePairs * 2; ++n) {
#pragma unroll
        for (i32 e = 0; e < 4; ++e) output_[m][n][e] = 0.0f;
      }
    }
  }

  /// The softmax below takes the maximum before it scales, which needs a positive factor. A negative scale
  /// becomes its absolute value and negated queries, scale 0 becomes 1 and zero queries. Each thread edits
  /// the chunks that it copied itself.
  ATTUNE_DEVICE void fold_sign_into_query() {
    const u32 keep = p_.scale < 0.0f ? 0xffffffffu : 0u;
    const u32 flip = p_.scale < 0.0f ? 0x80008000u : 0u;
    RowWalk<S.block_m, S.head_dim, kThreads>::template for_each<1>(threadIdx.x, [&](i32 row, i32 chunk) {
      const u32 address = query_tile_ + QueryTile::offset(row, chunk);
      ptx::Chunk c = ptx::ld_shared_v4(address);
#pragma unroll
      for (i32 word = 0; word < 4; ++word) c.word[word] = (c.word[word] & keep) ^ flip;
      ptx::st_shared_v4(address, c);
    });
  }

  ATTUNE_DEVICE float positive_scale2() const {
    return p_.scale == 0.0f ? 1.0f : fabsf(p_.scale) * kLog2e;
  }

  // ---- One tile ----

  ATTUNE_DEVICE void load_query(QueryFragments& fragments, i32 step) const {
    const u32 origin = query_tile_ + QueryTile::offset(warp_row() + lane() % 16, lane() / 16);
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) {
      ptx::ldmatrix_x4(fragments[m], QueryTile::moved(origin, 16 * m, step * 2));
    }
  }

  /// scores = Q K^T, unscaled.
  ATTUNE_DEVICE void multiply_query_key(Scores& scores) {
    const u32 origin = slot_ + QueryTile::offset(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
      for (i32 n = 0; n < kKeySteps * 2; ++n) {
#pragma unroll
        for (i32 e = 0; e < 4; ++e) scores[m][n][e] = 0.0f;
      }
    }
#pragma unroll
    for (i32 step = 0; step < kDimSteps; ++step) {
      QueryFragments& query = query_[kKeepQuery ? step : 0];
      if constexpr (!kKeepQuery) load_query(query, step);
#pragma unroll
      for (i32 pair = 0; pair < kKeySteps; ++pair) {
        u32 key[4];
        ptx::ldmatrix_x4(key, QueryTile::moved(origin, pair * 16, step * 2));
#pragma unroll
        for (i32 m = 0; m < S.tile_m; ++m) {
          ptx::mma_m16n8k16<S.dtype>(scores[m][pair * 2], query[m], key[0], key[1]);
          ptx::mma_m16n8k16<S.dtype>(scores[m][pair * 2 + 1], query[m], key[2], key[3]);
        }
      }
    }
  }

  static ATTUNE_DEVICE i32 row_of(i32 m, i32 half) {
    return static_cast<i32>(warp_row() + lane() / 4) + m * 16 + half * 8;
  }

  /// Needs no query of the block that starts at `first_query` a mask in the key tile at `key`? Computed anew
  /// for each tile: bounds kept through the loop would occupy registers.
  ATTUNE_DEVICE bool all_visible(i32 first_query, i32 key) const {
    const i32 begin = ptx::opaque(first_query);
    const KeyRange unmasked = unmasked_keys<S>(p_.window, p_.len_k, begin, min(begin + S.block_m, p_.len_q));
    return (S.window_left == Edge::open || key >= unmasked.begin) && key + S.block_n <= unmasked.end;
  }

  /// Score -inf where the mask says no; `first_query` is the block's first, `key` the tile's.
  ATTUNE_DEVICE void hide_invisible(Scores& scores, i32 first_query, i32 key) const {
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
      for (i32 n = 0; n < kKeySteps * 2; ++n) {
#pragma unroll
        for (i32 e = 0; e < 4; ++e) {
          const i32 i = first_query + row_of(m, e / 2);
          const i32 j = key + static_cast<i32>(lane() % 4 * 2) + n * 8 + e % 2;
          if (!visible<S>(p_.window, p_.len_k, i, j)) scores[m][n][e] = neg_inf();
        }
      }
    }
  }

  /// Online softmax: scores become probabilities relative to the new row maxima; output and row sums are
  /// rescaled to them. Row sums stay per thread, over its own columns, until finish().
  ATTUNE_DEVICE void exponentiate(Scores& scores) {
    const float scale2 = positive_scale2();
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
      for (i32 half = 0; half < 2; ++half) {
        float largest = neg_inf();
#pragma unroll
        for (i32 n = 0; n < kKeySteps * 2; ++n) {
          largest = fmaxf(largest, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
        const float before = row_max_[m][half];
        row_max_[m][half] = fmaxf(before, largest * scale2);
        const float shift = safe_max(row_max_[m][half]);
        const float decay = ptx::ex2_approx_ftz(before - shift);

        float sum = 0.0f;
#pragma unroll
        for (i32 n = 0; n < kKeySteps * 2; ++n) {
#pragma unroll
          for (i32 e = half * 2; e < half * 2 + 2; ++e) {
            scores[m][n][e] = ptx::ex2_approx_ftz(fmaf(scores[m][n][e], scale2, -shift));
            sum += scores[m][n][e];
          }
        }
        row_sum_[m][half] = fmaf(row_sum_[m][half], decay, sum);
#pragma unroll
        for (i32 n = 0; n < kValuePairs * 2; ++n) {
          output_[m][n][half * 2] *= decay;
          output_[m][n][half * 2 + 1] *= decay;
        }
      }
    }
  }

  /// output += P V, P rounded to the inputs' type.
  ATTUNE_DEVICE void multiply_probability_value(const Scores& scores) {
    const u32 origin = slot_ + ValueTile::offset(lane() % 16, lane() / 16);
#pragma unroll
    for (i32 step = 0; step < kKeySteps; ++step) {
      u32 probability[S.tile_m][4];
#pragma unroll
      for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
        for (i32 r = 0; r < 4; ++r) {
          const float(&s)[4] = scores[m][step * 2 + r / 2];
          probability[m][r] = pack<S.dtype>(s[r % 2 * 2], s[r % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (i32 pair = 0; pair < kValuePairs; ++pair) {
        u32 value[4];
        ptx::ldmatrix_x4_trans(value, ValueTile::moved(origin, step * 16, pair * 2));
#pragma unroll
        for (i32 m = 0; m < S.tile_m; ++m) {
          ptx::mma_m16n8k16<S.dtype>(output_[m][pair * 2], probability[m], value[0], value[1]);
          ptx::mma_m16n8k16<S.dtype>(output_[m][pair * 2 + 1], probability[m], value[2], value[3]);
        }
      }
    }
  }

  // ---- The end ----

  /// Normalises, writes the LSE, and writes the output through the warp's own rows of the query tile, so that
  /// stores are as wide as the alignment allows.
  ATTUNE_DEVICE void finish(const Position<S>& queries) const {
    __syncthreads();  // a block that visits no key comes straight from reading its queries, which lie there
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
      for (i32 half = 0; half < 2; ++half) {
        float sum = row_sum_[m][half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const float factor = inverse_sum(sum);
        if constexpr (S.lse == Lse::write) write_lse(queries, row_of(m, half), row_max_[m][half], sum);
        const u32 origin = query_tile_ + ValueTile::offset(row_of(m, half), 0) + lane() % 4 * 4;
#pragma unroll
        for (i32 n = 0; n < kValuePairs * 2; ++n) {
          const float(&o)[4] = output_[m][n];
          const u32 chunk =
              n % 2 == 0 ? ValueTile::moved(origin, 0, n) : ValueTile::moved(origin ^ kChunkBytes, 0, n - 1);
          ptx::st_shared_b32(chunk, pack<S.dtype>(o[half * 2] * factor, o[half * 2 + 1] * factor));
        }
      }
    }
    __syncwarp();
    store_output(queries);
  }

  ATTUNE_DEVICE void write_lse(const Position<S>& queries, i32 row, float row_max, float sum) const {
    const i32 query = queries.begin + row;
    if (lane() % 4 != 0 || query >= queries.end) return;
    *queries.lse(p_, query) = (row_max + log2f(sum)) * kLn2;  // a row that saw nothing: -inf + log2(0)
  }

  ATTUNE_DEVICE void store_output(const Position<S>& queries) const {
    u16* rows = static_cast<u16*>(p_.output) + queries.offset(p_.output_strides, queries.begin);
    using Walk = RowWalk<kWarpRows, S.head_dim_v, kWarpSize>;
    Walk::template for_each<min(Walk::kPasses, 4)>(lane(), [&](i32 row_of_warp, i32 chunk) {
      const i32 row = static_cast<i32>(warp_row()) + row_of_warp;
      if (queries.begin + row >= queries.end) return;
      u16* destination = rows + row * p_.output_strides.seq + chunk * kChunkElements;
      store_chunk<S.copy_bytes>(destination, ptx::ld_shared_v4(query_tile_ + ValueTile::offset(row, chunk)),
                                Walk::bytes_left(chunk));
    });
  }

  const ForwardParams& p_;
  const KeyRange keys_;  // what the block visits
  KeySource key_source_;
  ValueSource value_source_;
  const u32 query_tile_, ring_;
  u32 slot_;       // the load that is read
  u32 free_slot_;  // where the next load goes

  QueryFragments query_[kKeepQuery ? kDimSteps : 1];
  float output_[S.tile_m][kValuePairs * 2][4];
  float row_max_[S.tile_m][2];  // in base 2, scaled; -inf until a key was seen
  float row_sum_[S.tile_m][2];
};

template <KernelSpec S>
ATTUNE_DEVICE void forward_mma(const ForwardParams& params) {
  extern __shared__ __align__(128) u8 shared[];
  ForwardMma<S>::run(params, ptx::shared_address(shared));
}

}  // namespace attune::kernel
