// Dynamic shared memory of the GPU kernels. Layout and size stand here once: a kernel carves up what the host
// asks the driver for.
#pragma once

#include "attune/hd.h"
#include "attune/spec.h"

namespace attune::kernel {

/// Forward on tensor cores: the query tile, then a ring of tiles that hold keys or values. They alternate, so
/// `stages` tiles in flight need one more: the one being read. The query tile's bytes also stage the output.
/// Rows are 16-byte chunks of 8 elements without padding (tile.cuh).
struct MmaShared {
  i32 tiles;
  i32 query_bytes;
  i32 tile_bytes;

  constexpr explicit MmaShared(const KernelSpec& s)
      : tiles(s.stages + 1), query_bytes(s.block_m * row_bytes(s)), tile_bytes(s.block_n * row_bytes(s)) {}
  constexpr i32 bytes() const { return query_bytes + tiles * tile_bytes; }

 private:
  static constexpr i32 row_bytes(const KernelSpec& s) {
    return round_up(max(s.head_dim, s.block_v), 16) * size_of(s.dtype);
  }
};

/// Warps of a block of forward that share keys, and nothing else until they are done: each has all of the
/// above for itself, and is told from the others by threadIdx.y.
constexpr i32 lone_warps(const KernelSpec& s) {
  return s.family == Family::mma && s.split == Split::on ? s.warps : 1;
}

/// Gradients on tensor cores. A block keeps two tiles, of query and the output's gradient (grad_query) or of
/// key and value, and walks over pairs of the others on a ring of `stages` in flight and the one that is
/// read, in the second case with two numbers of every query. grad_key_value also has the tiles of the scores'
/// gradients and of the probabilities that its warps exchange.
struct GradMmaShared {
  i32 slots;
  i32 second_offset;
  i32 gradient_offset;
  i32 probability_offset;
  i32 ring_offset;
  i32 second_ring_offset;  // from the beginning of a slot
  i32 numbers_offset;      // likewise
  i32 slot_bytes;

  constexpr explicit GradMmaShared(const KernelSpec& s)
      : slots(s.stages + 1),
        second_offset(kept_rows(s) * row_bytes(s.head_dim)),
        gradient_offset(second_offset + kept_rows(s) * row_bytes(s.head_dim_v)),
        probability_offset(gradient_offset + (exchanges(s) || adds(s) ? score_bytes(s) : 0)),
        ring_offset(probability_offset + (exchanges(s) ? score_bytes(s) : 0)),
        second_ring_offset(ring_rows(s) * row_bytes(s.head_dim)),
        numbers_offset(second_ring_offset + ring_rows(s) * row_bytes(s.head_dim_v)),
        slot_bytes(numbers_offset + (of_keys(s) ? s.block_m * 8 : 0)) {}
  constexpr i32 bytes() const { return ring_offset + slots * slot_bytes; }

 private:
  static constexpr bool of_keys(const KernelSpec& s) { return s.operation != Operation::grad_query; }
  static constexpr i32 kept_rows(const KernelSpec& s) { return of_keys(s) ? s.block_n : s.block_m; }
  static constexpr i32 ring_rows(const KernelSpec& s) { return of_keys(s) ? s.block_m : s.block_n; }
  static constexpr i32 row_bytes(i32 columns) { return round_up(columns, 16) * 2; }
  static constexpr i32 score_bytes(const KernelSpec& s) { return s.block_m * s.block_n * 2; }
  static constexpr bool adds(const KernelSpec& s) { return s.query_gradient == QueryGradient::atomic; }
  static constexpr bool exchanges(const KernelSpec& s) {
    return s.operation == Operation::grad_key_value && s.warps * 16 * s.tile_m > s.block_n;
  }
};

/// Pitch of a row of float32 on ordinary float units, in vectors of 4: odd, so that eight rows read at the
/// same column touch all banks once.
constexpr i32 odd_pitch(i32 columns) {
  return ceil_div(columns, 4) | 1;
}

/// Forward on ordinary float units: the query tile, one slot for a key or value tile, and the probabilities,
/// all float32.
struct SimtShared {
  i32 query_pitch;
  i32 slot_pitch;
  i32 slot_offset;
  i32 probability_offset;
  i32 vectors;

  constexpr explicit SimtShared(const KernelSpec& s)
      : query_pitch(odd_pitch(s.head_dim)),
        slot_pitch(odd_pitch(max(s.head_dim, s.head_dim_v))),
        slot_offset(s.block_m * query_pitch),
        probability_offset(slot_offset + s.block_n * slot_pitch),
        vectors(probability_offset + s.block_m * odd_pitch(s.block_n)) {}
  constexpr i32 bytes() const { return vectors * 16; }
};

/// grad_query on ordinary float units: the tiles of the query and of the output's gradient, one slot for a
/// value or key tile, and the scores' gradient.
struct SimtGradQueryShared {
  i32 pitch;        // of query and key
  i32 value_pitch;  // of value and the output's gradient
  i32 grad_output_offset;
  i32 slot_offset;
  i32 weight_offset;
  i32 vectors;

