// GPU kernels drop exactly the pairs that dropout_keeps drops, and so the same as CPU kernels.
#define DOCTEST_CONFIG_IMPLEMENT
#include "runtime/cuda/cuda_backend.h"
#include "tests/support/kept_pairs.h"
#include "tests/support/temp_dir.h"

#include <doctest/doctest.h>

#include <cstdio>
#include <cstdlib>

using namespace attune;
using namespace attune::test;

namespace {

constexpr Device kGpu{DeviceType::cuda, 0};

}  // namespace

TEST_CASE("simt kernels drop the pairs that the definition drops") {
  CHECK(wrong_dropout(kGpu, Family::simt, {DType::f32, DType::f16, DType::bf16}) == "");
}

TEST_CASE("mma kernels drop the pairs that the definition drops") {
  CHECK(wrong_dropout(kGpu, Family::mma, {DType::f16, DType::bf16}) == "");
}

int main(int argc, char** argv) {
  const runtime::CudaReport report = runtime::cuda_report();
  if (report.devices.empty()) {
    std::printf("[SKIP] no CUDA device: %s\n", report.driver_problem.c_str());
    return 77;
  }
  const TempDir cache;
  setenv("ATTUNE_CACHE_DIR", cache.path().c_str(), 1);
  return doctest::Context(argc, argv).run();
}
