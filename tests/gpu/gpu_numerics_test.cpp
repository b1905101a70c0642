// The GPU's kernels against float64, family by family, over random problems of the whole forward surface in
// poisoned surroundings, through the public API. --cases N draws N problems per family (default 512);
// --family simt|mma|sm90|all.
#define DOCTEST_CONFIG_IMPLEMENT
#include "runtime/cuda/cuda_backend.h"
#include "tests/support/random.h"
#include "tests/support/temp_dir.h"
#include "tools/verify/mask_classes.h"
#include "tools/verify/numerics.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

using namespace attune;

namespace {

constexpr Device kGpu{DeviceType::cuda, 0};
constexpr int kEnoughForEveryClass = 512;

int case_count = 512;
std::string only_family = "all";

/// `masks`: how many classes of masks the family serves, each in as many types.
void check_family(Family family, const char* name, std::size_t masks, std::size_t types) {
  if (only_family != "all" && only_family != name) return;
  auto ran = verify::verify_numerics(
      {.seed = test::test_seed(), .cases = case_count, .device = kGpu, .families = {family}});
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
    const bool pages = mask.keys == verify::Addressing::paged || mask.keys == verify::Addressing::paged_gappy;
    return !pages && mask.tensor != verify::WithTensor::always;
  });
  check_family(Family::sm90, "sm90", static_cast<std::size_t>(served), 2);
}

int main(int argc, char** argv) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::strcmp(argv[i], "--cases") == 0) case_count = std::max(1, std::atoi(argv[i + 1]));
    if (std::strcmp(argv[i], "--family") == 0) only_family = argv[i + 1];
  }
  if (only_family != "all" && only_family != "simt" && only_family != "mma" && only_family != "sm90") {
    std::fprintf(stderr, "--family %s: expected simt, mma, sm90 or all\n", only_family.c_str());
    return 2;
  }
  const runtime::CudaReport report = runtime::cuda_report();
  if (report.devices.empty()) {
    std::printf("[SKIP] no CUDA device: %s\n", report.driver_problem.c_str());
    return 77;
  }
  const test::TempDir cache;
  setenv("ATTUNE_CACHE_DIR", cache.path().c_str(), 1);
  return doctest::Context(argc, argv).run();
}
