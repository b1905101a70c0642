// What one hot call costs the host: attention on tiny tensors, where the kernel is nearly nothing; through
// the C++ API, as a call that the C ABI keeps, and its backward pass of three kernels.
//   bench_host_overhead [cpu|cuda] [--json]
// On CUDA the call only enqueues, so the figure is check + table look-up + cuLaunchKernel. Over the stand-in
// of tests/driver (LD_LIBRARY_PATH=build/release/lib/stand_in) the driver is nearly nothing, too.
#include "attune/attune.h"
#include "attune/attune_c.h"
#include "runtime/cuda/cuda_backend.h"
#include "runtime/raise.h"
#include "tests/support/c_tensor.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace {

using attune::test::c_tensor;

constexpr int kRounds = 50;
constexpr int kCallsPerRound =
    200;  // well below the depth of a stream's queue, which is empty when a round begins

double median_us(attune::Device device, const std::function<void()>& call) {
  std::vector<double> rounds;
  for (int round = 0; round <= kRounds; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kCallsPerRound; ++i) call();
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
    if (round > 0) rounds.push_back(took.count() / kCallsPerRound);  // the first one compiles
    if (device.type == attune::DeviceType::cuda)
      attune::runtime::take(attune::runtime::cuda_synchronize(device.index));
  }
  std::ranges::nth_element(rounds, rounds.begin() + kRounds / 2);
  return rounds[kRounds / 2];
}

/// Of the same call, in a workspace that is there.
double median_backward_us(const attune::Tensor& query, const attune::Tensor& key, const attune::Tensor& value,
                          const attune::Tensor& output) {
  constexpr std::size_t kWorkspaceBytes = 1 << 16;
  constexpr std::size_t kAlignment = 256;
  const attune::Device device = query.view().device;
  const attune::Tensor lse(attune::DType::f32, device, {1, 1, 1});
  const attune::Tensor workspace(attune::DType::f32, device, {(kWorkspaceBytes + kAlignment) / 4});
  void* begin = workspace.view().data;
  std::size_t room = kWorkspaceBytes + kAlignment;
  std::align(kAlignment, kWorkspaceBytes, begin, room);
  const attune::Tensor gradient(query.view().dtype, device, {4, 1, 1, 64});
  const auto part = [&](int index) {
    attune::MutableTensorView view = output.view();
    view.data = static_cast<std::byte*>(gradient.view().data) + index * 64 * item_bytes(view.dtype);
    return view;
  };
  const attune::MutableTensorView grad_output = part(0), grad_query = part(1), grad_key = part(2),
                                  grad_value = part(3);
  return median_us(device, [&] {
    attune::memory_efficient_attention_backward(
        grad_output, output.view(), lse.view(), query.view(), key.view(), value.view(),
        {&grad_query, &grad_key, &grad_value}, attune::LowerTriangularMask{}, {},
        {.workspace = begin, .workspace_bytes = kWorkspaceBytes});
  });
}

void check(attune_status status) {
  if (status != ATTUNE_OK) throw attune::Error(attune::ErrorKind::internal, attune_last_error());
}

}  // namespace

int main(int argc, char** argv) {
  bool cuda = false;
  bool json = false;
  for (int i = 1; i < argc; ++i) {
    cuda = cuda || std::strcmp(argv[i], "cuda") == 0;
    json = json || std::strcmp(argv[i], "--json") == 0;
  }
  const attune::Device device{cuda ? attune::DeviceType::cuda : attune::DeviceType::cpu, 0};
  const auto dtype = cuda ? attune::DType::f16 : attune::DType::f32;
  try {
    // Uninitialised values are fine here: nothing depends on them.
    const attune::Tensor query(dtype, device, {1, 1, 1, 64});
    const attune::Tensor key(dtype, device, {1, 1, 1, 64});
    const attune::Tensor value(dtype, device, {1, 1, 1, 64});
    const attune::Tensor output(dtype, device, {1, 1, 1, 64});
    const double us = median_us(device, [&] {
      attune::memory_efficient_attention_forward(query.view(), key.view(), value.view(), output.view(),
                                                 nullptr, attune::LowerTriangularMask{});
    });
    attune_bias causal = ATTUNE_BIAS_INIT;
    causal.window_right = 0;
    const attune_tensor q = c_tensor(query), k = c_tensor(key), v = c_tensor(value), o = c_tensor(output);
    attune_forward_call* kept = nullptr;
    check(attune_forward_call_create(&q, &k, &v, &o, nullptr, &causal, nullptr, &kept));
    attune_forward_memory memory = ATTUNE_FORWARD_MEMORY_INIT;
    memory.query = q.data;
    memory.key = k.data;
    memory.value = v.data;
    memory.output = o.data;
    const double kept_us = median_us(device, [&] { check(attune_forward_call_run(kept, &memory)); });
    attune_forward_call_destroy(kept);
    const std::string kernel = attune::last_kernel();
    const double backward_us = median_backward_us(query, key, value, output);
    if (json) {
      std::printf(
          "{\"device\": \"%s\", \"kernel\": \"%s\", \"host_us\": %.3f, \"kept_call_us\": %.3f, "
          "\"backward_us\": %.3f}\n",
          cuda ? "cuda" : "cpu", kernel.c_str(), us, kept_us, backward_us);
    } else {
      std::printf("hot call on %s, %s: %.2f us; kept by the C ABI: %.2f us; backward: %.2f us\n",
                  cuda ? "cuda" : "cpu", kernel.c_str(), us, kept_us, backward_us);
    }
  } catch (const attune::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  return 0;
}
