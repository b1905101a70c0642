// Calls of few queries and many keys, whose keys are split over blocks: two launches, in a workspace of the
// caller's or of Attune's.
#include "attune/attune.h"
#include "attune/attune_c.h"
#include "attune/params.h"
#include "tests/driver/old_driver.h"
#include "tests/driver/stand_in.h"
#include "tests/gpu/driver_objects.h"
#include "tests/support/c_tensor.h"
#include "tests/unit/allocations.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

using namespace attune;
using namespace attune::test;
using stand_in::Launch;
using stand_in::Recording;

namespace {

constexpr int kBatch = 2, kKeys = 4096, kHeads = 8, kHeadDim = 64;
constexpr int kParts = 16;  // of so few tiles

/// One query a batch entry, in the memory of a stand-in device.
struct Decoding {
  explicit Decoding(Device on = {DeviceType::cuda, 0}, CUstream stream = nullptr)
      : device(on), options{.stream = stream} {}

  void run() const {
    const MutableTensorView lse_view = lse.view();
    memory_efficient_attention_forward(query.view(), key.view(), value.view(), output.view(), &lse_view, {},
                                       options);
  }
  std::size_t workspace_bytes() const {
    return forward_workspace_bytes(query.view(), key.view(), value.view(), /*with_lse=*/true, {}, options);
  }

  Device device;
  AttentionOptions options;
  Tensor query{DType::f16, device, {kBatch, 1, kHeads, kHeadDim}};
  Tensor key{DType::f16, device, {kBatch, kKeys, kHeads, kHeadDim}};
  Tensor value{DType::f16, device, {kBatch, kKeys, kHeads, kHeadDim}};
  Tensor output{DType::f16, device, {kBatch, 1, kHeads, kHeadDim}};
  Tensor lse{DType::f32, device, {kBatch, kHeads, 1}};
};

/// The call, with memory of the caller's to work in.
struct Lent : Decoding {
  explicit Lent(CUstream stream = nullptr) : Decoding({DeviceType::cuda, 0}, stream) {
    options.workspace = memory.view().data;
    options.workspace_bytes = workspace_bytes();
  }
  Tensor memory{DType::f32, {DeviceType::cuda, 0}, {1 << 20}};
};

int count(const Recording& recording, const std::string& call) {
  const auto calls = recording.calls();
  return static_cast<int>(std::ranges::count(calls, call));
}

}  // namespace

TEST_CASE("a call of few queries is two launches, which share a workspace") {
  for (const int index : {0, 1}) {
    CAPTURE(index);
    const Decoding call({DeviceType::cuda, index});
    const std::size_t bytes = call.workspace_bytes();
    call.run();
    const Recording recording;
    call.run();
    const auto launches = recording.launches();
    REQUIRE(launches.size() == 2);
    const auto parts = launches[0].told<kernel::ForwardParams>();
    const auto merge = launches[1].told<kernel::MergeParams>();
    const int expected = index == 0 ? kParts : 13;  // of 108 multiprocessors' two blocks each
    CHECK(parts.splits == expected);
    CHECK(merge.chunks == expected);
    CHECK(bytes == static_cast<std::size_t>(expected) * kBatch * kHeads * (kHeadDim + 1) * sizeof(float));
    CHECK(launches[0].blocks == static_cast<unsigned>(kBatch * kHeads * expected));
    CHECK(parts.query == call.query.view().data);
    CHECK(merge.chunk[0].output == parts.output);
    CHECK(merge.chunk[0].lse == parts.lse);
    CHECK(merge.output == call.output.view().data);
    CHECK(merge.lse == call.lse.view().data);
    CHECK_FALSE(launches[0].begins_early);
    CHECK(launches[1].begins_early == (index == 0 && !old_driver));
    CHECK(last_kernel().starts_with("mma_16x32x4"));
  }
}

