// The CPU backend: loading without LLVM, what it refuses, and the thread pool.
#include "runtime/cpu/cpu_backend.h"

#include "codegen/choose.h"
#include "runtime/cpu/thread_pool.h"

#include <doctest/doctest.h>

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

using namespace attune;
using namespace attune::runtime;

namespace {

Backend& backend() {
  const auto result = cpu_backend();
  REQUIRE(result.ok());
  return **result;
}

codegen::Unit unit_of(int head_dim) {
  const codegen::Problem problem{.head_dim = head_dim, .head_dim_v = head_dim};
  const auto choice = codegen::choose(problem, backend().arch());
  REQUIRE(choice.ok());
  return codegen::make_unit(choice->spec, backend().arch(), *backend().compiler(), codegen::embedded_files());
}

/// Compiles in a child process, so that this one stays without LLVM.
std::vector<std::byte> compile_elsewhere(const codegen::Unit& unit) {
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const auto image = clang_compile(unit);
    const bool sent = image.ok() && write(ends[1], image->bytes.data(), image->bytes.size()) ==
                                        static_cast<ssize_t>(image->bytes.size());
    _exit(sent ? 0 : 1);
  }
  close(ends[1]);
  std::vector<std::byte> image;
  std::byte buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;)
    image.insert(image.end(), buffer, buffer + n);
  close(ends[0]);
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  REQUIRE(status == 0);
  return image;
}

/// Dense tensors of one head, whose rows are all alike: attention returns the value row.
struct Example {
  static constexpr int kLength = 200;
  explicit Example(int dim)
      : head_dim(dim), query(kLength * dim, 0.5f), key(query), value(query), output(kLength * dim, -1.0f) {
    for (int i = 0; i < kLength * dim; ++i) value[i] = static_cast<float>(i % dim);
  }
  kernel::ForwardParams params() {
    kernel::ForwardParams p;
    p.query = query.data();
    p.key = key.data();
    p.value = value.data();
    p.output = output.data();
    p.query_strides = p.key_strides = p.value_strides = p.output_strides = {0, head_dim, head_dim};
    p.batch = p.groups = p.heads = 1;
    p.len_q = p.len_k = kLength;
    p.reach = kernel::make_reach(kernel::Anchor::top_left, -1, -1);
    p.window = kernel::window_of(p.reach, kLength, kLength);
    return p;
  }
  bool right() const {
    for (int i = 0; i < kLength * head_dim; ++i) {
      if (std::abs(output[i] - value[i]) > 1e-4f) return false;
    }
    return true;
  }

  int head_dim;
  std::vector<float> query, key, value, output;
};

class CountTasks final : public TaskRunner {
 public:
  explicit CountTasks(int count) : runs(count) {}
  void run_task(std::int64_t index, void* scratch) const noexcept override {
    ++runs[index];
    if (reinterpret_cast<std::uintptr_t>(scratch) % 64 != 0) ++misaligned;
    std::memset(scratch, static_cast<int>(index), kScratch);
  }
  bool each_ran_once() const {
    return misaligned == 0 && std::ranges::all_of(runs, [](const auto& n) { return n == 1; });
  }

  static constexpr std::size_t kScratch = 1000;
  mutable std::vector<std::atomic<int>> runs;
  mutable std::atomic<int> misaligned{0};
};

bool pool_works(ThreadPool& pool, int count) {
  CountTasks tasks(count);
  return pool.run(tasks, count, CountTasks::kScratch).ok() && tasks.each_ran_once();
}

}  // namespace

TEST_CASE("an image loads and runs without LLVM") {  // stands first: later cases may load the plugin
  REQUIRE_FALSE(cpu_plugin_loaded());
  std::vector<std::unique_ptr<Kernel>> kernels;
  for (const int head_dim : {8, 21, 64}) {  // together: each must be its own library
    const codegen::Unit unit = unit_of(head_dim);
    auto kernel = backend().load(compile_elsewhere(unit), unit.spec);
    REQUIRE(kernel.ok());
    kernels.push_back(std::move(kernel).value());
    Example example(head_dim);
    CHECK(kernels.back()->forward(example.params(), nullptr).ok());
    CHECK(example.right());
  }
  CHECK_FALSE(cpu_plugin_loaded());
}

TEST_CASE("what is no kernel is rejected") {
  const auto refusal = [&](std::span<const std::byte> image) {
    const auto kernel = backend().load(image, unit_of(8).spec);
    REQUIRE_FALSE(kernel.ok());
    CHECK(kernel.failure().kind == ErrorKind::invalid_argument);
    return kernel.failure().message;
  };
  const std::vector<std::byte> noise(5000, std::byte{0x5a});
  CHECK(refusal(noise).starts_with("cannot load a CPU kernel of 5000 bytes"));
  CHECK(refusal({}).starts_with("cannot load a CPU kernel of 0 bytes"));

  codegen::Unit other = unit_of(8);
  other.source = "extern \"C\" void other() {}";
  CHECK(refusal(compile_elsewhere(other)).find("lacks attune_kernel") != std::string::npos);
}

TEST_CASE("a forked child computes") {
  const codegen::Unit unit = unit_of(64);
  const auto kernel = backend().load(compile_elsewhere(unit), unit.spec);
  REQUIRE(kernel.ok());
  Example example(64);
  REQUIRE((*kernel)->forward(example.params(), nullptr).ok());  // helpers run in the parent now
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(60);  // a hang is a failure
    Example own(64);
    _exit((*kernel)->forward(own.params(), nullptr).ok() && own.right() ? 0 : 1);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
}

TEST_CASE("the pool runs every task once") {
  for (const int threads : {1, 2, 5}) {
    auto& pool = *new ThreadPool(threads);  // outlives its helpers
    for (const int count : {0, 1, 2, 1000}) CHECK(pool_works(pool, count));
  }
}

TEST_CASE("callers may share the pool") {
  auto& pool = *new ThreadPool(3);
  std::atomic<int> right{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 6; ++i) {
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) right += pool_works(pool, 1 + round % 7);
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(right == 6 * 200);
}

TEST_CASE("memory that cannot be had is an environment failure") {
  ThreadPool pool(1);
  const CountTasks tasks(1);
  const auto result = pool.run(tasks, 1, std::size_t{1} << 60);
  REQUIRE_FALSE(result.ok());
  CHECK(result.failure().kind == ErrorKind::environment);
  CHECK(result.failure().message.starts_with("out of memory"));
}

TEST_CASE("the report and the backend agree") {
  const CpuReport report = cpu_report();
  CHECK(report.isa == backend().arch().isa);
  CHECK(report.isa_problem.empty());
  CHECK(report.plugin_problem.empty());
  CHECK(report.plugin_version == backend().compiler()->name);
  CHECK(std::ranges::find(report.plugin_tried, report.plugin_path) != report.plugin_tried.end());
  CHECK(backend().description().starts_with(backend().arch().target));
}