  constexpr explicit SimtGradQueryShared(const KernelSpec& s)
      : pitch(odd_pitch(s.head_dim)),
        value_pitch(odd_pitch(s.head_dim_v)),
        grad_output_offset(s.block_m * pitch),
        slot_offset(grad_output_offset + s.block_m * value_pitch),
        weight_offset(slot_offset + s.block_n * max(pitch, value_pitch)),
        vectors(weight_offset + s.block_m * odd_pitch(s.block_n)) {}
  constexpr i32 bytes() const { return vectors * 16; }
};

/// grad_key_value on ordinary float units: the tiles of key and value, those of the query and of the output's
/// gradient, and the probabilities or the scores' gradient. With one stage the tiles of queries take turns in
/// one slot.
struct SimtGradKeyValueShared {
  i32 pitch;        // of query and key
  i32 value_pitch;  // of value and the output's gradient
  i32 value_offset;
  i32 query_offset;
  i32 grad_output_offset;
  i32 weight_offset;
  i32 vectors;

  constexpr explicit SimtGradKeyValueShared(const KernelSpec& s)
      : pitch(odd_pitch(s.head_dim)),
        value_pitch(odd_pitch(s.head_dim_v)),
        value_offset(s.block_n * pitch),
        query_offset(value_offset + s.block_n * value_pitch),
        grad_output_offset(query_offset + (s.stages == 1 ? 0 : s.block_m * pitch)),
        weight_offset(max(query_offset + s.block_m * pitch, grad_output_offset + s.block_m * value_pitch)),
        vectors(weight_offset + s.block_n * odd_pitch(s.block_m)) {}
  constexpr i32 bytes() const { return vectors * 16; }
};

/// grad_bias on ordinary float units: slices of rows by queries and of rows by keys. Sums that groups of
/// threads add up take the place of the former at the end.
struct SimtGradBiasShared {
  static constexpr i32 kSlice = 64;  // columns
  static constexpr i32 kPitch = odd_pitch(kSlice);
  i32 key_offset;
  i32 vectors;

  constexpr explicit SimtGradBiasShared(const KernelSpec& s)
      : key_offset(s.block_m * kPitch), vectors(key_offset + s.block_n * kPitch) {}
  constexpr i32 bytes() const { return vectors * 16; }
};

constexpr i32 simt_bytes(const KernelSpec& s) {
  switch (s.operation) {
    case Operation::grad_query: return SimtGradQueryShared(s).bytes();
    case Operation::grad_key_value: return SimtGradKeyValueShared(s).bytes();
    case Operation::grad_bias: return SimtGradBiasShared(s).bytes();
    default: return SimtShared(s).bytes();
  }
}

/// Forward on Hopper: rings of value and key tiles, a ring of query tiles for each warpgroup, two barriers
/// for each of these, and the work item of each query tile. A tile is panels of 64 elements, 128 bytes a row;
/// the last panel is zero beyond the head dim. The output leaves through the query tile. A tile of a bias
/// tensor, for all warpgroups, lies behind the key tile that it belongs to: panels of 128 bytes a row, or of
/// 64 or 32 where the tile is no wider.
struct Sm90Shared {
  static constexpr i32 kGroupRows = 64;      // queries of a warpgroup
  static constexpr i32 kPanelElements = 64;  // what the swizzle works on
  static constexpr i32 kPanelRowBytes = 128;

  i32 groups;          // warpgroups
  i32 panels;          // of a key or query tile
  i32 panels_v;        // of a value or output tile
  i32 key_bytes;       // of a tile
  i32 value_bytes;     // of a tile
  i32 query_bytes;     // of one warpgroup's tile
  i32 bias_row_bytes;  // of a panel
  i32 bias_bytes;      // of a tile
  i32 key_offset;
  i32 query_offset;
  i32 barrier_offset;
  i32 work_offset;
  i32 end;

  constexpr explicit Sm90Shared(const KernelSpec& s)
      : groups(s.block_m / kGroupRows),
        panels(ceil_div(s.head_dim, kPanelElements)),
        panels_v(ceil_div(s.head_dim_v, kPanelElements)),
        key_bytes(s.block_n * panels * kPanelRowBytes),
        value_bytes(s.block_n * panels_v * kPanelRowBytes),
        query_bytes(kGroupRows * max(panels, panels_v) * kPanelRowBytes),
        bias_row_bytes(panel_row_bytes(s.block_n * size_of(s.bias))),
        bias_bytes(s.block_m * s.block_n * size_of(s.bias)),
        key_offset(s.stages * value_bytes),
        query_offset(key_offset + s.stages * (key_bytes + bias_bytes)),
        barrier_offset(query_offset + groups * s.query_stages * query_bytes),
        work_offset(barrier_offset + 16 * (2 * s.stages + groups * s.query_stages)),
        end(work_offset + 16 * groups * s.query_stages) {}
  constexpr i32 bytes() const { return end; }

