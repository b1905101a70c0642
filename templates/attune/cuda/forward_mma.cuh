// Forward on tensor cores for sm_80 and up, f16 and bf16: the FlashAttention-2 loop (Dao, arXiv 2307.08691)
// on mma.m16n8k16.
//
// One block computes one slot (blocks.h), block_m queries of one head and at most block_v value columns; a
// warp owns 16 * tile_m of the queries and walks over all visible keys, block_n at a time. Scores,
// probabilities and the output stay in registers: the accumulator of Q K^T, rounded to 16 bits, is the A
// fragment of P V.
//
// Keys and values alternate on one ring of shared-memory slots (shared.h): K0 V0 K1 V1 ... Consuming load l
// is: wait for it, let every warp finish load l - 1, refill that one's slot with load l + stages, compute.
//
// Where blocks share the keys of a tile, so do the warps of a block: each walks over a part of its own, with
// a ring of its own, and they add up their results through shared memory at the end.
//
// Registers of one thread, 255 at most (O: output, S: scores, Q: query fragments when they are kept):
//   head dims   tile_m  block_n   O    S    Q   sum
//   64 / 64        2      64      64   64   32  160
//   128 / 128      1      64      64   32   32  128
//   128 / 128      2      64     128   64    -  192
//   256 / 256      1      64     128   32    -  160
#pragma once

#include "attune/blocks.h"
#include "attune/cuda/mma_tile.cuh"
#include "attune/cuda/ptx.cuh"
#include "attune/cuda/score_bias.cuh"
#include "attune/cuda/shared.h"
#include "attune/cuda/tile.cuh"
#include "attune/cuda/vector.cuh"
#include "attune/num.h"
#include "attune/params.h"
#include "attune/philox.h"
#include "attune/semantics.h"
#include "attune/spec.h"

namespace attune::kernel {

template <KernelSpec S>
class ForwardMma {
  static_assert(S.family == Family::mma && S.dtype != DType::f32);
  static_assert(S.block_m == 16 * S.tile_m * (S.warps / lone_warps(S)) && S.block_n % 16 == 0);
  static_assert(S.head_dim >= 1 && S.head_dim <= kMaxHeadDim && S.head_dim_v <= kMaxHeadDim);
  static_assert(S.block_v >= 1 && S.block_v <= 256 && (S.block_v % 16 == 0 || S.block_v == S.head_dim_v));
  static_assert(S.dropout == Dropout::off || S.block_n % kDropoutGroup == 0);
  static_assert(S.split == Split::off ||
                (S.output_dtype == DType::f32 && S.lse == Lse::write && S.dropout == Dropout::off));

  static constexpr bool kSplits = S.split == Split::on;
  static constexpr i32 kThreads = S.warps / lone_warps(S) * kWarpSize;  // that share tiles
  static constexpr i32 kWarpRows = 16 * S.tile_m;
  static constexpr i32 kDimSteps = ceil_div(S.head_dim, 16);   // k16 steps of Q K^T
  static constexpr i32 kKeySteps = S.block_n / 16;             // k16 steps of P V
  static constexpr i32 kValuePairs = ceil_div(S.block_v, 16);  // pairs of n8 tiles of O
  static constexpr i32 kRegisters = S.tile_m * (S.block_n / 2 + kValuePairs * 8) +
                                    BiasFragments<S>::kRegisters + (S.dropout == Dropout::on ? 24 : 0);
  static constexpr bool kKeepQuery = kRegisters + S.tile_m * kDimSteps * 4 <= 176;
  // An output of more digits than the inputs shows what rounding the probabilities for the product with V
  // costs. Divided by the sum of the rounded ones, they add up to 1 again, and an error that they share, as
  // nearly equal ones do, is gone. The LSE's sum is the exact one. sm90 does without: there it would cost up
  // to a fifth of the speed.
  static constexpr bool kDividesByRounded =
      S.output_dtype == DType::f32 || (S.output_dtype == DType::f16 && S.dtype == DType::bf16);
  static constexpr MmaShared kShared{S};

  using QueryTile = SwizzledTile<kDimSteps * 2>;  // and key tiles
  using ValueTile = SwizzledTile<kValuePairs * 2>;
  using QueryFragments = u32[S.tile_m][4];
  using Scores = float[S.tile_m][kKeySteps * 2][4];

