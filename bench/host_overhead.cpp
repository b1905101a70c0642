// What one hot call costs the host: attention on tiny tensors, where the kernel is nearly nothing.
//   bench_host_overhead [cpu|cuda] [--json]
// On CUDA the call only enqueues, so the figure is check + table look-up + cuLaunchKernel.
#include "attune/attune.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <vector>

namespace {

constexpr int kRounds = 50;
constexpr int kCallsPerRound = 200;  // well below the depth of a stream's queue

double median_us(const attune::MutableTensorView& output, const attune::TensorView& query,
                 const attune::TensorView& key, const attune::TensorView& value) {
  const auto call = [&] {
    attune::memory_efficient_attention_forward(query, key, value, output, nullptr,
                                               attune::LowerTriangularMask{});
  };
  for (int i = 0; i < kCallsPerRound; ++i) call();
  std::vector<double> rounds;
  for (int round = 0; round < kRounds; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kCallsPerRound; ++i) call();
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
    rounds.push_back(took.count() / kCallsPerRound);
  }
  std::ranges::nth_element(rounds, rounds.begin() + kRounds / 2);
  return rounds[kRounds / 2];
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
    const double us = median_us(output.view(), query.view(), key.view(), value.view());
    if (json) {
      std::printf("{\"device\": \"%s\", \"kernel\": \"%s\", \"host_us\": %.3f}\n", cuda ? "cuda" : "cpu",
                  attune::last_kernel().c_str(), us);
    } else {
      std::printf("hot call on %s, %s: %.2f us\n", cuda ? "cuda" : "cpu", attune::last_kernel().c_str(), us);
    }
  } catch (const attune::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  return 0;
}
