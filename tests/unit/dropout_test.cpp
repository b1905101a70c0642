// CPU kernels drop exactly the pairs that dropout_keeps drops. tests/gpu has the same for GPU kernels.
#define DOCTEST_CONFIG_IMPLEMENT
#include "tests/support/kept_pairs.h"
#include "tests/support/temp_dir.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>

using namespace attune;
using namespace attune::test;

TEST_CASE("CPU kernels drop the pairs that the definition drops") {
  CHECK(wrong_dropout({}, Family::cpu, {DType::f32, DType::f16, DType::bf16}) == "");
}

TEST_CASE("the comparison sees a wrong pair") {
  verify::Arena arena{Device{}};
  DropoutProblem problem{.len_q = 8, .len_k = 64, .p = 0.5, .state = {.seed = 1}};
  const std::vector<bool> once = kept_pairs(problem, {}, arena);
  CHECK(once == kept_pairs(problem, {}, arena));
  problem.state.offset = 1;
  CHECK(once != kept_pairs(problem, {}, arena));
  problem.p = 0;
  CHECK(std::ranges::count(kept_pairs(problem, {}, arena), false) == 0);
  problem.p = 1;
  CHECK(std::ranges::count(kept_pairs(problem, {}, arena), true) == 0);
}

int main(int argc, char** argv) {
  const TempDir cache;
  setenv("ATTUNE_CACHE_DIR", cache.path().c_str(), 1);
  return doctest::Context(argc, argv).run();
}
