// The CPU's kernels against float64, over random problems in poisoned surroundings, through the public API.
#define DOCTEST_CONFIG_IMPLEMENT
#include "attune/attune.h"
#include "tests/support/cases.h"
#include "tests/support/random.h"
#include "tests/support/temp_dir.h"
#include "tools/parallel.h"

#include <doctest/doctest.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace attune;
using namespace attune::test;

namespace {

constexpr int kCases = 512;
constexpr int kClasses = 128;  // kernels to compile: the larger part of the test's time

AttentionOptions options_of(const AttentionCase& one) {
  return {.scale = one.scale};
}

void prepare_kernel(const AttentionCase& one) {
  prepare(one.query.view(), one.key.view(), one.value.view(), one.with_lse, one.bias, options_of(one));
}

void run(const AttentionCase& one) {
  const MutableTensorView lse = one.lse.view();
  memory_efficient_attention_forward(one.query.view(), one.key.view(), one.value.view(), one.output.view(),
                                     one.with_lse ? &lse : nullptr, one.bias, options_of(one));
}

}  // namespace

TEST_CASE("512 random problems are as exact as twice the plain implementation's error") {
  Random random(test_seed());
  const DType dtypes[] = {DType::f32, DType::f16, DType::bf16};
  const auto classes = random_classes(random, kClasses, dtypes);
  const auto cases = random_cases(random, classes, kCases);

  tools::parallel_for(kClasses, tools::default_jobs(), [&](std::size_t i) { prepare_kernel(cases[i]); });
  CHECK(counters().compiles == kClasses);

  std::uint64_t launches = 0;
  for (const AttentionCase& one : cases) {
    CAPTURE(one.name);
    run(one);
    if (one.empty()) continue;
    ++launches;
    REQUIRE(last_kernel().starts_with("cpu_"));
  }
  CHECK(counters().launches == launches);
  CHECK(counters().compiles == kClasses);  // no length, stride or alignment needs a kernel of its own

  for (const std::string& failure : failures_of(cases)) FAIL_CHECK(failure);
  std::printf("%d cases, %d kernels\n", kCases, kClasses);
}

int main(int argc, char** argv) {
#if !ATTUNE_HAVE_LLVM
  std::puts("[SKIP] built without LLVM: there is no compiler for CPU kernels");
  return 77;
#endif
  const TempDir cache;
  setenv("ATTUNE_CACHE_DIR", cache.path().c_str(), 1);
  return doctest::Context(argc, argv).run();
}
