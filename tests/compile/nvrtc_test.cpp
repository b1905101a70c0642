// Every GPU candidate through NVRTC, without a GPU: no spills, no stack, registers and shared memory within
// what the architecture gives, no warning that means a slow kernel. --wide sweeps every head dim class
// instead of a sample.
#define DOCTEST_CONFIG_IMPLEMENT
#include "codegen/candidates.h"
#include "codegen/choose.h"
#include "codegen/embedded.h"
#include "codegen/unit.h"
#include "runtime/cuda/cuda_backend.h"
#include "tools/parallel.h"

#include <doctest/doctest.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <vector>

using namespace attune;
using codegen::Arch;
using codegen::Candidate;
using codegen::Problem;
using kernel::DType;
using kernel::Edge;
using kernel::Family;

namespace {

constexpr int kRegistersOfThread = 255;
constexpr int kRegistersOfBlock = 65536;
constexpr int kMaxHeadDim = 256;
// ptxas: setmaxnreg ignored, wgmma serialised, and what else makes a kernel slow without failing it.
constexpr const char* kSlowWarnings[] = {"C7508", "C7510", "C7511", "C7512", "C7519"};

bool wide = false;

Arch arch_of(const char* name) {
  auto arch = codegen::arch_from_name(name);
  REQUIRE(arch.ok());
  return *arch;
}

struct Case {
  Candidate row;
  Problem problem;
  Arch arch;
};

/// Is this the row that choose() takes for the problem when its family is forced?
bool chosen(const Candidate& row, const Problem& problem, const Arch& arch) {
  Problem forced = problem;
  forced.force = static_cast<codegen::Force>(static_cast<int>(row.family));
  const auto choice = codegen::choose(forced, arch);
  return choice.ok() && std::strcmp(choice->candidate->name, row.name) == 0;
}

std::vector<std::pair<int, int>> head_dims_of(const Candidate& row) {
  const int top = row.head_dim_max;
  if (!wide) return {{top, top}, {top - 3, top - 7}};
  std::vector<std::pair<int, int>> dims;
  for (int dim = std::max(1, top / 2 - 15); dim <= top; dim += 16) {
    dims.insert(dims.end(), {{dim, dim}, {dim + 15, top}, {top, dim}, {dim + 3, dim + 6}});
  }
  std::erase_if(dims, [&](const auto& pair) { return std::max(pair.first, pair.second) > top; });
  return dims;
}

struct Windows {
  Edge left, right;
};

/// What a row is compiled with: each pair of head dims with each kind of window. Dtype and alignment take
/// turns, so that the sample meets them all; --wide takes every combination.
std::vector<Case> cases_of(const Candidate& row, const Arch& arch) {
  constexpr Windows kWindows[] = {
      {Edge::open, Edge::open}, {Edge::open, Edge::bounded}, {Edge::bounded, Edge::bounded}};
  std::vector<DType> dtypes{DType::bf16, DType::f32, DType::f16};
  std::erase_if(dtypes, [&](DType dtype) { return (row.dtypes >> static_cast<int>(dtype) & 1u) == 0; });
  std::vector<Case> cases;
  std::size_t turn = 0;
  for (const auto& [dim, dim_v] : head_dims_of(row)) {
    for (const Windows& window : kWindows) {
      const DType next = dtypes[turn++ % dtypes.size()];
      for (const DType dtype : dtypes) {
        const int smallest = dtype == DType::f32 ? 4 : 2;
        const int widest = dim % 8 == 0 && dim_v % 8 == 0 ? 16 : 8;
        for (const int align : {widest, smallest}) {
          if (!wide && (dtype != next || (align == smallest) != (turn % 4 == 0))) continue;
          const Problem problem{.dtype = dtype,
                                .head_dim = dim,
                                .head_dim_v = dim_v,
                                .window_left = window.left,
                                .window_right = window.right,
                                .lse = kernel::Lse::write,
                                .align_bytes = align};
          if (codegen::fits(row, problem, arch) && chosen(row, problem, arch)) {
            cases.push_back({row, problem, arch});
          }
        }
      }
    }
  }
  return cases;
}

/// Empty when the kernel is what its row promises.
std::string defects_of(const Case& one, const nlohmann::json& facts) {
  const kernel::KernelSpec spec = codegen::spec_of(one.row, one.problem);
  const int registers = facts.at("registers");
  std::string text;
  const auto expect = [&](bool good, const std::string& what) {
    if (!good) text += (text.empty() ? "" : "; ") + what;
  };
  expect(facts.at("spill_bytes") == 0, fmt::format("{} bytes of spills", facts.at("spill_bytes").get<int>()));
  expect(facts.at("stack_bytes") == 0, fmt::format("{} bytes of stack", facts.at("stack_bytes").get<int>()));
  expect(registers > 0 && registers <= kRegistersOfThread &&
             registers * codegen::threads(spec) <= kRegistersOfBlock,
         fmt::format("{} registers for {} threads", registers, codegen::threads(spec)));
  expect(facts.at("shared_bytes") <= one.arch.shared_bytes, "more shared memory than a block may have");
  for (const char* warning : kSlowWarnings) {
    expect(facts.at("log").get<std::string>().find(warning) == std::string::npos,
           std::string("warning ") + warning);
  }
  return text;
}

/// Compiles every candidate's cases for an architecture and reports each defect.
void check_arch(const char* name) {
  const Arch arch = arch_of(name);
  const auto compiler = runtime::nvrtc_compiler(arch);
  if (!compiler.ok()) {
    MESSAGE(fmt::format("skipped {}: {}", name, compiler.failure().message));
    return;
  }
  std::vector<Case> cases;
  for (const Candidate& row : codegen::candidates()) {
    if (row.family == Family::cpu) continue;
    const auto more = cases_of(row, arch);
    cases.insert(cases.end(), more.begin(), more.end());
  }
  REQUIRE(!cases.empty());
  std::mutex mutex;
  std::vector<std::string> defects;
  double slowest = 0;
  double total = 0;
  tools::parallel_for(cases.size(), tools::default_jobs(), [&](std::size_t index) {
    const Case& one = cases[index];
    const auto unit = codegen::make_unit(codegen::spec_of(one.row, one.problem), arch, *compiler,
                                         codegen::embedded_files());
    const auto image = runtime::nvrtc_compile(unit);
    const std::string what = fmt::format("{} {} {}", name, one.row.name, codegen::to_string(one.problem));
    const std::lock_guard lock(mutex);
    if (!image.ok()) {
      defects.push_back(what + ": " + image.failure().message);
      return;
    }
    const auto facts = nlohmann::json::parse(image->metadata_json);
    const double milliseconds = facts.at("milliseconds").at("total");
    slowest = std::max(slowest, milliseconds);
    total += milliseconds;
    if (const std::string text = defects_of(one, facts); !text.empty()) defects.push_back(what + ": " + text);
  });
  for (const std::string& defect : defects) FAIL_CHECK(defect);
  MESSAGE(fmt::format("{}: {} kernels, {:.0f} ms each, the slowest {:.0f} ms", name, cases.size(),
                      total / static_cast<double>(cases.size()), slowest));
}

}  // namespace

