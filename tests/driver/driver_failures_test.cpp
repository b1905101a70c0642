// Whatever the driver refuses in the middle of a call is told by that call, with the driver's words; nothing
// is left behind, no cached kernel suffers, and the next call works.
#include "runtime/cuda/cuda_backend.h"
#include "runtime/raise.h"
#include "tests/driver/example.h"
#include "tests/driver/old_driver.h"
#include "tests/driver/stand_in.h"
#include "tests/gpu/driver_objects.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using namespace attune;
using namespace attune::test;
using stand_in::Fault;
using stand_in::Lasting;
using stand_in::Objects;
using stand_in::Recording;

namespace {

using Engine = std::unique_ptr<runtime::Engine>;

/// Finds in the cache what the process's engine compiled, and has loaded nothing.
Engine cold_engine() {
  return runtime::take(runtime::Engine::create(runtime::take(runtime::EngineOptions::from_environment())));
}

/// Something that a program does.
struct Action {
  std::string name;
  std::function<std::function<void()>()> begin;  // what is needed before, and what is then done
  std::set<std::string> spared = {};             // entry points whose failure costs speed, and no call
  bool frees = false;                            // memory of the device
};

/// What releases something tells nobody, and leaves what the driver does not take back.
const std::set<std::string> kReleasing{"cuCtxPopCurrent", "cuMemFree", "cuMemFreeAsync",
                                       "cuThreadExchangeStreamCaptureMode"};

/// Memory is given back in its context.
const std::set<std::string> kEntering{"cuCtxGetCurrent", "cuCtxPushCurrent"};

/// Only how a context is told from later ones at its address.
const std::set<std::string> kIdentifying{"cuCtxGetId"};

/// What a stream's tile counter takes: tiles are strided where there is none.
const std::set<std::string> kCounting{"cuStreamGetId", "cuStreamIsCapturing", "cuMemAlloc",
                                      "cuMemsetD32Async"};

/// The action's own call of the driver that is to fail.
struct Chosen {
  std::string entry_point;
  int nth;
  Lasting lasting;
};

/// What an action keeps for the next of its kind: loaded images, a stream's counter.
struct Kept {
  std::size_t images = 0, allocations = 0;
  bool operator==(const Kept&) const = default;
};

Kept kept_since(const Objects& before) {
  const Objects now = stand_in::objects();
  return {now.images - before.images, now.allocations - before.allocations};
}

/// May the call be of those that give something back?
bool releases(const Action& action, const Chosen& chosen) {
  return kReleasing.contains(chosen.entry_point) || (action.frees && kEntering.contains(chosen.entry_point));
}

/// May the action succeed although that call failed?
bool spares(const Action& action, const Chosen& chosen) {
  const bool asked_again = chosen.entry_point == "cuCtxGetCurrent" && chosen.lasting == Lasting::once;
  return asked_again || releases(action, chosen) || action.spared.contains(chosen.entry_point) ||
         kIdentifying.contains(chosen.entry_point);
}

void check_failure(const Action& action, const Chosen& chosen, const Kept& kept) {
  CAPTURE(action.name);
  CAPTURE(chosen.entry_point);
  CAPTURE(chosen.nth);
  const bool lasts = chosen.lasting == Lasting::onwards;
  CAPTURE(lasts);
  const auto act = action.begin();
  const Objects before = stand_in::objects();
  std::string told;
  {
    const Fault fault(chosen.entry_point, CUDA_ERROR_OUT_OF_MEMORY, chosen.nth, chosen.lasting);
    try {
      act();
    } catch (const Error& error) {
      told = error.what();
      CHECK(error.kind() == ErrorKind::environment);
    }
    CHECK(fault.failures() > 0);
  }
  if (told.empty()) {
    CHECK(spares(action, chosen));
  } else {
    CHECK_MESSAGE(told.find(": CUDA_ERROR_OUT_OF_MEMORY (2): out of memory") != std::string::npos, told);
  }
  if (releases(action, chosen)) return;
  const Objects after = stand_in::objects();
  CHECK(after.events == before.events);
  CHECK(after.entered_contexts == before.entered_contexts);
  CHECK(after.capture_mode == before.capture_mode);
  act();
  CHECK(kept_since(before) == kept);
}

/// Lets each call that the action makes of the driver fail in turn, once and from then on.
void check_failures(const Action& action) {
  // In threads of their own, which have entered no context.
  std::vector<std::string> calls;
  Kept kept;
  std::thread([&] {
    const auto act = action.begin();
    const Objects before = stand_in::objects();
    const Recording recording;
    act();
    calls = recording.calls();
    kept = kept_since(before);
  }).join();
  REQUIRE(!calls.empty());
  for (std::size_t i = 0; i < calls.size(); ++i) {
    const auto nth = std::count(calls.begin(), calls.begin() + static_cast<std::ptrdiff_t>(i) + 1, calls[i]);
    for (const Lasting lasting : {Lasting::once, Lasting::onwards}) {
      std::thread([&] { check_failure(action, {calls[i], static_cast<int>(nth), lasting}, kept); }).join();
    }
  }
}

/// Kernels for Hopper need a driver that makes tensor maps.
std::vector<Kind> runnable() {
  std::vector<Kind> found = kinds();
  if (old_driver) std::erase_if(found, [](const Kind& kind) { return kind.family == Family::sm90; });
  return found;
}

std::function<std::function<void()>()> hot(std::function<void()> act) {
  return [act = std::move(act)] { return act; };
}

/// Runs `call` in an engine that has loaded nothing, and checks that its kernels came from the cache.
template <typename Call>
std::function<std::function<void()>()> first_use(Call call) {
  return [call] {
    const std::shared_ptr<runtime::Engine> engine = cold_engine();
    return [engine, call] {
      try {
        runtime::take(engine->run(call()));
      } catch (const Error&) {
        CHECK(engine->counters().compiles == 0);
        throw;
      }
      CHECK(engine->counters().compiles == 0);
      CHECK(engine->counters().cache_defects == 0);
    };
  };
}

}  // namespace

