// What calls ask the driver for: compiles once, launches with what kernels and devices take, nothing that
// waits or allocates once a call is hot, and captures, contexts and forks as documented.
#include "attune/attune_c.h"
#include "runtime/cuda/cuda_backend.h"
#include "runtime/raise.h"
#include "tests/driver/example.h"
#include "tests/driver/old_driver.h"
#include "tests/driver/stand_in.h"
#include "tests/gpu/driver_objects.h"
#include "tests/support/c_tensor.h"
#include "tests/unit/allocations.h"

#include <doctest/doctest.h>

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <thread>
#include <vector>

using namespace attune;
using namespace attune::test;
using stand_in::Launch;
using stand_in::Recording;

namespace {

constexpr int kWarming = 4;  // calls after which tensor maps of earlier tests have made room

using Counts = std::map<std::string, int>;

Counts counts(const Recording& recording) {
  Counts counted;
  for (const std::string& call : recording.calls()) ++counted[call];
  return counted;
}

bool is_sm90(const Kind& kind) {
  return kind.family == Family::sm90;
}

/// Kernels of a backward pass that wait in themselves for those before, where launches can say so.
int early_launches(const Kind& kind) {
  if (old_driver || kind.device.index != kHopper.index) return 0;
  return is_sm90(kind) ? 2 : kind.family == Family::mma ? 1 : 0;
}

/// What a call asks the driver for when its stream's context is current. A tile counter is the stream's.
Counts hot_calls(int launches, int early, bool counter) {
  Counts expected{{"cuCtxGetCurrent", launches}, {"cuLaunchKernel", launches - early}};
  if (early != 0) expected["cuLaunchKernelEx"] = early;
  if (!old_driver) expected["cuCtxGetId"] = launches;
  if (counter) expected["cuStreamIsCapturing"] = expected["cuStreamGetId"] = 1;
  return expected;
}

/// Kernels for Hopper need a driver that makes tensor maps.
std::vector<Kind> runnable() {
  std::vector<Kind> found = kinds();
  if (old_driver) std::erase_if(found, is_sm90);
  return found;
}

bool lies_within(const void* pointer, const Tensor& tensor, std::size_t bytes) {
  const auto offset =
      static_cast<const std::byte*>(pointer) - static_cast<const std::byte*>(tensor.view().data);
  return offset >= 0 && static_cast<std::size_t>(offset) < bytes;
}

}  // namespace

TEST_CASE("a call compiles and loads at its first use alone") {
  for (const Kind& kind : runnable()) {
    CAPTURE(std::string(kind.name));
    const Example example(kind);
    const Counters before = counters();
    for (int call = 1; call <= 3; ++call) {
      example.forward();
      CHECK(counters().loads == before.loads + 1);
      CHECK(counters().launches == before.launches + static_cast<std::uint64_t>(call));
    }
    CHECK(counters().compiles + counters().cache_hits == before.compiles + before.cache_hits + 1);
  }
}

TEST_CASE("threads that need the same kernels compile and load each once") {
  constexpr int kThreads = 6;
  std::vector<Example> examples;
  for (const int head_dim : {8, 16, 24}) {
    examples.emplace_back(Kind{"simt", Family::simt, DType::f32, head_dim});
  }
  runtime::EngineOptions options;  // no cache on disk
  const auto engine = runtime::take(runtime::Engine::create(options));
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 3; ++i) {
        runtime::take(engine->run(examples[static_cast<std::size_t>(t + i) % 3].forward_call()));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(engine->counters().compiles == 3);
  CHECK(engine->counters().loads == 3);
  CHECK(engine->counters().launches == 3 * kThreads);
}

TEST_CASE("a hot call launches, and neither waits nor allocates") {
  for (const Kind& kind : runnable()) {
    CAPTURE(std::string(kind.name));
    const PrimaryContext context(kind.device.index);
    const Example example(kind);
    const bool counter = is_sm90(kind) && kind.causal;
    for (int warming = 0; warming < kWarming; ++warming) {
      example.forward();
      example.backward();
    }
    {
      const Recording recording;
      example.forward();
      CHECK(counts(recording) == hot_calls(1, 0, counter));
    }
    {
      const Recording recording;
      example.backward();
      CHECK(counts(recording) == hot_calls(3, early_launches(kind), counter));
    }
    const long before = allocations();
    example.forward();
    example.backward();
    CHECK(allocations() == before);
  }
}