  template <i32 HeadDim>
  using Source = KeyTileSource<S.keys, S.block_n, HeadDim, S.copy_bytes, kThreads>;

 public:
  static ATTUNE_DEVICE void run(const ForwardParams& params, u32 shared) {
    const Slot slot = slot_of<S>(params, blockIdx.x);
    if constexpr (kSplits) {
      ptx::griddepcontrol_launch_dependents();
      shared += threadIdx.y * kShared.bytes();
    }
    if (slot.begin < slot.end) ForwardMma(params, shared, slot).run();
  }

 private:
  ATTUNE_DEVICE ForwardMma(const ForwardParams& params, u32 shared, const Slot& slot)
      : p_(params),
        slot_(slot),
        window_(window_of_block<S>(params, slot.block)),
        keys_(keys_of_tiles(params, window_, slot)),
        key_source_(rows_of(params.key) + head_offset(slot, params.key_strides), params.key_strides.seq,
                    slot.block.k_begin + keys_.begin),
        value_source_(rows_of(params.value) + head_offset(slot, params.value_strides) + first_column(slot),
                      params.value_strides.seq, slot.block.k_begin + keys_.begin),
        query_tile_(shared),
        ring_(shared + kShared.query_bytes) {}

  ATTUNE_DEVICE void run() {
    start();
#pragma unroll 1
    for (i32 key = keys_.begin; key < keys_.end; key += S.block_n) {
      Scores scores;
      BiasFragments<S> bias;
      if constexpr (S.bias != Bias::none) bias.load(p_, slot_, row_of(0, 0), key, column_of(0));
      consume<S.stages>(key);
      multiply_query_key(scores);
      if constexpr (S.bias != Bias::none) add(scores, bias);
      if (!all_visible(key)) hide_invisible(scores, key);
      consume<S.stages + 1>(key);
      exponentiate(scores);
      if constexpr (kDividesByRounded) add_rounded(scores);
      if constexpr (S.dropout == Dropout::on) drop(scores, key);
      multiply_probability_value(scores);
    }
    // Which slot it was is computed anew: kept through the loop it would occupy registers.
    const Slot slot = slot_of<S>(p_, ptx::opaque(blockIdx.x));
    if constexpr (kSplits) {
      finish_together(slot);
    } else {
      finish(slot);
    }
  }

  /// What the slot's tiles of keys cover. Where there is dropout they begin at its groups, so that the keys
  /// that a thread holds share its calls (philox.h); where there is a bias, at even keys, whose pairs may be
  /// aligned.
  static ATTUNE_DEVICE KeyRange keys_of_tiles(const ForwardParams& params, const Window& window,
                                              const Slot& slot) {
    constexpr i32 kMultiple = S.dropout == Dropout::on ? kDropoutGroup : S.bias != Bias::none ? 2 : 1;
    const KeyRange visited = visited_keys<S>(window, slot.block.len_k, slot.begin, slot.end);
    const i32 begin = visited.begin - visited.begin % kMultiple;
    if constexpr (!kSplits) return {begin, visited.end};
    const KeyRange tiles =
        part_of({0, ceil_div(visited.end - begin, S.block_n)},
                slot.split * S.warps + static_cast<i32>(threadIdx.y), params.splits * S.warps);
    return {begin + tiles.begin * S.block_n, min(begin + tiles.end * S.block_n, visited.end)};
  }

  // The slot's value columns.
  static ATTUNE_DEVICE i32 first_column(const Slot& slot) {
    return slot.part * S.block_v;
  }
  static ATTUNE_DEVICE i32 columns(const Slot& slot) {
    return S.head_dim_v % S.block_v == 0 ? S.block_v : min(S.head_dim_v - first_column(slot), S.block_v);
  }

  static ATTUNE_DEVICE const u16* rows_of(const void* tensor) {
    return static_cast<const u16*>(tensor);
  }
  static ATTUNE_DEVICE u32 lane() {
    return threadIdx.x % kWarpSize;
  }
  static ATTUNE_DEVICE u32 warp_row() {
    return threadIdx.x / kWarpSize * kWarpRows;  // where keys are split, warps differ in threadIdx.y
  }

