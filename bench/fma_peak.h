// The rate of fused multiply-adds that the machine sustains now: independent chains in registers, no memory.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

namespace attune::bench {

inline double seconds_of(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

constexpr int kFmaChains = 12;  // more than latency x ports, fewer than AVX2's registers
constexpr int kFmaSteps = 200'000;

/// Vectors with volatile ends, so that the compiler can neither fold the chains nor drop them.
__attribute__((target("avx512f"))) inline void fma_chains_avx512() {
  volatile float start = 0.5f;
  __m512 chain[kFmaChains];
  for (__m512& x : chain) x = _mm512_set1_ps(start);
  const __m512 factor = _mm512_set1_ps(start + 0.25f);
  for (int i = 0; i < kFmaSteps; ++i) {
#pragma GCC unroll 12
    for (__m512& x : chain) x = _mm512_fmadd_ps(x, factor, factor);
  }
  __m512 sum = chain[0];
  for (int i = 1; i < kFmaChains; ++i) sum = _mm512_add_ps(sum, chain[i]);
  volatile float end = _mm512_cvtss_f32(sum);
  static_cast<void>(end);
}

__attribute__((target("avx2,fma"))) inline void fma_chains_avx2() {
  volatile float start = 0.5f;
  __m256 chain[kFmaChains];
  for (__m256& x : chain) x = _mm256_set1_ps(start);
  const __m256 factor = _mm256_set1_ps(start + 0.25f);
  for (int i = 0; i < kFmaSteps; ++i) {
#pragma GCC unroll 12
    for (__m256& x : chain) x = _mm256_fmadd_ps(x, factor, factor);
  }
  __m256 sum = chain[0];
  for (int i = 1; i < kFmaChains; ++i) sum = _mm256_add_ps(sum, chain[i]);
  volatile float end = _mm256_cvtss_f32(sum);
  static_cast<void>(end);
}

/// GFLOP/s of all threads together, best of several rounds.
inline double fma_peak_gflops(bool avx512, int threads) {
  constexpr int kRounds = 8;
  const auto chains = avx512 ? fma_chains_avx512 : fma_chains_avx2;
  const double flops = 2.0 * kFmaChains * kFmaSteps * (avx512 ? 16 : 8) * threads;
  double best = 0;
  for (int round = 0; round < kRounds; ++round) {
    const double seconds = seconds_of([&] {
      std::vector<std::jthread> helpers;
      for (int i = 1; i < threads; ++i) helpers.emplace_back(chains);
      chains();
    });
    best = std::max(best, flops / seconds / 1e9);
  }
  return best;
}

}  // namespace attune::bench
