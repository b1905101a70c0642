// Calls on many streams and threads, in several contexts, captured into graphs, and after a fork: they give
// the results of plain calls or say why they don't.
#include "runtime/check.h"
#include "runtime/cuda/cuda_backend.h"
#include "tests/gpu/driver_objects.h"
#include "tests/gpu/gpu_main.h"
#include "tests/support/random.h"
#include "tools/reference/judge.h"
#include "tools/reference/plain.h"
#include "tools/verify/guarded_tensor.h"

#include <doctest/doctest.h>

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

using namespace attune;
using namespace attune::test;
namespace fs = std::filesystem;

namespace {

using Shape = std::vector<std::int64_t>;

/// Contiguous, on the GPU, full of NaNs at first.
class GpuTensor {
 public:
  GpuTensor(DType dtype, const Shape& shape) : shape_(shape), tensor_(dtype, kGpu, shape) { poison(); }

  MutableTensorView view() const { return tensor_.view(); }

  void write(const verify::GuardedTensor& host) {
    runtime::take(runtime::cuda_copy_to_device(0, tensor_.data(), host.view().data, size()));
  }
  void poison() {
    const std::vector<std::byte> nan(size(), std::byte{0xff});
    runtime::take(runtime::cuda_copy_to_device(0, tensor_.data(), nan.data(), size()));
  }
  /// Once all work of the device is done.
  std::vector<std::byte> bytes() const {
    std::vector<std::byte> copy(size());
    runtime::take(runtime::cuda_copy_to_host(0, copy.data(), tensor_.data(), size()));
    return copy;
  }
  std::vector<double> values() const {
    const std::vector<std::byte> copy = bytes();
    TensorView view = tensor_.view();
    view.data = copy.data();
    verify::GuardedTensor host(view.dtype, shape_, {});
    host.assign(view);
    return host.values();
  }

 private:
  std::size_t size() const {
    return std::accumulate(shape_.begin(), shape_.end(), static_cast<std::size_t>(item_bytes(view().dtype)),
                           std::multiplies<>());
  }

  Shape shape_;
  Tensor tensor_;
};

/// What an example is, as far as kernels differ.
struct Kind {
  Family family;
  DType dtype;
  int head_dim;
  bool causal;
  bool deterministic;  // in its backward pass: all families but sm90 have kernels for that
};

std::vector<Kind> kinds() {
  std::vector<Kind> all{{Family::simt, DType::f32, 32, false, true},
                        {Family::mma, DType::f16, 64, true, true},
                        {Family::mma, DType::bf16, 96, false, true}};
  if (runtime::cuda_report().devices.at(0).sm != 90) return all;
  all.push_back({Family::sm90, DType::bf16, 64, true, false});
  all.push_back({Family::sm90, DType::f16, 128, false, false});
  return all;
}

struct Extents {
  int batch, len_q, len_k, heads;
};
constexpr Extents kSmall{2, 200, 333, 3};    // for the reference
constexpr Extents kLarge{2, 1200, 1200, 8};  // more tiles than an H200 has multiprocessors

/// A problem with inputs on the GPU and in host memory, and the results of one forward and one backward call.
class Example {
 public:
  struct Results {
    GpuTensor output, lse, grad_query, grad_key, grad_value;

    explicit Results(const Example& example)
        : output(example.kind_.dtype, example.query_shape()),
          lse(DType::f32, {example.size_.batch, example.size_.heads, example.size_.len_q}),
          grad_query(example.kind_.dtype, example.query_shape()),
          grad_key(example.kind_.dtype, example.key_shape()),
          grad_value(example.kind_.dtype, example.key_shape()) {}

    void poison() {
      for (GpuTensor* tensor : {&output, &lse, &grad_query, &grad_key, &grad_value}) tensor->poison();
    }
  };

  Example(const Kind& kind, const Extents& size, Random& random)
      : kind_(kind),
        size_(size),
        query_(kind.dtype, query_shape()),
        key_(kind.dtype, key_shape()),
        value_(kind.dtype, key_shape()),
        grad_output_(kind.dtype, query_shape()) {
    if (kind.causal) bias_ = LowerTriangularMask{};
    draw(random);
  }

  /// New inputs in the place of the old.
  void draw(Random& random) {
    for (Input* input : {&query_, &key_, &value_, &grad_output_}) {
      input->host.fill([&] { return static_cast<float>(random.normal()); });
      input->gpu.write(input->host);
    }
  }

  void forward(const Results& to, CUstream stream) const {
    const MutableTensorView lse = to.lse.view();
    memory_efficient_attention_forward(query_.gpu.view(), key_.gpu.view(), value_.gpu.view(),
                                       to.output.view(), &lse, bias_, options(stream));
  }