  /// Those that share tiles.
  static ATTUNE_DEVICE void synchronize() {
    if constexpr (kSplits) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // ---- The pipeline ----

  /// Fills the free slot with load `Load`, counted from the key tile at `key`: keys when even, values when
  /// odd. The group is closed even when there is nothing to load, so that groups can be counted.
  template <i32 Load>
  ATTUNE_DEVICE void refill(i32 key) {
    const i32 first = key + Load / 2 * S.block_n;
    if (first < keys_.end) {
      const i32 rows = slot_.block.len_k - first;
      const auto row_at = [&](i32 row) { return key_row<S>(p_, slot_.block, first + row); };
      if constexpr (Load % 2 == 0) {
        key_source_.copy(free_tile_, p_.key_strides.seq, rows, S.head_dim, row_at);
      } else {
        value_source_.copy(free_tile_, p_.value_strides.seq, rows, columns(slot_), row_at);
      }
    }
    ptx::cp_async_commit_group();
  }

  /// Makes the next load the one to read, frees the one before it and refills its slot.
  template <i32 Load>
  ATTUNE_DEVICE void consume(i32 key) {
    ptx::cp_async_wait_group<S.stages - 1>();
    synchronize();
    free_tile_ = tile_;
    tile_ += kShared.tile_bytes;
    if (tile_ == ring_ + kShared.tiles * kShared.tile_bytes) tile_ = ring_;
    refill<Load>(key);
  }

  /// Loads the queries and the first `stages` tiles.
  ATTUNE_DEVICE void start() {
    const i64 stride = p_.query_strides.seq;
    TileSource<S.block_m, S.head_dim, S.copy_bytes, kThreads> source(
        rows_of(p_.query) + head_offset(slot_, p_.query_strides), stride, slot_.block.q_begin + slot_.begin);
    source.copy(query_tile_, stride, slot_.end - slot_.begin, S.head_dim);
    free_tile_ = ring_;
    refill<0>(keys_.begin);
    if constexpr (S.stages == 2) {
      free_tile_ += kShared.tile_bytes;
      refill<1>(keys_.begin);
    }
    tile_ = ring_ + (kShared.tiles - 1) * kShared.tile_bytes;

    ptx::cp_async_wait_group<S.stages - 1>();
    if (S.bias == Bias::none && !(p_.scale > 0.0f)) fold_sign_into_query();
    synchronize();
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
        rounded_sum_[m][half] = 0.0f;
      }
    }
    clear(output_);
  }

  /// Without a bias the softmax below takes the maximum before it scales, which needs a positive factor. A
  /// negative scale becomes its absolute value and negated queries, scale 0 becomes 1 and zero queries. Each
  /// thread edits the chunks that it copied itself.
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

