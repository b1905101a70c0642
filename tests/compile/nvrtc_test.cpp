// Every GPU candidate through NVRTC, without a GPU: no spills, no stack, registers and shared memory within
// what the architecture gives, no warning that means a slow kernel, and Hopper's gradients in time. --wide
// tries many problems of each row, --seed N other ones, --only TEXT those that have it in their name:
// "sm_90a mma_64x96x4_d128 dtype=f16 ...".
#define DOCTEST_CONFIG_IMPLEMENT
#include "base/digest.h"
#include "cache/cubin.h"
#include "codegen/candidates.h"
#include "codegen/choose.h"
#include "codegen/embedded.h"
#include "codegen/unit.h"
#include "runtime/cuda/cuda_backend.h"
#include "tests/support/random.h"
#include "tools/parallel.h"

#include <doctest/doctest.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <sys/resource.h>
#include <time.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

using namespace attune;
using codegen::Arch;
using codegen::Candidate;
using codegen::Problem;
using kernel::Bias;
using kernel::Blocks;
using kernel::Dropout;
using kernel::DType;
using kernel::Edge;
using kernel::Family;
using kernel::Keys;
using kernel::kMaxHeadDim;
using kernel::Lse;
using kernel::Operation;
using kernel::QueryGradient;
using test::Random;

namespace {

constexpr int kRegistersOfThread = 255;
constexpr int kRegistersOfBlock = 65536;
// ptxas: setmaxnreg ignored, wgmma serialised, and what else makes a kernel slow without failing it.
constexpr const char* kSlowWarnings[] = {"C7508", "C7510", "C7511", "C7512", "C7519"};

// What a kernel of Hopper's backward pass may take, on one core that is not busy otherwise; what the
// reference takes there; and by how much that may be off.
constexpr double kSeconds = 1.5;
constexpr double kReferenceSeconds = 0.5;
constexpr double kSlack = 1.15;

constexpr const char* kArchs[] = {"sm_60", "sm_70",  "sm_75",   "sm_80",  "sm_86",
                                  "sm_89", "sm_90a", "sm_100a", "sm_120a"};

bool wide = false;
std::uint64_t seed = 1;
std::string only;

Arch arch_of(const char* name) {
  auto arch = codegen::arch_from_name(name);
  REQUIRE(arch.ok());
  return *arch;
}

struct Case {
  Candidate row;
  Problem problem;
  Arch arch;