TEST_CASE("every candidate compiles without spills for CUDA 13's architectures") {
  for (const char* name : {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"})
    check_arch(name);
}

TEST_CASE("simt compiles for Pascal and Volta by CUDA 12's NVRTC") {
  for (const char* name : {"sm_60", "sm_70"}) check_arch(name);
}

TEST_CASE("every GPU and head dim has a row") {
  for (const char* name : {"sm_60", "sm_61", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90a", "sm_120a"}) {
    for (int dim = 1; dim <= kMaxHeadDim; ++dim) {
      const auto choice = codegen::choose(
          {.dtype = DType::f16, .head_dim = dim, .head_dim_v = kMaxHeadDim + 1 - dim}, arch_of(name));
      CHECK_MESSAGE(choice.ok(), name << " head_dim " << dim);
    }
  }
}

TEST_CASE("a target that NVRTC does not know is an environment failure that says what to install") {
  Arch future = arch_of("sm_121");
  future.sm = 999;
  future.target = "sm_999";
  const auto compiler = runtime::nvrtc_compiler(future);
  REQUIRE(!compiler.ok());
  CHECK(compiler.failure().kind == ErrorKind::environment);
  CHECK(compiler.failure().message.find("nvidia-cuda-nvrtc") != std::string::npos);
}

TEST_CASE("a compile error is internal and carries the compiler's log") {
  const Arch arch = arch_of("sm_90a");
  auto compiler = runtime::nvrtc_compiler(arch);
  if (!compiler.ok()) {
    MESSAGE("skipped: " << compiler.failure().message);
    return;
  }
  const Candidate* row = codegen::candidates().data();
  auto unit =
      codegen::make_unit(codegen::spec_of(*row, {.dtype = DType::f16, .head_dim = 64, .head_dim_v = 64}),
                         arch, *compiler, codegen::embedded_files());
  unit.source = "int f() { return missing_name; }";
  const auto image = runtime::nvrtc_compile(unit);
  REQUIRE(!image.ok());
  CHECK(image.failure().kind == ErrorKind::internal);
  CHECK(image.failure().message.find("missing_name") != std::string::npos);
}

int main(int argc, char** argv) {
  wide =
      std::any_of(argv + 1, argv + argc, [](const char* word) { return std::strcmp(word, "--wide") == 0; });
  if (const auto compiler = runtime::nvrtc_compiler(*codegen::arch_from_name("sm_90a")); !compiler.ok()) {
    std::printf("skipped: %s\n", compiler.failure().message.c_str());
    return 77;
  }
  return doctest::Context(argc, argv).run();
}
