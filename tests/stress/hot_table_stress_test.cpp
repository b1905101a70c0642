// Many threads on the hot path's table while it grows: whoever finds something finds the right kernel, the
// same as everybody else. tools/test.sh tsan runs it under ThreadSanitizer.
#include "runtime/hot_table.h"
#include "tests/support/random.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <latch>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace attune::runtime {
namespace {

using test::Random;

constexpr int kThreads = 32;
constexpr int kProblems = 3000;  // so that the table of 256 slots grows five times

codegen::Problem problem_of(int number) {
  return {.head_dim = 1 + number % 512, .head_dim_v = 1 + number / 512};
}

std::unique_ptr<ReadyKernel> ready_of(int number) {
  return std::make_unique<ReadyKernel>(ReadyKernel{problem_of(number), nullptr, std::to_string(number)});
}

/// What every thread has got for each problem; the first to get one says which it is.
using Kernels = std::vector<std::atomic<const ReadyKernel*>>;

/// The number of look-ups that went wrong.
int work(HotTable& table, Kernels& kernels, Random random, int rounds) {
  int wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    const int number = random.integer(0, kProblems - 1);
    auto& known = kernels[static_cast<std::size_t>(number)];
    const ReadyKernel* before = known.load();
    const ReadyKernel* ready = table.find(problem_of(number));
    if (ready == nullptr && before != nullptr) ++wrong;  // what was there once stays
    if (ready == nullptr) ready = table.insert(ready_of(number));
    if (!(ready->problem == problem_of(number)) || ready->name != std::to_string(number)) ++wrong;
    const ReadyKernel* nobody = nullptr;
    if (!known.compare_exchange_strong(nobody, ready) && nobody != ready) ++wrong;
  }
  return wrong;
}

TEST_CASE("32 threads find and insert in one table") {
  const std::uint64_t seed = test::test_seed();
  HotTable table;
  Kernels kernels(kProblems);
  std::array<int, kThreads> wrong{};
  {
    std::latch start(kThreads);
    std::vector<std::jthread> threads;
    for (std::size_t t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        start.arrive_and_wait();
        wrong[t] = work(table, kernels, Random(seed, t), 5000);
      });
    }
  }
  CHECK(std::ranges::count(wrong, 0) == kThreads);
  for (int number = 0; number < kProblems; ++number) {
    CHECK(table.find(problem_of(number)) == kernels[static_cast<std::size_t>(number)]);
  }
}

}  // namespace
}  // namespace attune::runtime