  std::string name() const {
    return fmt::format("{} {} {}", arch.target, row.name, codegen::to_string(problem));
  }
};

/// Is this the row that choose() takes for the problem when its family is forced?
bool chosen(const Candidate& row, const Problem& problem, const Arch& arch) {
  Problem forced = problem;
  forced.families = codegen::only(row.family);
  const auto choice = codegen::choose(forced, arch);
  return choice.ok() && std::strcmp(choice->candidate->name, row.name) == 0;
}

/// The largest head dim of the next smaller row of the same family and operation, and one more.
int smallest_head_dim(const Candidate& row) {
  int below = 0;
  for (const Candidate& other : codegen::candidates()) {
    const bool alike = other.family == row.family && other.operation == row.operation;
    if (alike && other.head_dim_max < row.head_dim_max) below = std::max(below, other.head_dim_max);
  }
  return below + 1;
}

struct Traits {
  Blocks blocks = Blocks::dense;
  Keys keys = Keys::contiguous;
  bool bias = false;
  Dropout dropout = Dropout::off;
};
constexpr Traits kTraits[] = {
    {},
    {.blocks = Blocks::varlen},
    {.bias = true},
    {.blocks = Blocks::varlen, .keys = Keys::paged},
    {.dropout = Dropout::on},
    {.bias = true, .dropout = Dropout::on},
    {.blocks = Blocks::varlen, .bias = true, .dropout = Dropout::on},
    {.blocks = Blocks::varlen, .keys = Keys::paged, .bias = true, .dropout = Dropout::on},
    {.blocks = Blocks::varlen, .dropout = Dropout::on},
    {.blocks = Blocks::varlen, .keys = Keys::paged, .dropout = Dropout::on}};

/// The gradient of a bias tensor is that of one of numbers.
Bias random_bias(Random& random, Operation operation, bool wanted) {
  if (operation == Operation::grad_bias) return random.pick({Bias::f32, Bias::f16, Bias::bf16});
  return wanted ? random.pick({Bias::f32, Bias::f16, Bias::bf16, Bias::boolean}) : Bias::none;
}

/// Mostly what the row is there for; those of sm90 know no gradient apart.
QueryGradient random_query_gradient(Random& random, const Candidate& row) {
  const auto may = [&](unsigned feature, double chance) {
    return (row.features & feature) != 0 && random.chance(chance);
  };
  if (may(codegen::kOrdered, 0.4)) return QueryGradient::ordered;
  return may(codegen::kAtomic, row.family == Family::sm90 ? 1 : 0.7) ? QueryGradient::atomic
                                                                     : QueryGradient::apart;
}

/// The first that the row is there for.
codegen::Extent extent_of(const Candidate& row) {
  return static_cast<codegen::Extent>(std::countr_zero(row.extents));
}

struct HeadDims {
  int keys;
  int values;
};

/// Half of them the row's widest.
HeadDims random_head_dims(Random& random, const Candidate& row) {
  const auto random_dim = [&](int least) {
    return random.chance(0.5) ? row.head_dim_max : random.integer(least, row.head_dim_max);
  };
  const int keys = random_dim(smallest_head_dim(row));
  return {keys, random.chance(0.5) ? random_dim(smallest_head_dim(row)) : random_dim(1)};
}

/// A problem with these traits, whatever else the row may be asked for.
Problem random_problem(Random& random, const Candidate& row, const Traits& traits, const HeadDims& dims) {
  Problem problem{.operation = row.operation,
                  .head_dim = dims.keys,
                  .head_dim_v = dims.values,
                  .window_right = random.pick({Edge::open, Edge::bounded, Edge::bounded}),
                  .blocks = traits.blocks,
                  .keys = traits.keys,
                  .bias = random_bias(random, row.operation, traits.bias),
                  .dropout = traits.dropout,
                  .lse = random.pick({Lse::write, Lse::write, Lse::skip}),
                  .query_gradient = random_query_gradient(random, row),
                  .boxes = 1,
                  .extent = extent_of(row)};
  problem.window_left =
      problem.window_right == Edge::bounded ? random.pick({Edge::open, Edge::bounded}) : Edge::open;
  do {
    problem.dtype = random.pick({DType::bf16, DType::f16, DType::f32});
  } while ((row.dtypes >> static_cast<int>(problem.dtype) & 1u) == 0);
  problem.output_dtype =
      random.chance(0.7) ? problem.dtype : random.pick({DType::bf16, DType::f16, DType::f32});
  if (codegen::merges(row.operation)) problem.head_dim = 0;
  if ((row.features & codegen::kSplit) != 0) {  // rows of their own
    problem.split = kernel::Split::on;
    if (row.operation == Operation::forward) {  // whatever the caller wants of the whole
      problem.output_dtype = DType::f32;
      problem.lse = Lse::write;
    }
  }
  if (row.family == Family::sm90) {
    problem.head_dim = kernel::round_up(problem.head_dim, 8);
    problem.head_dim_v = kernel::round_up(problem.head_dim_v, 8);
    const bool writes_f32 = row.operation == Operation::forward && problem.output_dtype == DType::f32;
    if (!writes_f32) problem.output_dtype = problem.dtype;
  }
  const int row_bytes = (problem.head_dim | problem.head_dim_v) *
                        std::min(kernel::size_of(problem.dtype), kernel::size_of(problem.output_dtype));
  const int widest = std::min(16, row_bytes & -row_bytes);
  problem.align_bytes = random.chance(0.6) ? widest : std::min(widest, kernel::size_of(problem.dtype));
  return problem;
}

bool is_backward(Operation operation) {
  return operation != Operation::forward && !codegen::merges(operation);
}

/// By its name and not by its place: another row in the table changes nothing for this one.
std::uint64_t number_of(const Candidate& row) {
  const Digest digest = sha256(std::string_view(row.name));
  std::uint64_t number = 0;
  std::memcpy(&number, digest.bytes.data(), sizeof number);
  return number;
}

/// The even ones or the odd ones, by the row's number; a single one stays.
std::vector<Case> every_second(const std::vector<Case>& cases, std::uint64_t index) {
  if (cases.size() < 2) return cases;
  std::vector<Case> half;
  for (std::size_t i = index % 2; i < cases.size(); i += 2) half.push_back(cases[i]);
  return half;
}

/// What a row is compiled with: a problem with each set of traits that it is ever chosen for, two of
/// Hopper's, whose registers are the scarcest. Architectures take turns, so that every row meets those too.
/// So do the last two sets of traits, and in the backward pass all but the first, but for Hopper's: its rows
/// are many and alike. Of other forward rows every second problem is compiled. The seed is fixed: a spill
/// that nobody has caused should not stop a build, `--wide --seed N` goes looking for one.
std::vector<Case> cases_of(const Candidate& row, const std::vector<Arch>& archs) {
  const std::uint64_t index = number_of(row);
  const bool backward = is_backward(row.operation);
  const bool sparse = backward && row.family != Family::sm90;
  const std::size_t without_turns = wide ? std::size(kTraits) : sparse ? 1 : std::size(kTraits) - 2;
  const std::size_t wanted = wide ? 60 : row.family == Family::sm90 && !backward ? 2 : 1;
  Random random(seed, index);
  std::vector<Case> cases;
  const auto draw = [&](std::size_t traits) {
    const std::size_t enough = cases.size() + wanted;
    for (std::size_t attempt = 0; attempt < 40 * wanted && cases.size() < enough; ++attempt) {
      const Arch& arch = archs[(index + traits * wanted + attempt) % archs.size()];
      const HeadDims dims = random_head_dims(random, row);
      const Problem problem = random_problem(random, row, kTraits[traits], dims);
      if (codegen::fits(row, problem, arch) && chosen(row, problem, arch))
        cases.push_back({row, problem, arch});
    }
  };
  for (std::size_t traits = 0; traits < std::size(kTraits); ++traits) {
    if (traits < without_turns || (index + traits) % 2 == 0) draw(traits);
  }
  // One that is chosen for few sets of traits may have had none of their turns.
  for (std::size_t traits = 0; cases.empty() && traits < std::size(kTraits); ++traits) draw(traits);
  if (!wide && !backward && row.family != Family::sm90) cases = every_second(cases, index);
  return cases;
}

/// Empty when the kernel is what its row promises.
std::string defects_of(const Case& one, const runtime::Image& image, const nlohmann::json& facts) {
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
  const auto cubin = cache::read_cubin(image.bytes);
  expect(cubin.ok() && cubin->kernels.size() == 1, "not a cubin with one kernel");
  if (cubin.ok() && !cubin->kernels.empty() && cubin->kernels[0].instructions) {
    const cache::InstructionCounts& counts = *cubin->kernels[0].instructions;
    const bool wants_tensor_cores = spec.family == Family::mma || spec.family == Family::sm90;
    expect(counts.local == 0, fmt::format("{} loads and stores of local memory", counts.local));
    expect((counts.tensor > 0) == wants_tensor_cores, fmt::format("{} products of matrices", counts.tensor));
  }
  for (const char* warning : kSlowWarnings) {
    expect(facts.at("log").get<std::string>().find(warning) == std::string::npos,
           std::string("warning ") + warning);
  }
  return text;
}

rlim_t stack_limit() {
  rlimit limit{};
  REQUIRE(::getrlimit(RLIMIT_STACK, &limit) == 0);
  return limit.rlim_cur;
}

/// The architectures that there is a compiler for; says which there is none for.
std::vector<Arch> archs_at_hand() {
  std::vector<Arch> archs;
  for (const char* name : kArchs) {
    const auto compiler = runtime::nvrtc_compiler(arch_of(name));
    if (compiler.ok()) {
      archs.push_back(arch_of(name));
    } else {
      MESSAGE(fmt::format("skipped {}: {}", name, compiler.failure().message));
    }
  }
  return archs;
}

std::vector<Case> all_cases() {
  const std::vector<Arch> archs = archs_at_hand();
  std::vector<Case> cases;
  for (const Candidate& row : codegen::candidates()) {
    if (row.family == Family::cpu) continue;
    const auto more = cases_of(row, archs);
    cases.insert(cases.end(), more.begin(), more.end());
  }
  return cases;
}

/// The operation's kernels of sm90 over all pairs of head dims. What fills registers depends on both, and on
/// whether they are powers of two: the widest of a row says little of others.
std::vector<Case> cases_of_head_dims(Operation operation, const Arch& arch) {
  const Candidate* general = nullptr;  // a row comes after those that are more specific
  for (const Candidate& row : codegen::candidates()) {
    if (row.family == Family::sm90 && row.operation == operation) general = &row;
  }
  Random random(seed, number_of(*general));
  std::vector<Case> cases;
  for (const Traits& traits : kTraits) {
    const std::size_t enough = cases.size() + (wide ? 60 : 2);
    while (cases.size() < enough) {
      const int widest = random.pick({128, general->head_dim_max});
      const HeadDims dims{random.integer(1, widest), random.integer(1, widest)};
      Problem problem = random_problem(random, *general, traits, dims);
      problem.families = codegen::only(Family::sm90);
      if (const auto choice = codegen::choose(problem, arch); choice.ok())
        cases.push_back({*choice->candidate, problem, arch});
    }
  }
  return cases;
}

Result<runtime::Image> compile(const Candidate& row, const Problem& problem, const Arch& arch) {
  const auto compiler = runtime::nvrtc_compiler(arch);
  const auto unit =
      codegen::make_unit(codegen::spec_of(row, problem), arch, *compiler, codegen::embedded_files());
  return runtime::nvrtc_compile(unit);
}

/// CPU time of this thread, in which all of NVRTC runs.
double cpu_seconds() {
  timespec time{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

double seconds_to_compile(const Candidate& row, const Problem& problem, const Arch& arch) {
  const double begin = cpu_seconds();
  (void)compile(row, problem, arch);
  return cpu_seconds() - begin;
}

/// Does the kernel, which took so many seconds, compile as fast as it should? One that did not is compiled
/// again, beside one that is known: another core, or a busy one, is slow for both.
bool compiles_in_time(const Case& one, double seconds) {
  if (one.row.family != Family::sm90 || !is_backward(one.row.operation)) return true;
  const Problem problem{.operation = Operation::grad_key_value,
                        .dtype = DType::bf16,
                        .output_dtype = DType::bf16,
                        .head_dim = 128,
                        .head_dim_v = 128,
                        .query_gradient = QueryGradient::atomic,
                        .boxes = 1};
  const auto reference = codegen::choose(problem, one.arch);
  double reference_seconds = 60;
  for (int attempt = 0; attempt < 3 && seconds > kSeconds; ++attempt) {
    reference_seconds =
        std::min(reference_seconds, seconds_to_compile(*reference->candidate, problem, one.arch));
    seconds = std::min(seconds, seconds_to_compile(one.row, one.problem, one.arch));
  }
  return seconds <= kSeconds * std::max(1.0, kSlack * reference_seconds / kReferenceSeconds);
}

/// Compiles all that the command line asks for; says how many they were and how long they took.
void check_all(std::vector<Case> cases) {
  std::erase_if(cases, [](const Case& one) { return one.name().find(only) == std::string::npos; });
  REQUIRE((!cases.empty() || !only.empty()));
  const rlim_t stack = stack_limit();
  std::mutex mutex;
  std::vector<std::string> defects;
  double slowest = 0;
  double total = 0;
  tools::parallel_for(cases.size(), tools::default_jobs(), [&](std::size_t index) {
    const Case& one = cases[index];
    const double begin = cpu_seconds();
    const auto image = compile(one.row, one.problem, one.arch);
    const bool in_time = compiles_in_time(one, cpu_seconds() - begin);
    const std::lock_guard lock(mutex);
    if (!in_time) defects.push_back(fmt::format("{}: takes more than {} s of CPU", one.name(), kSeconds));
    if (!image.ok()) {
      defects.push_back(one.name() + ": " + image.failure().message);
      return;
    }
    const auto facts = nlohmann::json::parse(image->metadata_json);
    const double milliseconds = facts.at("milliseconds").at("compile").get<double>() +
                                facts.at("milliseconds").at("assemble").get<double>();
    slowest = std::max(slowest, milliseconds);
    total += milliseconds;
    if (const std::string text = defects_of(one, *image, facts); !text.empty())
      defects.push_back(one.name() + ": " + text);
  });
  for (const std::string& defect : defects) FAIL_CHECK(defect);
  CHECK(stack_limit() == stack);  // NVRTC raises it unless told
  MESSAGE(fmt::format("{} kernels, {:.0f} ms each, the slowest {:.0f} ms", cases.size(),
                      total / static_cast<double>(std::max<std::size_t>(cases.size(), 1)), slowest));
}

}  // namespace

TEST_CASE("every candidate compiles without spills, with every trait that it is chosen for") {
  check_all(all_cases());
}

TEST_CASE("Hopper's gradients of key and value compile without spills, whatever the head dims") {
  check_all(cases_of_head_dims(Operation::grad_key_value, arch_of("sm_90a")));
}

TEST_CASE("Hopper's gradients of bias tensors compile without spills, whatever the head dims") {
  check_all(cases_of_head_dims(Operation::grad_bias, arch_of("sm_90a")));
}

TEST_CASE("every row is chosen for something") {
  std::vector<Arch> archs;
  for (const char* name : kArchs) archs.push_back(arch_of(name));
  for (const Candidate& row : codegen::candidates()) {
    if (row.family != Family::cpu) CHECK_MESSAGE(!cases_of(row, archs).empty(), std::string(row.name));
  }
}

TEST_CASE("every GPU, head dim and set of traits has a row") {
  for (const char* name : {"sm_60", "sm_61", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90a", "sm_120a"}) {
    const Arch arch = arch_of(name);
    const Family family = arch.sm >= 80 ? Family::mma : Family::simt;
    for (const Traits& traits : kTraits) {
      for (int dim = 1; dim <= kMaxHeadDim; ++dim) {
        const Problem problem{.dtype = DType::f16,
                              .output_dtype = DType::f16,
                              .head_dim = dim,
                              .head_dim_v = kMaxHeadDim + 1 - dim,
                              .blocks = traits.blocks,
                              .keys = traits.keys,
                              .bias = traits.bias ? Bias::f32 : Bias::none,
                              .dropout = traits.dropout};
        const auto choice = codegen::choose(problem, arch);
        REQUIRE_MESSAGE(choice.ok(), name << " " << codegen::to_string(problem));
        // Registers are for a bias tensor or for dropout there, not for both.
        const bool too_much = traits.bias && traits.dropout == Dropout::on &&
                              std::max(problem.head_dim, problem.head_dim_v) > 256;
        CHECK(choice->spec.family == (too_much ? Family::simt : family));
      }
    }
  }
}

TEST_CASE("every GPU, head dim and set of traits has rows for each gradient") {
  for (const char* name : {"sm_60", "sm_61", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90a", "sm_120a"}) {
    const Arch arch = arch_of(name);
    for (const Operation operation : {Operation::delta, Operation::grad_query, Operation::grad_key_value,
                                      Operation::grad_bias, Operation::round_query}) {
      for (const Traits& traits : kTraits) {
        for (const int dim : {1, 32, 33, 64, 65, 128, 129, 256, 257, kMaxHeadDim}) {
          const Problem problem{.operation = operation,
                                .dtype = DType::f32,
                                .output_dtype = DType::f32,
                                .head_dim = dim,
                                .head_dim_v = kMaxHeadDim + 1 - dim,
                                .blocks = traits.blocks,
                                .keys = traits.keys,
                                .bias = traits.bias ? Bias::f32 : Bias::none,
                                .dropout = traits.dropout};
          const auto choice = codegen::choose(problem, arch);
          CHECK_MESSAGE(choice.ok(), name << " " << codegen::to_string(problem));
        }
      }
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
  for (int i = 1; i < argc; ++i) {
    const char* next = i + 1 < argc ? argv[i + 1] : "";
    if (std::strcmp(argv[i], "--wide") == 0) wide = true;
    if (std::strcmp(argv[i], "--seed") == 0) seed = std::strtoull(next, nullptr, 10);
    if (std::strcmp(argv[i], "--only") == 0) only = next;
  }
  if (const auto compiler = runtime::nvrtc_compiler(*codegen::arch_from_name("sm_90a")); !compiler.ok()) {
    std::printf("skipped: %s\n", compiler.failure().message.c_str());
    return 77;
  }
  return doctest::Context(argc, argv).run();
}
