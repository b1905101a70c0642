// The GPU's kernels against float64, family by family, over random problems in poisoned surroundings, through
// the public API. --cases N draws N problems per family (default 512); --family simt|mma|all.
#define DOCTEST_CONFIG_IMPLEMENT
#include "attune/attune.h"
#include "tests/support/cases.h"
#include "tests/support/cuda_copy.h"
#include "tests/support/random.h"
#include "tests/support/temp_dir.h"
#include "tools/parallel.h"

#include <doctest/doctest.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

using namespace attune;
using namespace attune::test;

namespace {

constexpr Device kGpu{DeviceType::cuda, 0};
constexpr std::size_t kArenaAlignment = 256;

int case_count = 512;
std::string only_family = "all";

/// A case's five tensors in the GPU's memory, poisoned surroundings included.
class OnGpu {
 public:
  OnGpu(const AttentionCase& one, std::byte* arena) : one_(one) {
    for (const GuardedTensor* tensor : {&one.query, &one.key, &one.value, &one.output, &one.lse}) {
      storages_.push_back(arena);
      arena += round_up(tensor->storage().size());
    }
  }

  static std::size_t bytes(const AttentionCase& one) {
    std::size_t sum = 0;
    for (const GuardedTensor* tensor : {&one.query, &one.key, &one.value, &one.output, &one.lse}) {
      sum += round_up(tensor->storage().size());
    }
    return sum;
  }

  void prepare(Family family) const {
    attune::prepare(query(), key(), value(), one_.with_lse, one_.bias, options(family));
  }

  void upload() const {
    for_each([](std::span<std::byte> host, std::byte* gpu) { copy_to_gpu(gpu, host); });
  }
  void run(Family family) const {
    const MutableTensorView lse = one_.lse.view_in(storages_[4], kGpu);
    memory_efficient_attention_forward(query(), key(), value(), one_.output.view_in(storages_[3], kGpu),
                                       one_.with_lse ? &lse : nullptr, one_.bias, options(family));
  }
  void download() const {
    for_each([](std::span<std::byte> host, std::byte* gpu) { copy_from_gpu(host, gpu); });
  }

 private:
  static std::size_t round_up(std::size_t bytes) {
    return (bytes + kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment;
  }
  TensorView query() const { return one_.query.view_in(storages_[0], kGpu); }
  TensorView key() const { return one_.key.view_in(storages_[1], kGpu); }
  TensorView value() const { return one_.value.view_in(storages_[2], kGpu); }
  AttentionOptions options(Family family) const { return {.scale = one_.scale, .family = family}; }

  template <typename Copy>
  void for_each(Copy&& copy) const {
    std::size_t at = 0;
    for (const GuardedTensor* tensor : {&one_.query, &one_.key, &one_.value, &one_.output, &one_.lse}) {
      copy(tensor->storage(), storages_[at++]);
    }
  }

  const AttentionCase& one_;
  std::vector<std::byte*> storages_;
};

void check_family(Family family, const char* prefix, std::span<const DType> dtypes, std::uint64_t stream) {
  Random random(test_seed(), stream);
  const auto classes = random_classes(random, std::min(256, (case_count + 1) / 2), dtypes);
  const auto cases = random_cases(random, classes, case_count);
  std::size_t arena_bytes = 0;
  for (const AttentionCase& one : cases) arena_bytes = std::max(arena_bytes, OnGpu::bytes(one));
  const Tensor memory(DType::f32, kGpu, {static_cast<std::int64_t>(arena_bytes / sizeof(float))});
  auto* arena = static_cast<std::byte*>(memory.data());

  // Equal classes may differ in alignment by luck, so each case is asked; the second time costs a look-up.
  tools::parallel_for(cases.size(), tools::default_jobs(), [&](std::size_t i) {
    REQUIRE(use_gpu() == "");
    OnGpu(cases[i], arena).prepare(family);
  });
  const std::uint64_t compiled = counters().compiles;

  for (const AttentionCase& one : cases) {
    CAPTURE(one.name);
    const std::uint64_t launches = counters().launches;
    const OnGpu gpu(one, arena);
    gpu.upload();
    gpu.run(family);
    gpu.download();
    CHECK(counters().launches == launches + (one.empty() ? 0 : 1));
    if (!one.empty()) REQUIRE(last_kernel().starts_with(prefix));
  }
  CHECK(counters().compiles == compiled);

  for (const std::string& failure : failures_of(cases)) FAIL_CHECK(failure);
  std::printf("%s: %d cases, %llu kernels compiled so far\n", prefix, case_count,
              static_cast<unsigned long long>(compiled));
}

bool wanted(const char* family) {
  return only_family == "all" || only_family == family;
}

}  // namespace

TEST_CASE("simt kernels are as exact as twice the plain implementation's error") {
  const DType dtypes[] = {DType::f32, DType::f16, DType::bf16};
  if (wanted("simt")) check_family(Family::simt, "simt_", dtypes, 1);
}

TEST_CASE("mma kernels are as exact as twice the plain implementation's error") {
  const DType dtypes[] = {DType::f16, DType::bf16};
  if (wanted("mma")) check_family(Family::mma, "mma_", dtypes, 2);
}

int main(int argc, char** argv) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::strcmp(argv[i], "--cases") == 0) case_count = std::max(1, std::atoi(argv[i + 1]));
    if (std::strcmp(argv[i], "--family") == 0) only_family = argv[i + 1];
  }
  if (only_family != "all" && only_family != "simt" && only_family != "mma") {
    std::fprintf(stderr, "--family %s: expected simt, mma or all\n", only_family.c_str());
    return 2;
  }
  if (const std::string problem = use_gpu(); !problem.empty()) {
    std::printf("[SKIP] no CUDA device: %s\n", problem.c_str());
    return 77;
  }
  const TempDir cache;
  setenv("ATTUNE_CACHE_DIR", cache.path().c_str(), 1);
  return doctest::Context(argc, argv).run();
}
