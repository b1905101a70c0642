// Rings of tiles in shared memory between warps that fill them and warps that read them.
#pragma once

#include "attune/cuda/ptx_sm90.cuh"
#include "attune/hd.h"

namespace attune::kernel {

/// A place in a ring, with the parity to wait for. Who fills starts with parity 1, so that the first waits
/// for room fall through; who reads starts with 0.
template <i32 Stages>
struct Cursor {
  u32 stage = 0;
  u32 parity;

  ATTUNE_DEVICE explicit Cursor(u32 first_parity) : parity(first_parity) {}
  ATTUNE_DEVICE void advance() {
    if (Stages == 1 || ++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// Tiles of so many bytes, each with two barriers: `full` completes with the bytes of its copy, `empty` when
/// every reader has let it go.
template <i32 Stages, i32 Bytes>
struct Ring {
  using Cursor = kernel::Cursor<Stages>;
  static constexpr i32 kBytes = Stages * Bytes;
  static constexpr i32 kBarrierBytes = Stages * 16;

  u32 tiles;     // shared-memory addresses
  u32 barriers;  // full, empty of each stage

  ATTUNE_DEVICE u32 tile(const Cursor& at) const { return tiles + at.stage * Bytes; }
  ATTUNE_DEVICE u32 full(const Cursor& at) const { return barriers + at.stage * 16; }
  ATTUNE_DEVICE u32 empty(const Cursor& at) const { return full(at) + 8; }

  /// `releases`: how often a tile is released before it is filled again; `fills`: how many arrivals fill it.
  ATTUNE_DEVICE void init(u32 releases, u32 fills = 1) const {
    for (Cursor at(0); at.parity == 0; at.advance()) {
      ptx::mbarrier_init(full(at), fills);
      ptx::mbarrier_init(empty(at), releases);
    }
  }
  /// Waits for room.
  ATTUNE_DEVICE void acquire(const Cursor& at) const { ptx::mbarrier_wait(empty(at), at.parity); }
  /// Waits for the tile.
  ATTUNE_DEVICE void wait(const Cursor& at) const { ptx::mbarrier_wait(full(at), at.parity); }
  /// As often as init() was told.
  ATTUNE_DEVICE void release(const Cursor& at) const { ptx::mbarrier_arrive(empty(at)); }
};

}  // namespace attune::kernel
