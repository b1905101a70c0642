// The speed of the CPU's gradients through the public functions, as a share of the FMA peak that the same
// machine shows in the same minute, and beside the forward pass.
//   bench_cpu_backward [--threads N] [--json]
// A backward pass counts as 2.5 forward passes: 5 products of the 7 that its kernels compute, as each of two
// makes the scores and their gradients anew. Compiles each kernel anew, so the table also shows what a cold
// start costs.
#include "attune/attune.h"
#include "bench/cpu_cases.h"
#include "bench/fma_peak.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace attune::bench;

constexpr double kForwardPasses = 2.5;

constexpr Case kCases[] = {
    {DType::f32, 64, 1024, 1024},
    {DType::f32, 64, 1024, 1024, {.causal = true}},
    {DType::f16, 64, 1024, 1024},
    {DType::bf16, 64, 1024, 1024},
    {DType::bf16, 64, 1024, 1024, {.causal = true}},
    {DType::f32, 32, 1024, 1024},
    {DType::f32, 40, 1024, 1024},
    {DType::f32, 128, 1024, 1024},
    {DType::f32, 256, 1024, 1024},
    {DType::f32, 512, 1024, 1024},
    {DType::f16, 512, 1024, 1024},
    {DType::f32, 64, 1, 1024},
    {DType::f32, 64, 1024, 1024, {.bias = Bias::f32}},
    {DType::f32, 64, 1024, 1024, {.bias = Bias::boolean}},
    {DType::f32, 64, 1024, 1024, {.dropout = true}},
    {DType::f32, 64, 1024, 1024, {.sequences = 4}},
    {DType::f32, 64, 1024, 1024, {.sequences = 1, .page_size = 16}},
    {DType::f16, 64, 1024, 1024, {true, Bias::f16, true, 1, 16}},
};

struct Row {
  Case problem;
  std::string kernel;
  double seconds = 0, forward_seconds = 0, cold_seconds = 0;  // cold: all kernels compiled and loaded
  double gflops = 0, peak_gflops = 0;
};

attune::DType type_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return attune::DType::f32;
    case DType::f16: return attune::DType::f16;
    case DType::bf16: return attune::DType::bf16;
  }
  return attune::DType::f32;
}

attune::DType type_of(Bias bias) {
  switch (bias) {
    case Bias::f16: return attune::DType::f16;
    case Bias::bf16: return attune::DType::bf16;
    case Bias::boolean: return attune::DType::boolean;
    default: return attune::DType::f32;
  }
}

/// Equal sequences; the pages of all stand in reverse.
attune::AttentionBias mask_of(const Case& c) {
  const int count = c.with.sequences;
  if (count == 0) return {};
  const std::vector<std::int64_t> queries(count, c.len_q / count), keys(count, c.len_k / count);
  if (c.with.page_size == 0) return attune::BlockDiagonalMask::from_seqlens(queries, keys);
  const int pages = c.len_k / c.with.page_size;
  std::vector<std::int32_t> table(pages);
  for (int i = 0; i < pages; ++i) table[i] = pages - 1 - i;
  return attune::PagedBlockDiagonalPaddedKeysMask::from_seqlens(
      queries, keys, {.table = std::move(table), .width = pages / count, .page_size = c.with.page_size});
}