TEST_CASE("tensor maps are made once for the tensors of a thread's last calls") {
  if (old_driver) return;
  const Example one(kinds().back()), other(kinds().back());
  for (int warming = 0; warming < kWarming; ++warming) {
    one.forward();
    other.forward();
  }
  const Recording recording;
  one.forward();
  other.forward();
  std::thread([&] { one.forward(); }).join();
  CHECK(counts(recording)["cuTensorMapEncodeTiled"] == 4);  // the new thread's
}

TEST_CASE("a thread without a context launches in the device's, and leaves it again") {
  for (const Kind& kind : runnable()) {
    CAPTURE(std::string(kind.name));
    const Example example(kind);
    example.forward();
    const Recording recording;
    example.forward();
    CHECK(counts(recording)["cuCtxPushCurrent"] == 1);
    CHECK(stand_in::objects().entered_contexts == 0);
    CHECK(recording.launches().at(0).device == kind.device.index);
  }
}

TEST_CASE("a call's tensors are in the current context's device or not: it runs on its own") {
  const PrimaryContext other(kAmpere.index);
  const Example example(kinds().front());
  example.forward();
  const Recording recording;
  example.forward();
  CHECK(recording.launches().at(0).device == kHopper.index);
  CHECK(stand_in::objects().entered_contexts == 1);
}

TEST_CASE("kernels are told the call's tensors") {
  for (const Kind& kind : runnable()) {
    CAPTURE(std::string(kind.name));
    const Example example(kind);
    example.forward();
    const Recording recording;
    example.forward();
    const Launch launch = recording.launches().at(0);
    const auto told = is_sm90(kind) ? launch.told<kernel::ForwardSm90Params>().forward
                                    : launch.told<kernel::ForwardParams>();
    CHECK(told.query == example.query.view().data);
    CHECK(told.key == example.key.view().data);
    CHECK(told.value == example.value.view().data);
    CHECK(told.output == example.output.view().data);
    CHECK(told.lse == example.lse.view().data);
    CHECK(told.batch == Example::kBatch);
    CHECK(told.groups * told.heads == Example::kHeads);
    CHECK(told.len_q == Example::kLenQ);
    CHECK(told.len_k == Example::kLenK);
    CHECK(told.scale == doctest::Approx(1 / std::sqrt(kind.head_dim)));
  }
}

TEST_CASE("tensor maps describe the tensors") {
  if (old_driver) return;
  for (const Kind& kind : kinds()) {
    if (!is_sm90(kind)) continue;
    CAPTURE(std::string(kind.name));
    const Example example(kind);
    example.forward();
    const Recording recording;
    example.forward();
    const Launch launch = recording.launches().at(0);
    CHECK(launch.blocks <= static_cast<unsigned>(stand_in::hopper().multiprocessors));
    const auto told = launch.told<kernel::ForwardSm90Params>();
    const auto check = [&](const kernel::TensorMap& opaque, const Tensor& tensor, std::uint64_t rows) {
      const stand_in::TensorMap map = stand_in::tensor_map(&opaque);
      const auto dim = static_cast<std::uint64_t>(kind.head_dim);
      const std::uint64_t head = dim * 2, row = head * Example::kHeads;
      CHECK(map.data == tensor.view().data);
      CHECK(map.extents == std::array<std::uint64_t, 4>{dim, rows, Example::kHeads, Example::kBatch});
      CHECK(map.strides == std::array<std::uint64_t, 3>{row, head, row * rows});
      CHECK(map.box[0] == 64);
      CHECK(map.type ==
            (kind.dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16));
    };
    check(told.query, example.query, Example::kLenQ);
    check(told.key, example.key, Example::kLenK);
    check(told.value, example.value, Example::kLenK);
    check(told.output, example.output, Example::kLenQ);
  }
}