 private:
  static constexpr i32 panel_row_bytes(i32 row_bytes) {
    return row_bytes % 128 == 0 ? 128 : row_bytes % 64 == 0 ? 64 : 32;
  }
};

/// The sm90 kernel of grad_key_value computes as if all tensors had the wider head dim: the copy engine fills
/// up with zeros what one lacks.
constexpr i32 wider_dim(const KernelSpec& s) {
  return max(s.head_dim, s.head_dim_v);
}

/// Do its warpgroups share out columns, and not keys? A tile has no more of these than one multiplies, then.
constexpr bool shares_columns(const KernelSpec& s) {
  return s.family == Family::sm90 && s.operation == Operation::grad_key_value &&
         s.block_n == Sm90Shared::kGroupRows;
}

/// Does it have both a bias tensor and dropout of packed sequences? They fill registers, the producer's, too.
constexpr bool is_laden(const KernelSpec& s) {
  return s.blocks == Blocks::varlen && s.bias != Bias::none && s.dropout == Dropout::on;
}

/// Do tiles of pages take turns (ADR 9)? Who comes before whom then takes a search of its own.
constexpr bool has_turns_of_pages(const KernelSpec& s) {
  return s.keys == Keys::paged && s.query_gradient == QueryGradient::ordered;
}

/// Is it one of the longest to compile? What runs a little faster if it is there twice is there once then.
constexpr bool saves_code(const KernelSpec& s) {
  return wider_dim(s) > 192 && (is_laden(s) || has_turns_of_pages(s));
}

/// Blocks of a cluster, each with a tile of keys, that exchange score gradients. And the keys of all of them.
constexpr i32 cluster_blocks(const KernelSpec& s) {
  return s.cluster != 0 ? 2 : 1;
}
constexpr i32 cluster_keys(const KernelSpec& s) {
  return cluster_blocks(s) * s.block_n;
}

/// Gradients of key and value on Hopper: a tile of keys and one of values; a ring of `stages` tiles of
/// queries with the gradient of their output; two tiles of score gradients, which warpgroups exchange. Where
/// the head dim is wide, each has one of probabilities before it, and both are first of all a tile of the
/// bias tensor; else there is a tile for that, and float32 sums on their way to memory. For each stage two
/// numbers of every query, two barriers and what it holds; the work item, where and when the sums go, a
/// barrier for them, and what each two warps tell each other of dropout. A block of a cluster has one tile
/// each of probabilities, of its score gradients and of the other's, and half of the other's keys.
struct GradKeyValueSm90Shared {
  static constexpr i32 kWarpgroups = 2;
  static constexpr i32 kGroupRows = 64;    // keys of a warpgroup, and queries whose sums it sends
  static constexpr i32 kDrawnBytes = 512;  // of two warps

  i32 panels;
  i32 key_bytes;         // of a tile of keys or values
  i32 query_bytes;       // of a tile of queries or output gradients
  i32 score_bytes;       // of a tile of score gradients or probabilities
  i32 sum_bytes;         // of one warpgroup
  i32 sum_buffers;       // of one warpgroup: two leave sums the time to wait for their turn
  i32 other_key_bytes;   // clusters: columns of the other block's keys
  i32 last_panel_bytes;  // clusters: of output gradients; stages share it
  i32 stage_bytes;       // of queries and output gradients
  i32 query_offset;
  i32 last_panel_offset;
  i32 bias_row_bytes;  // of a panel
  i32 bias_bytes;      // of a tile's place
  i32 bias_stages;
  i32 bias_offset;
  i32 score_offset;
  i32 sum_offset;
  i32 number_offset;
  i32 barrier_offset;
  i32 step_offset;
  i32 work_offset;
  i32 turn_offset;
  i32 target_offset;
  i32 staged_offset;
  i32 added_offset;
  i32 allowed_offset;
  i32 drawn_offset;
  i32 end;

