// The GPU's kernels against float64, family by family, over random problems of the whole forward surface in
// poisoned surroundings, through the public API. --cases N draws N problems per family (default 512);
// --family simt|mma|sm90|all.
#include "runtime/cuda/cuda_backend.h"
#include "tests/gpu/gpu_main.h"
#include "tests/support/random.h"
#include "tools/verify/mask_classes.h"
#include "tools/verify/numerics.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdio>
#include <string>

using namespace attune;
using namespace attune::test;

namespace {

constexpr int kEnoughForEveryClass = 512;

/// `masks`: how many classes of masks the family serves, each in as many types.
void check_family(Family family, const char* name, std::size_t masks, std::size_t types) {
  if (only_family != "all" && only_family != name) return;
  auto ran = verify::verify_numerics(
      {.seed = test_seed(), .cases = case_count, .device = kGpu, .families = {family}});
  if (!ran.ok()) FAIL(ran.failure().message);
  verify::NumericsReport& report = *ran;
  std::printf("%s", text_of(report).c_str());
  for (const std::string& failure : report.failures) FAIL_CHECK(failure);
  CHECK(report.cases == case_count);
  CHECK(report.kernels <= report.specs);  // merges share theirs with the family before
  if (case_count < kEnoughForEveryClass) return;
  report.coverage.erase("(merge)");
  CHECK(report.coverage.size() == masks);
  for (auto& [mask, families] : report.coverage) {
    CAPTURE(mask);
    CHECK(families[name].size() == types);
  }
}

}  // namespace

TEST_CASE("simt kernels are as exact as twice the plain implementation's error") {
  check_family(Family::simt, "simt", verify::mask_classes().size(), 3);
}

TEST_CASE("mma kernels are as exact as twice the plain implementation's error") {
  check_family(Family::mma, "mma", verify::mask_classes().size(), 2);
}

TEST_CASE("sm90 kernels are as exact as twice the plain implementation's error") {
  if (runtime::cuda_report().devices.at(0).sm != 90) return;  // these are for Hopper alone
  const auto served = std::ranges::count_if(verify::mask_classes(), [](const verify::MaskClass& mask) {
    return mask.keys == verify::Addressing::whole || mask.tensor != verify::WithTensor::always;
  });
  check_family(Family::sm90, "sm90", static_cast<std::size_t>(served), 2);
}
