// The CPU's kernels against float64, over random problems of the whole forward surface in poisoned
// surroundings, through the public API.
#include "tests/support/random.h"
#include "tools/verify/mask_classes.h"
#include "tools/verify/numerics.h"

#include <doctest/doctest.h>

#include <cstdio>

using namespace attune;

TEST_CASE("512 random problems are as exact as twice the plain implementation's error") {
  auto ran = verify::verify_numerics({.seed = test::test_seed(), .cases = 512});
  if (!ran.ok()) FAIL(ran.failure().message);
  verify::NumericsReport& report = *ran;
  std::printf("%s", text_of(report).c_str());
  for (const std::string& failure : report.failures) FAIL_CHECK(failure);
  CHECK(report.cases == 512);
  // No length, stride, window or alignment needs a kernel of its own.
  CHECK(report.kernels == report.specs);
  CHECK(report.compiles == report.specs);
  CHECK(report.specs < 256);

  for (const verify::MaskClass& mask : verify::mask_classes()) {
    CAPTURE(std::string(mask.name));
    CHECK(report.coverage[mask.name]["cpu"].size() == 3);  // every type
  }
  CHECK(report.tallies["bias tensor"].size() == 5);
  CHECK(report.tallies["function"].size() == 5);
  CHECK(report.tallies["dropout"].size() == 3);
  CHECK(report.tallies["sequences"].size() == 3);
}