TEST_CASE("the first forward and backward call") {
  for (const Kind& kind : runnable()) {
    const Example example(kind);
    example.forward();
    example.backward();
    check_failures({std::string("first forward, ") + kind.name,
                    first_use([&] { return example.forward_call(); }), kCounting});
    check_failures({std::string("first backward, ") + kind.name,
                    first_use([&] { return example.backward_call(); }), kCounting});
  }
}

TEST_CASE("hot calls") {
  for (const Kind& kind : runnable()) {
    const Example example(kind);
    example.forward();
    example.backward();
    check_failures({std::string("forward, ") + kind.name, hot([&] { example.forward(); }), kCounting});
    check_failures({std::string("backward, ") + kind.name, hot([&] { example.backward(); }), kCounting});
  }
}

TEST_CASE("the first calls on a stream") {
  struct OnStream {
    explicit OnStream(const Kind& kind) : context(kind.device.index), example(kind, stream.get()) {}
    PrimaryContext context;
    Stream stream;
    Example example;
  };
  for (const Kind& kind : runnable()) {
    Example(kind).forward();
    Example(kind).backward();
    check_failures({std::string("on a stream, ") + kind.name,
                    [&] {
                      const auto made = std::make_shared<OnStream>(kind);
                      return [made] {
                        made->example.forward();
                        made->example.backward();
                      };
                    },
                    kCounting});
  }
}

TEST_CASE("calls that allocate their results and workspaces") {
  for (const Kind& kind : runnable()) {
    const Example example(kind);
    const auto allocate = [&] {
      const TensorView query = example.query.view(), key = example.key.view(), value = example.value.view();
      const AttentionOptions options{.families = {kind.family}};
      const Attention made = memory_efficient_attention_forward_requires_grad(query, key, value, {}, options);
      const Gradients gradients =
          memory_efficient_attention_backward(example.grad_output.view(), made.output.view(), made.lse.view(),
                                              query, key, value, AttentionBias(), options);
    };
    allocate();
    check_failures({.name = std::string("allocating, ") + kind.name, .begin = hot(allocate), .frees = true});
  }
}

