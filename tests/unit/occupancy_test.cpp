// Occupancy against what NVIDIA's own arithmetic says, where a toolkit is here, and against known kernels.
#include "tools/occupancy.h"

#include "tests/support/random.h"

#include <doctest/doctest.h>
#if ATTUNE_HAVE_CUDA_OCCUPANCY
#include <cuda_occupancy.h>
#endif

using attune::tools::BlockNeeds;
using attune::tools::compute_capability_of;
using attune::tools::occupancy;

TEST_CASE("kernels whose occupancy is known") {
  // 128 threads of 64 registers: 8 blocks fill the registers of every SM that has room for as many threads.
  const auto a100 = occupancy({.threads = 128, .registers = 64, .shared_bytes = 1024}, 80);
  REQUIRE(a100.ok());
  CHECK(a100->blocks == 8);
  CHECK(a100->warps == 32);
  CHECK(a100->max_warps == 64);
  CHECK(std::string(a100->limit) == "registers");
  // 100 KB and the driver's kilobyte, twice, fit into H100's 228.
  CHECK(occupancy({.threads = 384, .registers = 80, .shared_bytes = 100 << 10}, 90)->blocks == 2);
  CHECK(occupancy({.threads = 384, .registers = 80, .shared_bytes = 114 << 10}, 90)->blocks == 1);
  // More registers than an SM has.
  CHECK(occupancy({.threads = 1024, .registers = 128, .shared_bytes = 0}, 90)->blocks == 0);
  CHECK_FALSE(occupancy({}, 42).ok());
}

TEST_CASE("GPUs by name") {
  CHECK(*compute_capability_of("H200") == 90);
  CHECK(*compute_capability_of("rtx 4090") == 89);
  CHECK(*compute_capability_of("sm_90a") == 90);
  for (const char* name : {"", "sm_42", "x86-64-v4", "H100 PCIe 2"})
    CHECK_FALSE(compute_capability_of(name).ok());
}

#if ATTUNE_HAVE_CUDA_OCCUPANCY
namespace {

struct SharedMemory {
  int compute_capability;
  std::size_t of_sm, of_block;
};
// CUDA C++ Programming Guide, in kilobytes.
constexpr SharedMemory kSharedMemory[] = {{60, 64, 48},   {61, 96, 48},    {70, 96, 96},    {75, 64, 64},
                                          {80, 164, 163}, {86, 100, 99},   {87, 164, 163},  {89, 100, 99},
                                          {90, 228, 227}, {100, 228, 227}, {103, 228, 227}, {110, 228, 227},
                                          {120, 100, 99}, {121, 100, 99}};

int blocks_by_toolkit(const BlockNeeds& needs, const SharedMemory& shared, int threads_of_sm) {
  cudaOccDeviceProp device;
  device.computeMajor = shared.compute_capability / 10;
  device.computeMinor = shared.compute_capability % 10;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = threads_of_sm;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32;
  device.sharedMemPerBlock = 48 << 10;
  device.sharedMemPerBlockOptin = shared.of_block << 10;
  device.sharedMemPerMultiprocessor = shared.of_sm << 10;
  device.reservedSharedMemPerBlock = shared.compute_capability >= 80 ? 1024 : 0;
  device.numSms = 1;
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = 1024;
  kernel.numRegs = needs.registers;
  kernel.sharedSizeBytes = 0;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = shared.of_block << 10;
  kernel.numBlockBarriers = 1;
  cudaOccDeviceState state;
  state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
  cudaOccResult result{};
  REQUIRE(cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, needs.threads,
                                                  static_cast<std::size_t>(needs.shared_bytes)) ==
          CUDA_OCC_SUCCESS);
  return result.activeBlocksPerMultiprocessor;
}

}  // namespace

TEST_CASE("the toolkit's arithmetic gives the same for random kernels") {
  attune::test::Random random(attune::test::test_seed());
  for (int i = 0; i < 20000; ++i) {
    const SharedMemory& shared =
        kSharedMemory[random.integer(0, static_cast<int>(std::size(kSharedMemory)) - 1)];
    const BlockNeeds needs{.threads = random.integer(1, 1024),
                           .registers = random.integer(16, 255),
                           .shared_bytes = random.integer(0, static_cast<int>(shared.of_block) << 10)};
    const auto ours = occupancy(needs, shared.compute_capability);
    REQUIRE(ours.ok());
    CAPTURE(shared.compute_capability);
    CAPTURE(needs.threads);
    CAPTURE(needs.registers);
    CAPTURE(needs.shared_bytes);
    REQUIRE(ours->blocks == blocks_by_toolkit(needs, shared, ours->max_warps * 32));
  }
}
#endif
