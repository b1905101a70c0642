// What the benchmarks of CPU kernels share: their cases, and how they are timed and named.
#pragma once

#include "attune/num.h"
#include "attune/spec.h"
#include "base/result.h"
#include "bench/fma_peak.h"
#include "codegen/names.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace attune::bench {

using kernel::Bias;
using kernel::DType;

/// What a case has beyond plain attention.
struct With {
  bool causal = false;
  Bias bias = Bias::none;  // [queries, keys], of all heads
  bool dropout = false;
  int sequences = 0;  // 0: dense; of equal lengths
  int page_size = 0;  // 0: contiguous
};

struct Case {
  DType dtype;
  int head_dim, len_q, len_k;
  With with = {};
};

constexpr int kBatch = 1;
constexpr int kHeads = 8;

template <typename T>
T must(Result<T> result) {
  if (!result.ok()) throw std::runtime_error(result.failure().message);
  return std::move(result).value();
}
inline void must(Result<void> result) {
  if (!result.ok()) throw std::runtime_error(result.failure().message);
}

/// [1, length, heads, head_dim], dense, of normal numbers.
inline std::vector<std::byte> tensor(DType dtype, int length, int head_dim, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  const std::size_t count = std::size_t{kHeads} * length * head_dim;
  std::vector<std::byte> bytes(count * kernel::size_of(dtype));
  for (std::size_t i = 0; i < count; ++i) {
    const float x = normal(engine);
    const std::uint16_t half = dtype == DType::f16 ? kernel::float_to_f16(x) : kernel::float_to_bf16(x);
    const void* element = dtype == DType::f32 ? static_cast<const void*>(&x) : &half;
    std::memcpy(bytes.data() + i * kernel::size_of(dtype), element, kernel::size_of(dtype));
  }
  return bytes;
}

inline double visible_pairs(const Case& problem) {
  const double all = double{1} * problem.len_q * problem.len_k / std::max(1, problem.with.sequences);
  return problem.with.causal ? problem.len_q * (problem.len_q + 1.0) / 2 : all;
}

/// "causal bias=f16 dropout sequences=1 page=16"
inline std::string text_of(const With& with) {
  std::vector<std::string> words;
  if (with.causal) words.push_back("causal");
  if (with.bias != Bias::none) words.push_back(fmt::format("bias={}", codegen::name_of(with.bias)));
  if (with.dropout) words.push_back("dropout");
  if (with.sequences != 0) words.push_back(fmt::format("sequences={}", with.sequences));
  if (with.page_size != 0) words.push_back(fmt::format("page={}", with.page_size));
  return words.empty() ? "-" : fmt::format("{}", fmt::join(words, " "));
}

inline double best_seconds(const std::function<void()>& work) {
  constexpr double kBudget = 1.0;
  double best = 1e9;
  for (double spent = 0; spent < kBudget;) {
    const double seconds = seconds_of(work);
    best = std::min(best, seconds);
    spent += seconds;
  }
  return best;
}

struct Options {
  int threads = 1;
  std::string arch;  // empty: this CPU's
  bool json = false;
};

inline std::optional<Options> parse(int argc, char** argv, bool takes_arch) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--json") {
      options.json = true;
    } else if (word == "--threads" && i + 1 < argc) {
      options.threads = std::atoi(argv[++i]);
    } else if (takes_arch && word == "--arch" && i + 1 < argc) {
      options.arch = argv[++i];
    } else {
      return std::nullopt;
    }
  }
  return options.threads > 0 ? std::optional(options) : std::nullopt;
}

/// main() of a benchmark: its exit code. `run` throws what goes wrong.
inline int run_benchmark(const std::optional<Options>& options, const char* usage,
                         const std::function<void(const Options&)>& run) {
  if (!options) {
    std::fprintf(stderr, "usage: %s\n", usage);
    return 2;
  }
  setenv("ATTUNE_THREADS", std::to_string(options->threads).c_str(), 1);  // before the backend reads it
  try {
    run(*options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  return 0;
}

}  // namespace attune::bench
