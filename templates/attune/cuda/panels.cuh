// Tiles of 16-bit rows as Hopper's copy engine and matrix products want them: panels of 64 columns, 128 bytes
// a row, whose chunks of 16 bytes are XORed with the row.
#pragma once

#include "attune/cuda/ptx.cuh"
#include "attune/cuda/ptx_sm90.cuh"
#include "attune/cuda/shared.h"
#include "attune/hd.h"

namespace attune::kernel {

inline constexpr i32 kWarpgroup = 128;  // threads

template <i32 Rows>
inline constexpr i32 kPanelBytes = Rows* Sm90Shared::kPanelRowBytes;

/// Byte offset of a chunk of 8 elements in the panels of a tile of so many rows.
template <i32 Rows>
ATTUNE_DEVICE u32 panel_offset(u32 row, i32 chunk) {
  return static_cast<u32>(chunk / 8 * kPanelBytes<Rows>) + row * Sm90Shared::kPanelRowBytes +
         ((static_cast<u32>(chunk % 8) ^ row % 8) * 16);
}

/// Copies a tile panel by panel. The barrier is told nothing of its bytes.
template <i32 Panels, i32 Rows>
ATTUNE_DEVICE void load_panels(u32 tile, const TensorMap& map, u32 barrier, ptx::BoxOrigin origin,
                               u64 policy) {
#pragma unroll
  for (i32 panel = 0; panel < Panels; ++panel) {
    origin.column = panel * Sm90Shared::kPanelElements;
    ptx::cp_async_bulk_tensor_load(tile + panel * kPanelBytes<Rows>, map, barrier, origin, policy);
  }
}

}  // namespace attune::kernel
