// The CPU's gradients against float64, over random problems of the whole surface in poisoned surroundings,
// through the public API; in deterministic mode twice, which must give the same bits.
#include "tests/support/random.h"
#include "tools/verify/mask_classes.h"
#include "tools/verify/numerics.h"

#include <doctest/doctest.h>

#include <cstdio>

using namespace attune;

TEST_CASE("the gradients of 512 random problems are as exact as twice the plain implementation's error") {
  auto ran =
      verify::verify_numerics({.seed = test::test_seed(), .cases = 512, .pass = verify::Pass::backward});
  if (!ran.ok()) FAIL(ran.failure().message);
  verify::NumericsReport& report = *ran;
  std::printf("%s", text_of(report).c_str());
  for (const std::string& failure : report.failures) FAIL_CHECK(failure);
  CHECK(report.cases == 512);
  // No length, stride, window or alignment needs a kernel of its own.
  CHECK(report.kernels == report.specs);
  CHECK(report.compiles == report.specs);

  for (const verify::MaskClass& mask : verify::mask_classes()) {
    CAPTURE(std::string(mask.name));
    CHECK(report.coverage[mask.name]["cpu"].size() >= 1);
  }
  CHECK(report.tallies["type"].size() == 3);
  CHECK(report.tallies["bias tensor"].size() == 5);
  CHECK(report.tallies["bias gradient"].size() == 3);
  CHECK(report.tallies["grad_output"].size() == 4);
  CHECK(report.tallies["lse"].size() == 3);
  CHECK(report.tallies["grad_lse"].size() == 3);
  CHECK(report.tallies["deterministic"]["yes"].cases >= 100);
  CHECK(report.tallies["NaN"]["in a sequence's query"].cases >= 10);
  CHECK(report.tallies["NaN"]["in a sequence's grad_output"].cases >= 10);
}