TEST_CASE("a driver that makes no tensor maps is told of before a kernel for Hopper is launched") {
  if (!old_driver) return;
  const Example example(kinds().back());
  CHECK_THROWS_WITH(example.forward(), doctest::Contains("makes no tensor maps"));
  CHECK_THROWS_WITH(example.backward(), doctest::Contains("makes no tensor maps"));
}

TEST_CASE("tensors that no tensor map describes go to another family") {
  if (old_driver) return;
  // Any family may run: sm90 for whole rows of 16 bytes, which the others don't need.
  const Tensor memory(DType::f16, kHopper, {2, 65, 3, 68});
  const auto kernel_of = [&](std::int64_t row_stride, std::int64_t first) {
    TensorView view(static_cast<const std::byte*>(memory.view().data) + 2 * first, DType::f16, {2, 64, 3, 64},
                    kHopper);
    view.strides = {64 * 3 * row_stride, 3 * row_stride, row_stride, 1};
    const Tensor output = memory_efficient_attention(view, view, view);
    return last_kernel();
  };
  CHECK(kernel_of(64, 0).starts_with("sm90"));
  CHECK(kernel_of(66, 0).starts_with("mma"));
  CHECK(kernel_of(64, 1).starts_with("mma"));
}

TEST_CASE("what a backward pass keeps between its kernels lies in the workspace that it asked for") {
  for (const Kind& kind : runnable()) {
    CAPTURE(std::string(kind.name));
    const Example example(kind);
    const std::size_t bytes = example.workspace_bytes();
    example.backward();
    const Recording recording;
    example.backward();
    for (const Launch& launch : recording.launches()) {
      const bool sm90 = launch.parameters.size() == sizeof(kernel::GradKeyValueSm90Params);
      const auto told = sm90 ? launch.told<kernel::GradKeyValueSm90Params>().backward
                             : launch.told<kernel::BackwardParams>();
      CHECK(told.grad_query == example.grad_query.view().data);
      CHECK(lies_within(told.lse2, example.workspace, bytes));
      CHECK(lies_within(told.delta, example.workspace, bytes));
      if (told.query_sums != nullptr) CHECK(lies_within(told.query_sums, example.workspace, bytes));
    }
  }
}

TEST_CASE("on Hopper the kernels behind delta are launched before it ends, as they wait themselves") {
  if (old_driver) return;
  const Example example({"sm90", Family::sm90, DType::bf16, 64});
  example.backward();
  const Recording recording;
  example.backward();
  std::vector<bool> early;
  for (const Launch& launch : recording.launches()) early.push_back(launch.begins_early);
  CHECK(early == std::vector<bool>{false, true, true});
}

TEST_CASE("blocks of a cluster share out the queries of a bias of one row, while multiprocessors are idle") {
  if (old_driver) return;
  const Example example({"sm90", Family::sm90, DType::bf16, 64});
  const auto gradient_of = [&](std::int64_t batch, std::int64_t heads, std::int64_t rows) {
    const Tensor bias(DType::bf16, kHopper, {batch, heads, rows, 336});
    TensorView keys = bias.view();  // rows are 16 bytes' multiples apart
    keys.shape[3] = Example::kLenK;
    const Recording recording;
    memory_efficient_attention_backward(example.grad_output.view(), example.output.view(), example.lse.view(),
                                        example.query.view(), example.key.view(), example.value.view(), keys,
                                        {.families = {Family::sm90}}, {.bias_gradient = true});
    return recording.launches().back();
  };
  const unsigned tiles = 3;  // of 128 keys
  const Launch shared = gradient_of(1, 1, 1);
  CHECK(shared.cluster == 8);
  CHECK(shared.blocks == 8 * tiles);
  CHECK(shared.told<kernel::GradBiasSm90Params>().slot_blocks == 8);
  const Launch own = gradient_of(1, 1, Example::kLenQ);
  CHECK(own.cluster == 1);
  CHECK(own.blocks == 2 * tiles);
  CHECK(own.told<kernel::GradBiasSm90Params>().slot_blocks == 1);
}

