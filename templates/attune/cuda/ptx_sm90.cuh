// PTX of Hopper: barriers in shared memory, the tensor copy engine, warpgroups. One function per instruction,
// as in ptx.cuh; everything here needs sm_90, and setmaxnreg and wgmma need sm_90a.
#pragma once

#include "attune/cuda/ptx.cuh"
#include "attune/hd.h"
#include "attune/params.h"

namespace attune::kernel {

namespace ptx {

// ---- Warpgroups and named barriers ----

/// Gives registers of this warpgroup back, or takes them; every warp of it executes this.
template <i32 Count>
ATTUNE_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <i32 Count>
ATTUNE_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

/// Barrier `id` among `threads` threads, whole warps: waits for all of them, or only announces this thread.
ATTUNE_DEVICE void bar_sync(u32 id, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
ATTUNE_DEVICE void bar_arrive(u32 id, u32 threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// bar_sync, and whether any of the threads says `mine`.
ATTUNE_DEVICE bool bar_red_or(u32 id, u32 threads, bool mine) {
  u32 any;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.u32 p, %1, 0; bar.red.or.pred q, %2, %3, p; selp.u32 %0, 1, 0, q; }"
      : "=r"(any)
      : "r"(static_cast<u32>(mine)), "r"(id), "r"(threads)
      : "memory");
  return any != 0;
}

/// counter = counter >= last ? 0 : counter + 1; gives what it was.
ATTUNE_DEVICE u32 atom_inc(u32* counter, u32 last) {
  u32 old;
  asm volatile("atom.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(last) : "memory");
  return old;
}

/// What another block has written there, and all that it had seen before.
ATTUNE_DEVICE u32 ld_acquire(const u32* address) {
  u32 value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
ATTUNE_DEVICE void red_release_max(u32* address, u32 value) {
  asm volatile("red.release.gpu.global.max.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
ATTUNE_DEVICE void red_release_add(u32* address, u32 value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

/// The same within a block, of shared memory.
ATTUNE_DEVICE u32 ld_shared_acquire(u32 address) {
  u32 value;
  asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
ATTUNE_DEVICE void st_shared_release(u32 address, u32 value) {
  asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// ---- mbarrier ----

ATTUNE_DEVICE void mbarrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
/// Makes initialised barriers visible to the copy engine.
ATTUNE_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
ATTUNE_DEVICE void mbarrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// Arrives, and has the phase wait for so many bytes of copies.
ATTUNE_DEVICE void mbarrier_arrive_expect_tx(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
ATTUNE_DEVICE bool mbarrier_try_wait_parity(u32 barrier, u32 parity) {
  u32 done;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done != 0;
}
/// Waits for the phase of this parity. Without a guard against hanging: a trap here makes ptxas spill.
ATTUNE_DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
  while (!mbarrier_try_wait_parity(barrier, parity)) {}
}

// ---- Clusters: blocks that reach into each other's shared memory ----

ATTUNE_DEVICE u32 cluster_ctarank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/// Of all threads of the cluster that have not ended.
ATTUNE_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
/// Where block `rank` has what lies at this address here.
ATTUNE_DEVICE u32 mapa(u32 address, u32 rank) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
/// Stores to another block; others see it after cluster_sync().
ATTUNE_DEVICE void st_shared_cluster_float(u32 address, float value) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
/// Arrives at a barrier of the cluster, of which mapa() gives the address: to say what has been read. Of what
/// has been written it says nothing, as it would wait for all that is on its way to memory.
ATTUNE_DEVICE void mbarrier_arrive_cluster(u32 barrier) {
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// Waits as mbarrier_wait() does, for such arrivals.
ATTUNE_DEVICE void mbarrier_wait_cluster(u32 barrier, u32 parity) {
  u32 done = 0;
  while (done == 0) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, "
        "1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}
/// Copies bytes to another block, whose barrier then has them; all from mapa() but the source.
ATTUNE_DEVICE void cp_async_bulk_cluster(u32 destination, u32 source, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          destination),
      "r"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

/// Stores to another block, whose barrier then has these 4 bytes; both from mapa().
ATTUNE_DEVICE void st_async_cluster(u32 address, u32 value, u32 barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address),
               "r"(value), "r"(barrier)
               : "memory");
}

// ---- The tensor copy engine. Maps have the axes [columns, rows, heads, batch] ----

/// L2 policies: what is read once, and what other blocks will read too.
inline constexpr u64 kEvictFirst = 0x12F0000000000000ull;
inline constexpr u64 kEvictLast = 0x14F0000000000000ull;

/// Where a box begins in its tensor.
struct BoxOrigin {
  i32 column, row, head, batch;
};

ATTUNE_DEVICE void prefetch_tensormap(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
/// Copies a box to shared memory and then arrives at the barrier with its bytes. Elements outside the tensor
/// become zero, and count.
ATTUNE_DEVICE void cp_async_bulk_tensor_load(u32 destination, const TensorMap& map, u32 barrier, BoxOrigin at,
                                             u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(destination),
      "l"(&map), "r"(barrier), "r"(at.column), "r"(at.row), "r"(at.head), "r"(at.batch), "l"(policy)
      : "memory");
}
/// Copies a box from shared memory; what lies outside the tensor is not written.
ATTUNE_DEVICE void cp_async_bulk_tensor_store(const TensorMap& map, u32 source, BoxOrigin at) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
      "r"(source), "r"(at.column), "r"(at.row), "r"(at.head), "r"(at.batch)
      : "memory");
}
/// Adds float32 from shared memory to as many bytes; addresses and size are multiples of 16.
ATTUNE_DEVICE void cp_reduce_async_bulk_add(float* destination, u32 source, u32 bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(destination)),
               "r"(source), "r"(bytes)
               : "memory");
}
ATTUNE_DEVICE void cp_async_bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/// Until the stores and additions of all but `Pending` groups have read their shared memory.
template <i32 Pending>
ATTUNE_DEVICE void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}
/// Until those of all but `Pending` groups have been done.
template <i32 Pending>
ATTUNE_DEVICE void cp_async_bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}
/// Orders this thread's ordinary accesses to memory before the copy engine's.
ATTUNE_DEVICE void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
/// Orders this thread's ordinary accesses to shared memory before the copy engine's.
ATTUNE_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Four 8x8 matrices of 16 bits from registers to shared memory; lane l gives the address of row l % 8 of
/// matrix l / 8.
ATTUNE_DEVICE void stmatrix_x4(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

/// The same with every matrix transposed.
ATTUNE_DEVICE void stmatrix_x4_trans(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

/// Two floats; the address is a multiple of 8.
ATTUNE_DEVICE float2 ld_shared_float2(u32 address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}
ATTUNE_DEVICE void st_shared_float2(u32 address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}
/// Four; the address is a multiple of 16.
ATTUNE_DEVICE void st_shared_float4(u32 address, const float* x) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]),
               "f"(x[3])
               : "memory");
}
ATTUNE_DEVICE void st_shared_float(u32 address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

/// Two halves of 16 bits each.
ATTUNE_DEVICE u32 min_u16x2(u32 a, u32 b) {
  u32 y;
  asm("min.u16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
ATTUNE_DEVICE u32 max_s16x2(u32 a, u32 b) {
  u32 y;
  asm("max.s16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
ATTUNE_DEVICE u32 add_s16x2(u32 a, u32 b) {
  u32 y;
  asm("add.s16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

ATTUNE_DEVICE u32 ld_shared_u32(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

struct Word4 {
  i32 x, y, z, w;
};
ATTUNE_DEVICE void st_shared_word4(u32 address, Word4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
ATTUNE_DEVICE Word4 ld_shared_word4(u32 address) {
  Word4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

/// log2(x) to about 1 ulp of the result; log2(0) = -inf.
ATTUNE_DEVICE float lg2_approx_ftz(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace ptx
}  // namespace attune::kernel
