// The GPU's gradients against float64, family by family, over random problems of the whole surface in
// poisoned surroundings, through the public API; in deterministic mode twice, which must give the same bits.
#include "runtime/cuda/cuda_backend.h"
#include "tests/gpu/gpu_main.h"
#include "tests/support/random.h"
#include "tools/verify/numerics.h"

#include <doctest/doctest.h>

#include <cstdio>
#include <string>

using namespace attune;
using namespace attune::test;

namespace {

void check_family(Family family, const char* name) {
  if (only_family != "all" && only_family != name) return;
  auto ran = verify::verify_numerics({.seed = test_seed(),
                                      .cases = case_count,
                                      .pass = verify::Pass::backward,
                                      .device = kGpu,
                                      .families = {family}});
  if (!ran.ok()) FAIL(ran.failure().message);
  verify::NumericsReport& report = *ran;
  std::printf("%s", text_of(report).c_str());
  for (const std::string& failure : report.failures) FAIL_CHECK(failure);
  CHECK(report.cases == case_count);
  CHECK(report.kernels <= report.specs);  // those that go by rows are the families' in common
  if (case_count < 512) return;
  CHECK(report.tallies["deterministic"]["yes"].cases >= 100);
  CHECK(report.tallies["NaN"]["in a sequence's query"].cases >= 10);
  CHECK(report.tallies["NaN"]["in a sequence's grad_output"].cases >= 10);
}

}  // namespace

TEST_CASE("gradients of simt kernels are as exact as twice the plain implementation's error") {
  check_family(Family::simt, "simt");
}

TEST_CASE("gradients of mma kernels are as exact as twice the plain implementation's error") {
  check_family(Family::mma, "mma");
}

TEST_CASE("gradients of sm90 kernels are as exact as twice the plain implementation's error") {
  if (runtime::cuda_report().devices.at(0).sm != 90) return;  // these are for Hopper alone
  check_family(Family::sm90, "sm90");
}
