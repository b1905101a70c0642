// The CPU kernel's speed, as a share of the FMA peak that the same machine shows in the same minute.
//   bench_cpu_forward [--threads N] [--arch x86-64-v3|x86-64-v4] [--json]
// Compiles each kernel anew, so the table also shows what a cold start costs.
#include "attune/blocks.h"
#include "attune/philox.h"
#include "bench/cpu_cases.h"
#include "bench/fma_peak.h"
#include "codegen/choose.h"
#include "codegen/names.h"
#include "runtime/cpu/cpu_backend.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

using namespace attune;
using namespace attune::bench;

constexpr Case kCases[] = {
    {DType::f32, 64, 1024, 1024},
    {DType::f32, 64, 1024, 1024, {.causal = true}},
    {DType::f16, 64, 1024, 1024},
    {DType::f16, 64, 1024, 1024, {.causal = true}},
    {DType::bf16, 64, 1024, 1024},
    {DType::bf16, 64, 1024, 1024, {.causal = true}},
    {DType::f32, 32, 1024, 1024},
    {DType::f32, 40, 1024, 1024},
    {DType::f32, 128, 1024, 1024},
    {DType::f32, 256, 1024, 1024},
    {DType::f32, 320, 1024, 1024},
    {DType::f32, 512, 1024, 1024},
    {DType::f16, 512, 1024, 1024},
    {DType::f32, 64, 1, 1024},
    {DType::f32, 64, 1, 16384},
    {DType::f32, 64, 1024, 1024, {.bias = Bias::f32}},
    {DType::f32, 64, 1024, 1024, {.bias = Bias::f16}},
    {DType::f32, 64, 1024, 1024, {.bias = Bias::boolean}},
    {DType::f32, 64, 1024, 1024, {.dropout = true}},
    {DType::f32, 64, 1024, 1024, {.sequences = 4}},
    {DType::f32, 64, 1024, 1024, {.sequences = 1, .page_size = 16}},
    {DType::f32, 64, 1024, 1024, {.sequences = 1, .page_size = 256}},
    {DType::f16, 64, 1024, 1024, {true, Bias::f16, true, 1, 16}},
};

struct Row {
  Case problem;
  std::string candidate;
  double milliseconds, gflops, peak_gflops, compile_ms, first_call_ms;
};

codegen::Problem problem_of(const Case& c) {
  return {.dtype = c.dtype,
          .output_dtype = c.dtype,
          .head_dim = c.head_dim,
          .head_dim_v = c.head_dim,
          .window_right = c.with.causal ? kernel::Edge::bounded : kernel::Edge::open,
          .blocks = c.with.sequences != 0 ? kernel::Blocks::varlen : kernel::Blocks::dense,
          .keys = c.with.page_size != 0 ? kernel::Keys::paged : kernel::Keys::contiguous,
          .bias = c.with.bias,
          .dropout = c.with.dropout ? kernel::Dropout::on : kernel::Dropout::off};
}

/// The tables of equal sequences; the pages of all stand in reverse.
struct Tables {
  std::vector<int> q_start, k_start, k_len, pages;

  explicit Tables(const Case& c) {
    const int count = c.with.sequences;
    for (int b = 0; b <= count && count != 0; ++b) {
      q_start.push_back(c.len_q / count * b);
      k_start.push_back(c.with.page_size != 0 ? 0 : c.len_k / count * b);
      k_len.push_back(c.len_k / count);
    }
    for (int page = c.with.page_size == 0 ? 0 : c.len_k / c.with.page_size; page > 0; --page)
      pages.push_back(page - 1);
  }
  kernel::Sequences view(const With& with) const {
    if (with.sequences == 0) return {};
    kernel::Sequences s{
        .count = with.sequences, .q_start = q_start.data(), .k_start = k_start.data(), .k_len = k_len.data()};
    if (with.page_size == 0) return s;
    s.pages = pages.data();
    s.table_width = static_cast<int>(pages.size()) / with.sequences;
    s.page_size = kernel::make_divider(with.page_size);
    return s;
  }
};

