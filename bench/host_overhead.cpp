// What one hot call costs the host: attention on tiny tensors, where the kernel is nearly nothing; through
// the C++ API, and as a call that the C ABI keeps.
//   bench_host_overhead [cpu|cuda] [--json]
// On CUDA the call only enqueues, so the figure is check + table look-up + cuLaunchKernel.
#include "attune/attune.h"
#include "attune/attune_c.h"
#include "runtime/cuda/cuda_backend.h"
#include "runtime/raise.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

namespace {

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

attune_tensor c_tensor(const attune::Tensor& tensor) {
  const attune::MutableTensorView& view = tensor.view();
  attune_tensor c{view.data,
                  static_cast<int32_t>(view.dtype),
                  static_cast<int32_t>(view.device.type),
                  view.device.index,
                  view.rank,
                  {},
                  {}};
  std::ranges::copy(view.shape, c.shape);
  std::ranges::copy(view.strides, c.strides);
  return c;
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
    if (json) {
      std::printf("{\"device\": \"%s\", \"kernel\": \"%s\", \"host_us\": %.3f, \"kept_call_us\": %.3f}\n",
                  cuda ? "cuda" : "cpu", attune::last_kernel().c_str(), us, kept_us);
    } else {
      std::printf("hot call on %s, %s: %.2f us; kept by the C ABI: %.2f us\n", cuda ? "cuda" : "cpu",
                  attune::last_kernel().c_str(), us, kept_us);
    }
  } catch (const attune::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  return 0;
}