TEST_CASE("allocated results and workspaces are given back") {
  for (const Kind& kind : runnable()) {
    CAPTURE(std::string(kind.name));
    const Example example(kind);
    const auto both = [&] {
      const TensorView query = example.query.view(), key = example.key.view(), value = example.value.view();
      const AttentionOptions options{.families = {kind.family}};
      const Attention result =
          memory_efficient_attention_forward_requires_grad(query, key, value, {}, options);
      memory_efficient_attention_backward(example.grad_output.view(), result.output.view(), result.lse.view(),
                                          query, key, value, AttentionBias(), options);
    };
    both();
    const stand_in::Objects before = stand_in::objects();
    both();
    CHECK(stand_in::objects() == before);
  }
}

TEST_CASE("a call that the C ABI keeps launches what the C++ call does") {
  const Kind kind{"mma", Family::mma, DType::f16, 64};
  const Example example(kind);
  const attune_tensor query = c_tensor(example.query), key = c_tensor(example.key),
                      value = c_tensor(example.value), output = c_tensor(example.output),
                      lse = c_tensor(example.lse);
  attune_options options = ATTUNE_OPTIONS_INIT;
  options.families = 1u << ATTUNE_FAMILY_MMA;
  attune_forward_call* call = nullptr;
  REQUIRE(attune_forward_call_create(&query, &key, &value, &output, &lse, nullptr, &options, &call) ==
          ATTUNE_OK);
  attune_forward_memory memory = memory_of(query, key, value, output, lse);
  example.forward();
  const Recording recording;
  example.forward();
  CHECK(attune_forward_call_run(call, &memory) == ATTUNE_OK);
  attune_forward_call_destroy(call);
  const auto launches = recording.launches();
  REQUIRE(launches.size() == 2);
  CHECK(launches[0].blocks == launches[1].blocks);
  CHECK(launches[0].told<kernel::ForwardParams>().query == launches[1].told<kernel::ForwardParams>().query);
  CHECK(launches[0].told<kernel::ForwardParams>().lse == launches[1].told<kernel::ForwardParams>().lse);
}

TEST_CASE("a backward call that the C ABI keeps launches what the C++ call does") {
  const Example example({"mma", Family::mma, DType::f16, 64});
  const attune_tensor output = c_tensor(example.output), lse = c_tensor(example.lse),
                      query = c_tensor(example.query), key = c_tensor(example.key),
                      value = c_tensor(example.value), grad_query = c_tensor(example.grad_query),
                      grad_key = c_tensor(example.grad_key), grad_value = c_tensor(example.grad_value);
  attune_gradients gradients = ATTUNE_GRADIENTS_INIT;
  gradients.query = &grad_query;
  gradients.key = &grad_key;
  gradients.value = &grad_value;
  attune_options options = ATTUNE_OPTIONS_INIT;
  options.families = 1u << ATTUNE_FAMILY_MMA;
  attune_backward_call* call = nullptr;
  REQUIRE(attune_backward_call_create(&output, &output, &lse, &query, &key, &value, &gradients, nullptr,
                                      &options, nullptr, &call) == ATTUNE_OK);
  std::size_t bytes = 0;
  REQUIRE(attune_backward_call_workspace_bytes(call, &bytes) == ATTUNE_OK);
  CHECK(bytes == example.workspace_bytes());
  attune_backward_memory memory = ATTUNE_BACKWARD_MEMORY_INIT;
  memory.grad_output = memory.output = output.data;
  memory.lse = lse.data;
  memory.query = query.data;
  memory.key = key.data;
  memory.value = value.data;
  memory.grad_query = grad_query.data;
  memory.grad_key = grad_key.data;
  memory.grad_value = grad_value.data;
  memory.workspace = example.workspace.view().data;
  memory.workspace_bytes = bytes;
  example.backward();
  const Recording recording;
  example.backward();
  CHECK(attune_backward_call_run(call, &memory) == ATTUNE_OK);
  attune_backward_call_destroy(call);
  const auto launches = recording.launches();
  REQUIRE(launches.size() == 6);
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(launches[i].blocks == launches[i + 3].blocks);
    const auto one = launches[i].told<kernel::BackwardParams>();
    const auto other = launches[i + 3].told<kernel::BackwardParams>();
    CHECK(one.forward.query == other.forward.query);
    CHECK(one.grad_query == other.grad_query);
    CHECK(one.query_sums == other.query_sums);
  }
}