TEST_CASE("calls that bring lists of lengths to the device") {
  const Tensor tensor(DType::f32, kHopper, {1, 300, 2, 32});
  const Tensor output(DType::f32, kHopper, {1, 300, 2, 32});
  std::vector<std::shared_ptr<const AttentionBias>> masks;  // whose lists stay on the device as long
  const Action action{
      .name = "packed sequences",
      .begin =
          [&] {
            const auto mask =
                std::make_shared<AttentionBias>(BlockDiagonalMask::from_seqlens({100, 150, 50}));
            masks.push_back(mask);
            return [&, mask] {
              memory_efficient_attention_forward(tensor.view(), tensor.view(), tensor.view(), output.view(),
                                                 nullptr, *mask, {.families = {Family::simt}});
            };
          },
      .frees = true};
  action.begin()();
  check_failures(action);
}

TEST_CASE("merges and their gradients") {
  const Tensor chunk(DType::f32, kHopper, {2, 30, 3, 16}), other(DType::f32, kHopper, {2, 30, 3, 16});
  const Tensor lse(DType::f32, kHopper, {2, 3, 30}), other_lse(DType::f32, kHopper, {2, 3, 30});
  const std::vector<TensorView> chunks{chunk.view(), other.view()}, numbers{lse.view(), other_lse.view()};
  const auto merge = [&] {
    const Attention merged = merge_attentions(chunks, numbers);
    merge_attentions_backward(merged.output.view(), nullptr, merged.output.view(), merged.lse.view(), chunks,
                              numbers);
  };
  merge();
  check_failures({.name = "merge", .begin = hot(merge), .frees = true});
}

TEST_CASE("copies") {
  const Tensor tensor(DType::f32, kHopper, {64});
  check_failures(
      {"copies", hot([&] {
         std::vector<float> host(64);
         runtime::take(runtime::cuda_copy_to_device(0, tensor.view().data, host.data(), 256));
         runtime::take(runtime::cuda_copy_on_device(0, tensor.view().data, tensor.view().data, 256, nullptr));
         runtime::take(runtime::cuda_copy_to_host(0, host.data(), tensor.view().data, 256));
       })});
}

TEST_CASE(
    "a cached image that the driver refuses is compiled once more, one that it cannot load now is not") {
  const Example example(kinds().front());
  example.forward();
  const std::string load = old_driver ? "cuModuleLoadData" : "cuLibraryLoadData";
  const auto run = [&](runtime::Engine& engine) { return engine.run(example.forward_call()); };
  {
    const Engine engine = cold_engine();
    const Fault fault(load, CUDA_ERROR_INVALID_IMAGE, 1, Lasting::once);
    CHECK(run(*engine).ok());
    CHECK(engine->counters().compiles == 1);
  }
  {
    const Engine engine = cold_engine();
    const Fault fault(load, CUDA_ERROR_INVALID_IMAGE);
    const auto refused = run(*engine);
    REQUIRE_FALSE(refused.ok());
    CHECK(refused.failure().kind == ErrorKind::environment);
    CHECK(refused.failure().message ==
          "driver 13.0 rejected a kernel image for sm_90a on Stand-in H200: CUDA_ERROR_INVALID_IMAGE (200): "
          "device kernel image is invalid");
    CHECK(engine->counters().compiles == 1);
  }
  {
    const Engine engine = cold_engine();
    const Fault fault(load, CUDA_ERROR_ILLEGAL_ADDRESS);
    const auto failed = run(*engine);
    REQUIRE_FALSE(failed.ok());
    CHECK(failed.failure().message ==
          "loading a kernel: CUDA_ERROR_ILLEGAL_ADDRESS (700): an illegal memory access was encountered");
    CHECK(engine->counters().compiles == 0);
  }
}