  void both(const Results& to, CUstream stream) const {
    forward(to, stream);
    const MutableTensorView query = to.grad_query.view(), key = to.grad_key.view(),
                            value = to.grad_value.view();
    memory_efficient_attention_backward(grad_output_.gpu.view(), to.output.view(), to.lse.view(),
                                        query_.gpu.view(), key_.gpu.view(), value_.gpu.view(),
                                        {&query, &key, &value}, bias_, options(stream),
                                        {.deterministic = kind_.deterministic});
  }

  /// The forward call for an engine of the caller's.
  runtime::Call call(const Results& to, CUstream stream) const {
    const TensorView query = query_.gpu.view(), key = key_.gpu.view(), value = value_.gpu.view();
    const MutableTensorView output = to.output.view(), lse = to.lse.view();
    return runtime::take(
        runtime::check({query, key, value, &output, &lse, /*with_lse=*/true, bias_, options(stream)}));
  }

  /// "" or the first result whose bits differ. Those of a sum in no fixed order do.
  std::string differ(const Results& a, const Results& b) const {
    if (a.output.bytes() != b.output.bytes()) return "output";
    if (a.lse.bytes() != b.lse.bytes()) return "lse";
    if (a.grad_key.bytes() != b.grad_key.bytes()) return "grad_key";
    if (a.grad_value.bytes() != b.grad_value.bytes()) return "grad_value";
    if (kind_.deterministic && a.grad_query.bytes() != b.grad_query.bytes()) return "grad_query";
    return "";
  }

  void check_forward(const Results& results) const {
    const auto judged = reference::judge(inputs(), reference::reference_attention(inputs()),
                                         results.output.values(), results.lse.values());
    CHECK_MESSAGE(judged.output.ok, judged.output.text());
    CHECK_MESSAGE(judged.lse.ok, judged.lse.text());
  }

  void check_all(const Results& results) const {
    check_forward(results);
    const reference::BackwardInputs backward{
        inputs(), grad_output_.host.values(), {}, results.output.values()};
    const auto right = reference::reference_backward(backward), plain = reference::plain_backward(backward);
    const auto check = [](const reference::Gradient& ours, const reference::Gradient& reference,
                          const GpuTensor& gradient) {
      const auto judged = reference::judge(ours, reference, gradient.values());
      CHECK_MESSAGE(judged.ok, judged.text());
    };
    check(plain.query, right.query, results.grad_query);
    check(plain.key, right.key, results.grad_key);
    check(plain.value, right.value, results.grad_value);
  }

 private:
  struct Input {
    Input(DType dtype, const Shape& shape) : host(dtype, shape, {}), gpu(dtype, shape) {}
    verify::GuardedTensor host;
    GpuTensor gpu;
  };

  Shape query_shape() const { return {size_.batch, size_.len_q, size_.heads, kind_.head_dim}; }
  Shape key_shape() const { return {size_.batch, size_.len_k, size_.heads, kind_.head_dim}; }
  AttentionOptions options(CUstream stream) const { return {.stream = stream, .families = {kind_.family}}; }
  reference::Inputs inputs() const {
    return {query_.host.view(), key_.host.view(), value_.host.view(), bias_};
  }

  Kind kind_;
  Extents size_;
  AttentionBias bias_;
  Input query_, key_, value_, grad_output_;
};

std::vector<std::unique_ptr<Example>> examples(const Extents& size) {
  std::vector<std::unique_ptr<Example>> made;
  Random random(test_seed());
  for (const Kind& kind : kinds()) made.push_back(std::make_unique<Example>(kind, size, random));
  return made;
}

/// Kernels in the cache of this program.
std::uint64_t cached_kernels() {
  const fs::path objects = fs::path(std::getenv("ATTUNE_CACHE_DIR")) / "v1" / "objects";
  if (!fs::exists(objects)) return 0;
  const auto is_file = [](const fs::directory_entry& entry) { return entry.is_regular_file(); };
  return static_cast<std::uint64_t>(
      std::ranges::count_if(fs::recursive_directory_iterator(objects), is_file));
}

/// One that no other test uses, and so is not loaded.
Kind cold_kind(int head_dim) {
  return {Family::mma, DType::f16, head_dim, false, true};
}

}  // namespace