TEST_CASE("a warmed call is captured; one that is not refuses and leaves the capture as it was") {
  for (const Kind& kind : runnable()) {
    CAPTURE(std::string(kind.name));
    const PrimaryContext context(kind.device.index);
    const Stream stream;
    const Example warm(kind, stream.get());
    const Example cold({"cold", Family::simt, DType::f32, 40, kind.causal, kind.device}, stream.get());
    warm.forward();
    warm.backward();
    const Recording recording;
    const Graph graph = stream.capture([&] {
      warm.forward();
      warm.backward();
      CHECK_THROWS_WITH(cold.forward(), doctest::Contains("call prepare()"));
      CHECK_THROWS_WITH(cold.backward(), doctest::Contains("call prepare()"));
    });
    const auto captured = recording.launches();
    CHECK(captured.size() == 4);
    CHECK(std::ranges::all_of(captured, &Launch::captured));
    graph.launch(stream.get());
    CHECK(recording.launches().size() == 8);
  }
}

TEST_CASE("lists of lengths refuse a capture and leave it as it was, however many there were before") {
  const PrimaryContext context;
  const Stream stream;
  const Tensor tensor(DType::f32, kHopper, {1, 300, 2, 32}), output(DType::f32, kHopper, {1, 300, 2, 32});
  const auto attend = [&] {
    memory_efficient_attention_forward(tensor.view(), tensor.view(), tensor.view(), output.view(), nullptr,
                                       BlockDiagonalMask::from_seqlens({100, 150, 50}),
                                       {.stream = stream.get(), .families = {Family::simt}});
  };
  const std::size_t before = stand_in::objects().allocations;
  for (int call = 0; call < 200; ++call) {
    attend();
    CHECK(stand_in::objects().allocations < before + 150);  // given back, a bundle at a time
    const Graph graph =
        stream.capture([&] { CHECK_THROWS_WITH(attend(), doctest::Contains("is not on the GPU yet")); });
  }
}

TEST_CASE("another thread allocates and loads while a stream is captured in the mode that forbids the most") {
  const PrimaryContext context;
  const Stream stream;
  const Example example(kinds().front(), stream.get());
  example.forward();
  const Graph graph = stream.capture([&] {
    std::thread([&] {
      const Example cold({"cold", Family::simt, DType::f32, 56});
      cold.forward();
    }).join();
    example.forward();
  });
}

TEST_CASE("kernels run in contexts that a program makes, and in new ones at the addresses of old ones") {
  for (const Kind& kind : runnable()) {
    if (kind.device.index != 0) continue;
    CAPTURE(std::string(kind.name));
    for (int round = 0; round < 3; ++round) {
      const Context context;
      const Example example(kind);
      const Recording recording;
      example.forward();
      example.backward();
      CHECK(recording.launches().size() == 4);
    }
  }
}

TEST_CASE("a kernel is loaded once for each context, however many there are") {
  for (const Kind& kind : runnable()) {
    if (kind.device.index != 0) continue;
    CAPTURE(std::string(kind.name));
    for (int number = 0; number < 20; ++number) {
      CAPTURE(number);
      const Context context;
      const Example example(kind);
      example.forward();
      const std::size_t images = stand_in::objects().images;
      const Recording recording;
      example.forward();
      CHECK(recording.launches().size() == 1);
      const auto calls = recording.calls();
      CHECK(std::ranges::count(calls, "cuFuncSetAttribute") == 0);
      CHECK(stand_in::objects().images == images);
    }
  }
}

TEST_CASE("a process that is forked after use refuses and says why; its parent goes on") {
  const Example warm(kinds().front()), cold({"cold", Family::simt, DType::f32, 48});
  warm.forward();
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const auto refuses = [](const Example& example) {
      try {
        example.forward();
      } catch (const Error& error) {
        return error.kind() == ErrorKind::environment &&
               std::string(error.what()).find("forked from one that had used CUDA") != std::string::npos;
      }
      return false;
    };
    _exit(refuses(warm) && refuses(cold) ? 0 : 1);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  warm.forward();
  cold.forward();
}