TEST_CASE("a hot call in the caller's workspace neither waits nor allocates") {
  const PrimaryContext context(0);
  const Lent call;
  call.run();
  {
    const Recording recording;
    call.run();
    const auto parts = recording.launches().at(0).told<kernel::ForwardParams>();
    CHECK(parts.output == call.memory.view().data);
    for (const char* never : {"cuMemAlloc", "cuMemAllocAsync", "cuMemFree", "cuMemFreeAsync",
                              "cuStreamSynchronize", "cuCtxSynchronize"}) {
      CHECK_MESSAGE(count(recording, never) == 0, std::string(never));
    }
  }
  const long before = allocations();
  call.run();
  CHECK(allocations() == before);
}

TEST_CASE("without one, what Attune allocates is given back") {
  const Decoding call;
  call.run();
  const stand_in::Objects before = stand_in::objects();
  call.run();
  CHECK(stand_in::objects() == before);
}

TEST_CASE("a warmed call is captured with both launches; prepare() warms it") {
  const PrimaryContext context(0);
  const Stream stream;
  const Lent call(stream.get());
  const Counters before = counters();
  prepare(call.query.view(), call.key.view(), call.value.view(), /*with_lse=*/true, {}, call.options);
  CHECK(counters().launches == before.launches);
  const Recording recording;
  const Graph graph = stream.capture([&] { call.run(); });
  const auto launches = recording.launches();
  REQUIRE(launches.size() == 2);
  for (const Launch& launch : launches) CHECK(launch.captured);
}

TEST_CASE("a workspace that is too small, or lies askew, is refused before anything is launched") {
  Lent call;
  call.run();
  const std::uint64_t launches = counters().launches;
  --call.options.workspace_bytes;
  CHECK_THROWS_WITH(call.run(), doctest::Contains("forward_workspace_bytes() says"));
  call.options.workspace = static_cast<std::byte*>(call.options.workspace) + 4;
  CHECK_THROWS_WITH(call.run(), "workspace: its address should be a multiple of 256");
  CHECK(counters().launches == launches);
}

TEST_CASE("explain has the parts and the kernel that merges them") {
  const Decoding call;
  const std::string text =
      explain(call.query.view(), call.key.view(), call.value.view(), /*with_lse=*/true, {}, call.options);
  CHECK(text.find("\"splits\":16") != std::string::npos);
  CHECK(text.find("merge_8x16_d64s") != std::string::npos);
}

TEST_CASE("the C ABI lends a workspace, too, to a call and to one that it keeps") {
  const Lent call;
  const attune_tensor query = c_tensor(call.query), key = c_tensor(call.key), value = c_tensor(call.value),
                      output = c_tensor(call.output), lse = c_tensor(call.lse);
  attune_options options = ATTUNE_OPTIONS_INIT;
  std::size_t bytes = 0;
  REQUIRE(attune_forward_workspace_bytes(&query, &key, &value, 1, nullptr, &options, &bytes) == ATTUNE_OK);
  CHECK(bytes == call.options.workspace_bytes);
  options.workspace = call.options.workspace;
  options.workspace_bytes = bytes;
  REQUIRE(attune_memory_efficient_attention_forward(&query, &key, &value, &output, &lse, nullptr, &options) ==
          ATTUNE_OK);

  attune_forward_call* kept = nullptr;
  const attune_options plain = ATTUNE_OPTIONS_INIT;
  REQUIRE(attune_forward_call_create(&query, &key, &value, &output, &lse, nullptr, &plain, &kept) ==
          ATTUNE_OK);
  std::size_t kept_bytes = 0;
  REQUIRE(attune_forward_call_workspace_bytes(kept, &kept_bytes) == ATTUNE_OK);
  CHECK(kept_bytes == bytes);
  attune_forward_memory memory = memory_of(query, key, value, output, lse);
  memory.workspace = call.options.workspace;
  memory.workspace_bytes = bytes;
  const Recording recording;
  CHECK(attune_forward_call_run(kept, &memory) == ATTUNE_OK);
  attune_forward_call_destroy(kept);
  CHECK(recording.launches().at(0).told<kernel::ForwardParams>().output == call.options.workspace);
  CHECK(attune_forward_workspace_bytes(&query, &key, &value, 1, nullptr, &options, nullptr) ==
        ATTUNE_INVALID_ARGUMENT);
  CHECK(std::string(attune_last_error()) == "forward_workspace_bytes: null bytes");
}