  /// What the softmax still has to multiply the scores by. With a bias they are in base 2 already.
  ATTUNE_DEVICE float positive_scale2() const {
    if constexpr (S.bias != Bias::none) return 1.0f;
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
    const u32 origin = tile_ + QueryTile::offset(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
    clear(scores);
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
  static ATTUNE_DEVICE i32 column_of(i32 n) {
    return static_cast<i32>(lane() % 4 * 2) + n * 8;
  }

  /// scores = scale * scores + bias, in base 2.
  ATTUNE_DEVICE void add(Scores& scores, const BiasFragments<S>& bias) const {
    const float scale2 = p_.scale * kLog2e;
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
      for (i32 n = 0; n < kKeySteps * 2; ++n) {
#pragma unroll
        for (i32 e = 0; e < 4; ++e) {
          const float element = bias.element(m * 2 + e / 2, n, e % 2);
          scores[m][n][e] = with_bias<S.bias>(scores[m][n][e] * scale2, element);
        }
      }
    }
  }

  /// Needs no query of the block a mask in the tile of keys at `key`? Computed anew for each tile: bounds
  /// kept through the loop would occupy registers.
  ATTUNE_DEVICE bool all_visible(i32 key) const {
    const i32 begin = ptx::opaque(slot_.begin);
    const i32 end = min(begin + S.block_m, slot_.block.len_q);
    const KeyRange unmasked = unmasked_keys<S>(window_, slot_.block.len_k, begin, end);
    return (S.window_left == Edge::open || key >= unmasked.begin) && key + S.block_n <= unmasked.end;
  }

  /// Score -inf where the mask says no; `key` is the tile's first.
  ATTUNE_DEVICE void hide_invisible(Scores& scores, i32 key) const {
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
      for (i32 n = 0; n < kKeySteps * 2; ++n) {
#pragma unroll
        for (i32 e = 0; e < 4; ++e) {
          const i32 i = slot_.begin + row_of(m, e / 2);
          const i32 j = key + column_of(n) + e % 2;
          if (!visible<S>(window_, slot_.block.len_k, i, j)) scores[m][n][e] = neg_inf();
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
        largest = quad_max(largest);
        const float before = row_max_[m][half];
        row_max_[m][half] = fmaxf(before, largest * scale2);
        const float shift = safe_max(row_max_[m][half]);
        const float decay = ptx::ex2_approx_ftz(before - shift);

        float sum = 0.0f;
#pragma unroll
        for (i32 n = 0; n < kKeySteps * 2; ++n) {
          float(&s)[4] = scores[m][n];
#pragma unroll
          for (i32 e = half * 2; e < half * 2 + 2; ++e) {
            s[e] = ptx::ex2_approx_ftz(fmaf(s[e], scale2, -shift));
            sum += s[e];
          }
        }
        row_sum_[m][half] = fmaf(row_sum_[m][half], decay, sum);
        rounded_sum_[m][half] *= decay;
#pragma unroll
        for (i32 n = 0; n < kValuePairs * 2; ++n) {
          output_[m][n][half * 2] *= decay;
          output_[m][n][half * 2 + 1] *= decay;
        }
      }
    }
  }

  /// Adds up the probabilities as the product with V rounds them.
  ATTUNE_DEVICE void add_rounded(const Scores& scores) {
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
      for (i32 half = 0; half < 2; ++half) {
#pragma unroll
        for (i32 n = 0; n < kKeySteps * 2; ++n) {
          const float(&s)[4] = scores[m][n];
          const u32 pair = pack<S.dtype>(s[half * 2], s[half * 2 + 1]);
          rounded_sum_[m][half] += widen(S.dtype, static_cast<u16>(pair));
          rounded_sum_[m][half] += widen(S.dtype, static_cast<u16>(pair >> 16));
        }
      }
    }
  }