  constexpr explicit GradKeyValueSm90Shared(const KernelSpec& s)
      : panels(ceil_div(wider_dim(s), Sm90Shared::kPanelElements)),
        key_bytes(s.block_n * panels * Sm90Shared::kPanelRowBytes),
        query_bytes(s.block_m * panels * Sm90Shared::kPanelRowBytes),
        score_bytes(s.block_m * s.block_n * 2),
        sum_bytes(shares_columns(s) ? 0 : kGroupRows * Sm90Shared::kPanelElements * 4),
        sum_buffers(s.query_gradient == QueryGradient::ordered && has_room(s) ? 2 : 1),
        other_key_bytes(s.cluster != 0 ? key_bytes / 2 : 0),
        last_panel_bytes(s.cluster != 0 ? s.block_m * Sm90Shared::kPanelRowBytes : 0),
        stage_bytes(2 * query_bytes - last_panel_bytes),
        query_offset(2 * key_bytes + other_key_bytes),
        last_panel_offset(query_offset + s.stages * stage_bytes),
        bias_row_bytes(min(Sm90Shared::kPanelRowBytes, s.block_n * size_of(s.bias))),
        bias_bytes(shares_columns(s) ? 2 * score_bytes : s.block_m * s.block_n * size_of(s.bias)),
        bias_stages(shares_columns(s) ? 2 : 1),
        bias_offset(last_panel_offset + last_panel_bytes),
        score_offset(bias_offset + (shares_columns(s) ? 0 : bias_bytes)),
        sum_offset(score_offset + score_tiles(s) * score_bytes),
        number_offset(sum_offset + kWarpgroups * sum_buffers * sum_bytes),
        barrier_offset(number_offset + s.stages * 2 * s.block_m * 4),
        step_offset(barrier_offset + 16 * (1 + s.stages + bias_stages + (s.cluster != 0 ? 5 : 0))),
        work_offset(step_offset + 16 * s.stages),
        turn_offset(work_offset + 64),
        target_offset(turn_offset + 16 * s.stages),
        staged_offset(target_offset + 32 * kWarpgroups * sum_buffers),
        added_offset(staged_offset + 8 * kWarpgroups * sum_buffers),
        allowed_offset(added_offset + 8 * static_cast<i32>(added_barriers(s))),
        drawn_offset(allowed_offset + 16),
        end(drawn_offset + (s.dropout == Dropout::on ? s.block_n / 32 * kDrawnBytes : 0)) {}
  constexpr i32 bytes() const { return end; }

  /// For two parts of the sums of more steps than may be added before the first of them is passed on: a stage
  /// is filled again when its turn has been read.
  static constexpr u32 added_barriers(const KernelSpec& s) { return 2 * 2 * static_cast<u32>(s.stages); }

 private:
  static constexpr i32 score_tiles(const KernelSpec& s) {
    if (s.cluster != 0) return 3;
    return shares_columns(s) ? 4 : 2;
  }
  static constexpr bool has_room(const KernelSpec& s) {
    return s.bias == Bias::none && s.dropout == Dropout::off;
  }
};

/// The gradient of a bias tensor on Hopper: a ring of `stages` pairs, of a tile of queries or output
/// gradients and one of keys or values; a tile of the bias; two barriers for each of these, and what each
/// pair is. The tile of a bias of one row is this row alone: what lies behind is scratch, for the sums of
/// each warp.
struct GradBiasSm90Shared {
  static constexpr i32 kWarpgroups = 2;
  static constexpr i32 kGroupRows = 64;        // queries of a warpgroup
  static constexpr i32 kStepBytes = 64;        // what a pair is, and where for dropout
  static constexpr i32 kScratchOffset = 1024;  // in the tile of the bias

  i32 panels;
  i32 query_bytes;  // of a tile of queries or output gradients
  i32 pair_bytes;
  i32 bias_bytes;
  i32 bias_offset;
  i32 barrier_offset;
  i32 step_offset;
  i32 end;

  constexpr explicit GradBiasSm90Shared(const KernelSpec& s)
      : panels(ceil_div(wider_dim(s), Sm90Shared::kPanelElements)),
        query_bytes(s.block_m * panels * Sm90Shared::kPanelRowBytes),
        pair_bytes(query_bytes + s.block_n * panels * Sm90Shared::kPanelRowBytes),
        bias_bytes(s.block_m * s.block_n * size_of(s.bias)),
        bias_offset(s.stages * pair_bytes),
        barrier_offset(bias_offset + bias_bytes),
        step_offset(barrier_offset + 16 * (s.stages + 1)),
        end(step_offset + s.stages * kStepBytes) {}
  constexpr i32 bytes() const { return end; }
};

/// Dynamic shared memory of the kernel of this spec.
constexpr i32 shared_bytes(const KernelSpec& s) {
  switch (s.family) {
    case Family::mma:
      if (s.operation != Operation::forward) return GradMmaShared(s).bytes();
      return MmaShared(s).bytes() * lone_warps(s);
    case Family::sm90:
      return s.operation == Operation::forward     ? Sm90Shared(s).bytes()
             : s.operation == Operation::grad_bias ? GradBiasSm90Shared(s).bytes()
                                                   : GradKeyValueSm90Shared(s).bytes();
    case Family::simt: return simt_bytes(s);
    case Family::cpu:
    case Family::merge:
    case Family::rows: return 0;
  }
  return 0;
}

}  // namespace attune::kernel