Row measure(const Case& c, int threads) {
  // Memory that is aligned as frameworks align it.
  const auto normal = [&](int length, unsigned seed) {
    attune::Tensor filled(type_of(c.dtype), {}, {kBatch, length, kHeads, c.head_dim});
    const auto bytes = tensor(c.dtype, length, c.head_dim, seed);
    std::memcpy(filled.data(), bytes.data(), bytes.size());
    return filled;
  };
  const attune::Tensor tensors[] = {normal(c.len_q, 1), normal(c.len_k, 2), normal(c.len_k, 3),
                                    normal(c.len_q, 4)};
  const attune::TensorView query = tensors[0].view(), key = tensors[1].view(), value = tensors[2].view(),
                           grad_output = tensors[3].view();

  // All bits 0 add nothing in any type. A boolean hides nothing: what no query sees is cheaper.
  const std::vector<std::byte> bias_bytes(std::size_t{4} * c.len_q * c.len_k,
                                          std::byte{c.with.bias == Bias::boolean});
  attune::AttentionBias bias = mask_of(c);
  if (c.with.causal) bias.window.right = 0;
  if (c.with.bias != Bias::none)
    bias = bias.add_bias({bias_bytes.data(), type_of(c.with.bias), {1, 1, c.len_q, c.len_k}});
  attune::AttentionOptions options;
  options.p = c.with.dropout ? 0.1 : 0;

  const attune::Attention forward =
      attune::memory_efficient_attention_forward_requires_grad(query, key, value, bias, options);
  const auto output = forward.output.view(), lse = forward.lse.view();
  const auto run_forward = [&] {
    attune::memory_efficient_attention_forward(query, key, value, output, &lse, bias, options);
  };
  const auto like = [](const attune::TensorView& view) {
    return attune::Tensor(view.dtype, view.device, {view.shape.begin(), view.shape.begin() + view.rank});
  };
  const attune::Tensor results[] = {like(query), like(key), like(value),
                                    like(bias.tensor.value_or(attune::TensorView()))};
  const attune::MutableTensorView views[] = {results[0].view(), results[1].view(), results[2].view(),
                                             results[3].view()};
  const bool bias_learns = c.with.bias != Bias::none && c.with.bias != Bias::boolean;
  const attune::GradientViews gradients{&views[0], &views[1], &views[2], bias_learns ? &views[3] : nullptr};
  const auto run_backward = [&] {
    attune::memory_efficient_attention_backward(grad_output, output, lse, query, key, value, gradients, bias,
                                                options);
  };
  const double first = seconds_of(run_backward);
  Row row{.problem = c, .kernel = attune::last_kernel()};
  row.seconds = best_seconds(run_backward);
  row.forward_seconds = best_seconds(run_forward);
  row.cold_seconds = first - row.seconds;
  row.gflops = kForwardPasses * 4.0 * kBatch * kHeads * visible_pairs(c) * c.head_dim / row.seconds / 1e9;
  row.peak_gflops = fma_peak_gflops(__builtin_cpu_supports("avx512f") != 0, threads);
  return row;
}

void print_table_row(const Row& row) {
  const Case& c = row.problem;
  fmt::print("{:<30} {:<5} {:>4} {:>5} {:>6} {:>9.3f} {:>8.1f} {:>8.1f} {:>6.2f} {:>9.2f} {:>9.0f}  {}\n",
             row.kernel, attune::codegen::name_of(c.dtype), c.head_dim, c.len_q, c.len_k, row.seconds * 1e3,
             row.gflops, row.peak_gflops, row.gflops / row.peak_gflops, row.seconds / row.forward_seconds,
             row.cold_seconds * 1e3, text_of(c.with));
}

nlohmann::json json_of(const Row& row) {
  const Case& c = row.problem;
  return {{"kernel", row.kernel},
          {"dtype", attune::codegen::name_of(c.dtype)},
          {"batch", kBatch},
          {"heads", kHeads},
          {"head_dim", c.head_dim},
          {"len_q", c.len_q},
          {"len_k", c.len_k},
          {"with", text_of(c.with)},
          {"ms", row.seconds * 1e3},
          {"forward_ms", row.forward_seconds * 1e3},
          {"gflops", row.gflops},
          {"peak_gflops", row.peak_gflops},
          {"of_peak", row.gflops / row.peak_gflops},
          {"compile_and_load_ms", row.cold_seconds * 1e3}};
}

void run(const Options& options) {
  setenv("ATTUNE_CACHE_MODE", "off", 1);
  nlohmann::json rows = nlohmann::json::array();
  if (!options.json) {
    fmt::print(
        "{} thread(s); ms: best of one second; of peak: 2.5 forward passes, causal counts the triangle\n",
        options.threads);
    fmt::print("{:<30} {:<5} {:>4} {:>5} {:>6} {:>9} {:>8} {:>8} {:>6} {:>9} {:>9}  {}\n",
               "kernel of key and value", "dtype", "K", "len_q", "len_k", "ms", "GFLOP/s", "peak", "ratio",
               "/ forward", "compile", "with");
  }
  for (const Case& problem : kCases) {
    const Row row = measure(problem, options.threads);
    if (options.json) {
      rows.push_back(json_of(row));
    } else {
      print_table_row(row);
    }
  }
  if (options.json) fmt::print("{}\n", nlohmann::json{{"threads", options.threads}, {"rows", rows}}.dump(2));
}

}  // namespace

int main(int argc, char** argv) {
  return run_benchmark(parse(argc, argv, false), "bench_cpu_backward [--threads N] [--json]", run);
}