TEST_CASE("8 threads on 8 streams, from an empty cache, compute the bits of one thread on one stream") {
  constexpr int kThreads = 8, kRounds = 4;
  const PrimaryContext context;
  const auto made = examples(kLarge);
  std::array<Stream, 8> streams;
  std::vector<std::vector<std::unique_ptr<Example::Results>>> results(kThreads * kRounds);
  for (auto& of_round : results) {
    for (const auto& example : made) of_round.push_back(std::make_unique<Example::Results>(*example));
  }
  const Counters before = counters();
  const std::uint64_t cached = cached_kernels();
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < kRounds; ++round) {
        const auto& to = results[static_cast<std::size_t>(t * kRounds + round)];
        for (std::size_t i = 0; i < made.size(); ++i) {
          const std::size_t example = (i + static_cast<std::size_t>(t)) % made.size();  // threads meet others
          made[example]->both(*to[example], streams[(t + 3 * round + 5 * i) % streams.size()].get());
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const Counters after = counters();
  CHECK(after.compiles - before.compiles == cached_kernels() - cached);  // each once
  CHECK(after.loads - before.loads == after.compiles - before.compiles);

  for (std::size_t i = 0; i < made.size(); ++i) {
    CAPTURE(i);
    Example::Results alone(*made[i]);
    made[i]->both(alone, streams[0].get());
    for (const auto& of_round : results) CHECK(made[i]->differ(alone, *of_round[i]) == "");
  }
  CHECK(counters().compiles == after.compiles);
}

TEST_CASE("a warmed call is captured, and replays with whatever its inputs are then") {
  const PrimaryContext context;
  const Stream stream;
  Random random(test_seed(), 1);
  for (const auto& example : examples(kSmall)) {
    Example::Results eager(*example), replayed(*example);
    example->both(eager, stream.get());
    stream.wait();
    const Graph graph = stream.capture([&] { example->both(replayed, stream.get()); });
    for (int replay = 0; replay < 2; ++replay) {
      example->draw(random);
      replayed.poison();
      graph.launch(stream.get());
      example->both(eager, stream.get());
      stream.wait();
      example->check_all(replayed);
      CHECK(example->differ(eager, replayed) == "");
    }
  }
}

TEST_CASE("a call whose kernel is not loaded refuses to be captured, and leaves the capture as it was") {
  const PrimaryContext context;
  const Stream stream;
  Random random(test_seed(), 2);
  const Example warm(kinds().front(), kSmall, random), cold(cold_kind(40), kSmall, random);
  Example::Results of_warm(warm), of_cold(cold);
  warm.forward(of_warm, stream.get());
  stream.wait();
  of_warm.poison();
  const Graph graph = stream.capture([&] {
    CHECK_THROWS_WITH(cold.forward(of_cold, stream.get()), doctest::Contains("call prepare()"));
    warm.forward(of_warm, stream.get());
  });
  graph.launch(stream.get());
  cold.forward(of_cold, stream.get());  // no failure is kept
  stream.wait();
  warm.check_forward(of_warm);
  cold.check_forward(of_cold);
}

TEST_CASE("where it is allowed, a kernel is compiled and loaded in the middle of a capture") {
  const PrimaryContext context;
  const Stream stream;
  Random random(test_seed(), 3);
  const Example cold(cold_kind(48), kSmall, random);
  Example::Results results(cold);
  runtime::EngineOptions options = runtime::take(runtime::EngineOptions::from_environment());
  options.capture = runtime::CaptureMode::compile;
  const auto engine = runtime::take(runtime::Engine::create(options));
  const runtime::Call call = cold.call(results, stream.get());
  const Graph graph = stream.capture([&] { runtime::take(engine->run(call)); });
  CHECK(engine->counters().compiles == 1);
  for (int replay = 0; replay < 2; ++replay) {
    results.poison();
    graph.launch(stream.get());
    stream.wait();
    cold.check_forward(results);
  }
}

TEST_CASE("kernels run in every context, those of destroyed ones' addresses included") {
  for (int round = 0; round < 3; ++round) {
    CAPTURE(round);
    const Context context;
    const Stream stream;
    for (const auto& example : examples(kSmall)) {
      Example::Results results(*example);
      example->both(results, stream.get());
      stream.wait();
      example->check_all(results);
    }
  }
}

TEST_CASE("a process that is forked after use refuses the GPU and says why; its parent goes on") {
  Random random(test_seed(), 4);
  const PrimaryContext context;
  const Example warm(kinds().back(), kSmall, random), cold(cold_kind(56), kSmall, random);
  Example::Results of_warm(warm), of_cold(cold);
  warm.both(of_warm, nullptr);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(60);  // a hang is a failure
    const auto refuses = [](const Example& example, const Example::Results& to) {
      try {
        example.forward(to, nullptr);
      } catch (const Error& error) {
        return error.kind() == ErrorKind::environment &&
               std::string(error.what()).find("forked from one that had used CUDA") != std::string::npos;
      }
      return false;
    };
    _exit(refuses(warm, of_warm) && refuses(cold, of_cold) ? 0 : 1);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  warm.both(of_warm, nullptr);
  cold.both(of_cold, nullptr);
  warm.check_all(of_warm);
  cold.check_all(of_cold);
}