  /// Drops probabilities, which row sums do not notice; the survivors are scaled up in finish().
  ATTUNE_DEVICE void drop(Scores& scores, i32 key) const {
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
      for (i32 half = 0; half < 2; ++half) {
        const auto query = static_cast<u32>(slot_.begin + row_of(m, half));
#pragma unroll
        for (i32 group = 0; group < S.block_n / kDropoutGroup; ++group) {
          const i32 j = key + column_of(group * 4);
          const Philox<u32> bits =
              dropout_bits(p_.dropout, slot_.block.index, head_number(p_, slot_), query, dropout_call(j));
#pragma unroll
          for (i32 n = 0; n < 4; ++n) {
            float(&s)[4] = scores[m][group * 4 + n];
            if (!kept(p_.dropout, bits.word[n], 0)) s[half * 2] = 0.0f;
            if (!kept(p_.dropout, bits.word[n], 1)) s[half * 2 + 1] = 0.0f;
          }
        }
      }
    }
  }

  /// output += P V, P rounded to the inputs' type.
  ATTUNE_DEVICE void multiply_probability_value(const Scores& scores) {
    const u32 origin = tile_ + ValueTile::offset(lane() % 16, lane() / 16);
#pragma unroll
    for (i32 step = 0; step < kKeySteps; ++step) {
      u32 probability[S.tile_m][4];
      pack_fragments<S.dtype>(probability, scores, step);
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

  /// Normalises, writes the LSE and the output.
  ATTUNE_DEVICE void finish(const Slot& slot) const {
    __syncthreads();  // a block that visits no key comes straight from reading its queries, which lie there
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
      for (i32 half = 0; half < 2; ++half) {
        const float sum = quad_sum(row_sum_[m][half]);
        const float divisor = kDividesByRounded ? quad_sum(rounded_sum_[m][half]) : sum;
        if constexpr (S.lse == Lse::write) write_lse(slot, row_of(m, half), row_max_[m][half], sum);
        const float rescale = S.dropout == Dropout::on ? p_.dropout.rescale : 1.0f;
        const float factor = inverse_sum(divisor) * rescale;
        if constexpr (S.output_dtype == DType::f32) {
          store_row(slot, m, half, factor);
        } else {
          stage_row(m, half, factor);
        }
      }
    }
    if constexpr (S.output_dtype != DType::f32) {
      __syncwarp();
      store_staged(slot);
    }
  }

  /// Where warps split keys: what each of them found in its own becomes the result of all, added up in the
  /// order of the warps.
  ATTUNE_DEVICE void finish_together(const Slot& slot) {
    constexpr i32 kPitch = kValuePairs * 16 + 8;  // of a row of float32, so that rows begin in other banks
    constexpr i32 kStatsBytes = S.block_m * 16;
    static_assert(kStatsBytes + S.block_m * kPitch * 4 <= kShared.bytes());
    const auto area_of = [&](i32 warp) {
      return query_tile_ + (warp - static_cast<i32>(threadIdx.y)) * kShared.bytes();
    };
    const i32 rows = slot.end - slot.begin;
    __syncwarp();
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
      for (i32 half = 0; half < 2; ++half) {
        row_sum_[m][half] = quad_sum(row_sum_[m][half]);
        rounded_sum_[m][half] = quad_sum(rounded_sum_[m][half]);
        const ptx::Chunk stats{
            {bits_of(row_max_[m][half]), bits_of(row_sum_[m][half]), bits_of(rounded_sum_[m][half]), 0}};
        if (lane() % 4 == 0) ptx::st_shared_v4(query_tile_ + row_of(m, half) * 16, stats);
      }
    }
    __syncthreads();
#pragma unroll
    for (i32 m = 0; m < S.tile_m; ++m) {
#pragma unroll
      for (i32 half = 0; half < 2; ++half) {
        const i32 row = row_of(m, half);
        float largest = neg_inf();
        float sum = 0.0f;
        float rounded = 0.0f;
#pragma unroll
        for (i32 warp = 0; warp < S.warps; ++warp) {
          const ptx::Chunk stats = ptx::ld_shared_v4(area_of(warp) + row * 16);
          const float before = largest;
          largest = fmaxf(largest, float_of(stats.word[0]));
          const float decay = ptx::ex2_approx_ftz(before - safe_max(largest));
          const float weight = ptx::ex2_approx_ftz(float_of(stats.word[0]) - safe_max(largest));
          sum = fmaf(sum, decay, float_of(stats.word[1]) * weight);
          rounded = fmaf(rounded, decay, float_of(stats.word[2]) * weight);
        }
        if (threadIdx.y == 0) write_lse(slot, row, largest, sum);
        if (row >= rows) continue;
        const bool saw = row_sum_[m][half] != 0.0f;
        const float weight = ptx::ex2_approx_ftz(row_max_[m][half] - safe_max(largest));
        const float factor = inverse_sum(rounded) * weight;
        const u32 values = query_tile_ + kStatsBytes + row * kPitch * 4;
#pragma unroll
        for (i32 n = 0; n < kValuePairs * 2; ++n) {
          const float(&o)[4] = output_[m][n];
          ptx::st_shared_v2_f32(values + column_of(n) * 4, saw ? o[half * 2] * factor : 0.0f,
                                saw ? o[half * 2 + 1] * factor : 0.0f);
        }
      }
    }
    __syncthreads();
    constexpr i32 kPairs = ceil_div(S.block_v, 2);
    float* const output = static_cast<float*>(p_.output) + output_offset(slot, 0);
#pragma unroll 1
    for (i32 i = static_cast<i32>(threadIdx.y * kWarpSize + threadIdx.x); i < rows * kPairs;
         i += S.warps * kWarpSize) {
      const i32 row = i / kPairs;
      const i32 column = i % kPairs * 2;
      float low = 0.0f;
      float high = 0.0f;
#pragma unroll
      for (i32 warp = 0; warp < S.warps; ++warp) {
        float first, second;
        ptx::ld_shared_v2_f32(first, second, area_of(warp) + kStatsBytes + (row * kPitch + column) * 4);
        low += first;
        high += second;
      }
      store_pair<S.copy_bytes>(output + row * p_.output_strides.seq + column, low, high,
                               columns(slot) - column);
    }
  }

  ATTUNE_DEVICE void write_lse(const Slot& slot, i32 row, float row_max, float sum) const {
    const i32 query = slot.begin + row;
    if (lane() % 4 != 0 || query >= slot.end || slot.part != 0) return;
    p_.lse[lse_offset(p_, slot, query)] = (row_max + log2f(sum)) * kLn2;  // saw nothing: -inf + log2(0)
  }

  /// Elements from the output's start to its row for this query of the tile.
  ATTUNE_DEVICE i64 output_offset(const Slot& slot, i32 row) const {
    return slot.split * output_rows(p_) * S.head_dim_v + head_offset(slot, p_.output_strides) +
           first_column(slot) + (slot.block.q_begin + slot.begin + row) * p_.output_strides.seq;
  }

  /// float32 leaves from registers: four lanes fill the 32 bytes that memory is accessed by.
  ATTUNE_DEVICE void store_row(const Slot& slot, i32 m, i32 half, float factor) const {
    if (slot.begin + row_of(m, half) >= slot.end) return;
    float* row = static_cast<float*>(p_.output) + output_offset(slot, row_of(m, half));
#pragma unroll
    for (i32 n = 0; n < kValuePairs * 2; ++n) {
      const float(&o)[4] = output_[m][n];
      store_pair<S.copy_bytes>(row + column_of(n), o[half * 2] * factor, o[half * 2 + 1] * factor,
                               columns(slot) - column_of(n));
    }
  }

  /// 16 bits leave through the warp's own rows of the query tile, so that stores are as wide as the alignment
  /// allows.
  ATTUNE_DEVICE void stage_row(i32 m, i32 half, float factor) const {
    const u32 origin = query_tile_ + ValueTile::offset(row_of(m, half), 0) + lane() % 4 * 4;
#pragma unroll
    for (i32 n = 0; n < kValuePairs * 2; ++n) {
      const float(&o)[4] = output_[m][n];
      const u32 chunk =
          n % 2 == 0 ? ValueTile::moved(origin, 0, n) : ValueTile::moved(origin ^ kChunkBytes, 0, n - 1);
      ptx::st_shared_b32(chunk, pack<S.output_dtype>(o[half * 2] * factor, o[half * 2 + 1] * factor));
    }
  }

  ATTUNE_DEVICE void store_staged(const Slot& slot) const {
    u16* rows = static_cast<u16*>(p_.output) + output_offset(slot, 0);
    using Walk = RowWalk<kWarpRows, S.block_v, kWarpSize>;
    Walk::template for_each<min(Walk::kPasses, 4)>(lane(), [&](i32 row_of_warp, i32 chunk) {
      const i32 row = static_cast<i32>(warp_row()) + row_of_warp;
      if (slot.begin + row >= slot.end) return;
      u16* destination = rows + row * p_.output_strides.seq + chunk * kChunkElements;
      store_chunk<S.copy_bytes>(destination, ptx::ld_shared_v4(query_tile_ + ValueTile::offset(row, chunk)),
                                Walk::bytes_left(chunk, columns(slot)));
    });
  }

  const ForwardParams& p_;
  const Slot slot_;
  const Window window_;
  const KeyRange keys_;
  Source<S.head_dim> key_source_;
  Source<S.block_v> value_source_;
  const u32 query_tile_, ring_;
  u32 tile_;       // the load that is read
  u32 free_tile_;  // where the next load goes

  QueryFragments query_[kKeepQuery ? kDimSteps : 1];
  float output_[S.tile_m][kValuePairs * 2][4];
  float row_max_[S.tile_m][2];  // in base 2, scaled; -inf until a key was seen
  float row_sum_[S.tile_m][2];
  float rounded_sum_[S.tile_m][2];  // of the probabilities as the product with V takes them
};

template <KernelSpec S>
ATTUNE_DEVICE void forward_mma(const ForwardParams& params) {
  extern __shared__ __align__(128) u8 shared[];
  ForwardMma<S>::run(params, ptx::shared_address(shared));
}

}  // namespace attune::kernel