Row measure(const Case& problem, runtime::Backend& backend, const codegen::Arch& arch, int threads) {
  const codegen::Choice choice = must(codegen::choose(problem_of(problem), arch));
  const codegen::Unit unit =
      codegen::make_unit(choice.spec, arch, runtime::clang_compiler(arch), codegen::embedded_files());
  runtime::Image image;
  const double compile = seconds_of([&] { image = must(runtime::clang_compile(unit)); });

  const auto query = tensor(problem.dtype, problem.len_q, problem.head_dim, 1);
  const auto key = tensor(problem.dtype, problem.len_k, problem.head_dim, 2);
  const auto value = tensor(problem.dtype, problem.len_k, problem.head_dim, 3);
  // All bits 0: adds nothing in any type. A boolean hides all, which costs the same.
  const std::vector<std::byte> bias(std::size_t{4} * problem.len_q * problem.len_k);
  const Tables tables(problem);
  std::vector<std::byte> output(query.size());
  const auto strides = [&](int length) {
    const long long row = kHeads * problem.head_dim;
    return kernel::Strides{.batch = row * length, .seq = row, .head = problem.head_dim};
  };
  kernel::ForwardParams params;
  params.query = query.data();
  params.key = key.data();
  params.value = value.data();
  params.output = output.data();
  params.query_strides = params.output_strides = strides(problem.len_q);
  params.key_strides = params.value_strides = strides(problem.len_k);
  params.batch = kBatch;
  params.groups = 1;
  params.heads = kHeads;
  params.len_q = problem.len_q;
  params.len_k = problem.len_k;
  params.reach = kernel::make_reach(kernel::Anchor::top_left, -1, problem.with.causal ? 0 : -1);
  params.window = kernel::window_of(params.reach, problem.len_q, problem.len_k);
  params.sequences = tables.view(problem.with);
  params.bias = bias.data();
  params.bias_strides = {.query = problem.len_k, .key = 1};
  params.dropout = kernel::make_dropout(0.1, 1, 2);
  params.scale = 1 / std::sqrt(static_cast<float>(problem.head_dim));

  // What a cache hit costs beyond the hot call: loading, and the pages that the first call touches.
  std::unique_ptr<runtime::Kernel> kernel;
  const double first = seconds_of([&] {
    kernel = must(backend.load(image.bytes, unit.spec));
    must(kernel->forward(params, nullptr));
  });
  const double seconds = best_seconds([&] { must(kernel->forward(params, nullptr)); });
  const double flops = 4.0 * kBatch * kHeads * visible_pairs(problem) * problem.head_dim;
  return {.problem = problem,
          .candidate = choice.candidate->name,
          .milliseconds = seconds * 1e3,
          .gflops = flops / seconds / 1e9,
          .peak_gflops = fma_peak_gflops(arch.isa == codegen::Isa::avx512, threads),
          .compile_ms = compile * 1e3,
          .first_call_ms = (first - seconds) * 1e3};
}

void print_table_row(const Row& row) {
  fmt::print("{:<16} {:<5} {:>4} {:>5} {:>6} {:>9.3f} {:>8.1f} {:>8.1f} {:>6.2f} {:>9.0f} {:>9.2f}  {}\n",
             row.candidate, codegen::name_of(row.problem.dtype), row.problem.head_dim, row.problem.len_q,
             row.problem.len_k, row.milliseconds, row.gflops, row.peak_gflops, row.gflops / row.peak_gflops,
             row.compile_ms, row.first_call_ms, text_of(row.problem.with));
}

nlohmann::json json_of(const Row& row) {
  return {{"candidate", row.candidate},
          {"dtype", codegen::name_of(row.problem.dtype)},
          {"batch", kBatch},
          {"heads", kHeads},
          {"head_dim", row.problem.head_dim},
          {"len_q", row.problem.len_q},
          {"len_k", row.problem.len_k},
          {"with", text_of(row.problem.with)},
          {"ms", row.milliseconds},
          {"gflops", row.gflops},
          {"peak_gflops", row.peak_gflops},
          {"of_peak", row.gflops / row.peak_gflops},
          {"compile_ms", row.compile_ms},
          {"load_and_first_call_ms", row.first_call_ms}};
}

void run(const Options& options) {
  runtime::Backend& backend = *must(runtime::cpu_backend());
  const codegen::Arch arch =
      options.arch.empty() ? backend.arch() : must(codegen::arch_from_name(options.arch));
  if (arch.isa > backend.arch().isa)
    throw std::runtime_error("this CPU does not run code for " + arch.target);

  nlohmann::json rows = nlohmann::json::array();
  if (!options.json) {
    fmt::print("{}, {} thread(s); ms: best of one second; of peak: causal counts the triangle alone\n",
               arch.target, options.threads);
    fmt::print("{:<16} {:<5} {:>4} {:>5} {:>6} {:>9} {:>8} {:>8} {:>6} {:>9} {:>9}  {}\n", "kernel", "dtype",
               "K", "len_q", "len_k", "ms", "GFLOP/s", "peak", "ratio", "compile", "load", "with");
  }
  for (const Case& problem : kCases) {
    const Row row = measure(problem, backend, arch, options.threads);
    if (options.json) {
      rows.push_back(json_of(row));
    } else {
      print_table_row(row);
    }
  }
  if (options.json) {
    const nlohmann::json report{{"arch", arch.target}, {"threads", options.threads}, {"rows", rows}};
    fmt::print("{}\n", report.dump(2));
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_benchmark(parse(argc, argv, true),
                       "bench_cpu_forward [--threads N] [--arch x86-64-v3|x86-64-v4] [--json]", run);
}
