// GPU kernels drop exactly the pairs that dropout_keeps drops, and so the same as CPU kernels.
#include "runtime/cuda/cuda_backend.h"
#include "tests/gpu/gpu_main.h"
#include "tests/support/kept_pairs.h"

#include <doctest/doctest.h>

using namespace attune;
using namespace attune::test;

TEST_CASE("simt kernels drop the pairs that the definition drops") {
  CHECK(wrong_dropout(kGpu, Family::simt, {DType::f32, DType::f16, DType::bf16}) == "");
}

TEST_CASE("mma kernels drop the pairs that the definition drops") {
  CHECK(wrong_dropout(kGpu, Family::mma, {DType::f16, DType::bf16}) == "");
}

TEST_CASE("sm90 kernels drop the pairs that the definition drops") {
  if (runtime::cuda_report().devices.at(0).sm != 90) return;  // these are for Hopper alone
  CHECK(wrong_dropout(kGpu, Family::sm90, {DType::f16, DType::bf16}) == "");
}
