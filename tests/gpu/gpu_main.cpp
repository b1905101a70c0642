// Skipped without a GPU; in a cache of its own.
#define DOCTEST_CONFIG_IMPLEMENT
#include "tests/gpu/gpu_main.h"

#include "runtime/cuda/cuda_backend.h"
#include "tests/support/temp_dir.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace attune::test {

int case_count = 512;
std::string only_family = "all";

}  // namespace attune::test

using namespace attune;
using namespace attune::test;

int main(int argc, char** argv) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::strcmp(argv[i], "--cases") == 0) case_count = std::max(1, std::atoi(argv[i + 1]));
    if (std::strcmp(argv[i], "--family") == 0) only_family = argv[i + 1];
    if (std::strcmp(argv[i], "--seed") == 0) setenv("ATTUNE_TEST_SEED", argv[i + 1], 1);
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
  const TempDir cache;
  setenv("ATTUNE_CACHE_DIR", cache.path().c_str(), 1);
  return doctest::Context(argc, argv).run();
}
