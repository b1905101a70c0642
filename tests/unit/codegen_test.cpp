// Problem, registry, printer and key: pure functions, tested without a device.
#include "codegen/arch.h"
#include "codegen/candidates.h"
#include "codegen/choose.h"
#include "codegen/embedded.h"
#include "codegen/emit.h"
#include "codegen/names.h"
#include "codegen/problem.h"
#include "codegen/unit.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <set>
#include <string>

using namespace attune;
using namespace attune::codegen;
using kernel::DType;
using kernel::Edge;
using kernel::Family;
using kernel::KernelSpec;
using kernel::Lse;

namespace {

Problem half_problem() {
  return {.dtype = DType::f16,
          .output_dtype = DType::f16,
          .head_dim = 64,
          .head_dim_v = 64,
          .window_right = Edge::bounded,
          .lse = Lse::write};
}

constexpr const char* kArchs[] = {"sm_60", "sm_61",  "sm_70",   "sm_75",   "sm_80",     "sm_86",
                                  "sm_89", "sm_90a", "sm_100a", "sm_120a", "x86-64-v3", "x86-64-v4"};

/// Each dtype plain, of few queries, with a window, with dropout, with both, with packed sequences, and with
/// all that a problem may have; head dims are open.
std::vector<Problem> everything() {
  std::vector<Problem> problems;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const Problem plain{.dtype = dtype, .output_dtype = dtype, .boxes = 1};
    Problem few = plain;
    few.extent = Extent::few_queries;
    Problem few_in_window = few;
    few_in_window.window_right = Edge::bounded;
    Problem small = plain;
    small.extent = Extent::few_tiles;
    Problem window = plain;
    window.window_right = Edge::bounded;
    Problem dropout = plain;
    dropout.dropout = kernel::Dropout::on;
    Problem dropout_in_window = window;
    dropout_in_window.dropout = kernel::Dropout::on;
    Problem varlen = plain;
    varlen.blocks = kernel::Blocks::varlen;
    Problem pages = varlen;
    pages.keys = kernel::Keys::paged;
    Problem bias = plain;
    bias.bias = kernel::Bias::f32;
    Problem half_bias = plain;
    half_bias.bias = kernel::Bias::f16;
    Problem bias_and_dropout = bias;
    bias_and_dropout.dropout = kernel::Dropout::on;
    problems.insert(problems.end(), {plain,
                                     few,
                                     few_in_window,
                                     small,
                                     window,
                                     dropout,
                                     dropout_in_window,
                                     varlen,
                                     pages,
                                     bias,
                                     half_bias,
                                     bias_and_dropout,
                                     {.dtype = dtype,
                                      .output_dtype = dtype,
                                      .window_left = Edge::bounded,
                                      .window_right = Edge::bounded,
                                      .blocks = kernel::Blocks::varlen,
                                      .keys = kernel::Keys::paged,
                                      .bias = kernel::Bias::boolean,
                                      .dropout = kernel::Dropout::on,
                                      .lse = Lse::write}});
  }
  return problems;
}

/// Rows end at a multiple of 8, and only being one sets a head dim apart: those, and one more each.
std::vector<int> head_dims() {
  std::vector<int> dims{1};
  for (int dim = 8; dim <= kernel::kMaxHeadDim; dim += 8) {
    dims.push_back(dim);
    if (dim < kernel::kMaxHeadDim) dims.push_back(dim + 1);
  }
  return dims;
}

std::vector<std::string> reasons_of(const Choice& choice, Family family) {
  const auto found = std::ranges::find(choice.verdicts, family, &Verdict::family);
  REQUIRE(found != choice.verdicts.end());
  return found->reasons;
}

Unit unit_with(const KernelSpec& spec, const char* arch, CompilerId compiler,
               std::span<const EmbeddedFile> headers = embedded_files()) {
  return make_unit(spec, *arch_from_name(arch), std::move(compiler), headers);
}

const CompilerId kCompiler{"nvrtc 13.0 abc", {"-std=c++20", "--no-cache"}};

/// Each operation of the backward pass for every problem, whether or not it makes sense.
std::vector<std::pair<Problem, Arch>> backward_problems() {
  std::vector<std::pair<Problem, Arch>> problems;
  for (const char* name : kArchs) {
    for (Problem problem : everything()) {
      for (const auto operation :
           {kernel::Operation::delta, kernel::Operation::grad_query, kernel::Operation::grad_key_value,
            kernel::Operation::grad_bias, kernel::Operation::round_query}) {
        problem.operation = operation;
        for (const int head_dim : {1, 16, 32, 64, 96, 128, 192, 256, 512}) {
          problem.head_dim = problem.head_dim_v = head_dim;
          for (const auto gradient : {kernel::QueryGradient::apart, kernel::QueryGradient::atomic,
                                      kernel::QueryGradient::ordered}) {
            problem.query_gradient = gradient;
            problems.emplace_back(problem, *arch_from_name(name));
          }
        }
      }
    }
  }
  return problems;
}

}  // namespace

TEST_CASE("an architecture's name gives its limits, and an unknown one gives the list of names") {
  CHECK(arch_from_name("sm_90a")->shared_bytes == 227 * 1024);
  CHECK(arch_from_name("sm_86")->sm == 86);
  CHECK(cuda_arch(90)->target == "sm_90a");
  CHECK(cuda_arch(89)->target == "sm_89");
  CHECK(cpu_arch(Isa::avx512)->target == "x86-64-v4");
  for (const char* bad : {"sm_", "sm_91", "sm_80a", "sm_9x", "sm_1234", "gfx942", ""}) {
    CAPTURE(bad);
    const auto arch = arch_from_name(bad);
    REQUIRE_FALSE(arch.ok());
    CHECK(arch.failure().kind == ErrorKind::invalid_argument);
    CHECK(arch.failure().message.find("x86-64-v4") != std::string::npos);
  }
  CHECK(cuda_arch(52).failure().message == "no kernels for compute capability 5.2: Attune knows 6.0 to 12.1");
}

TEST_CASE("a problem's text parses back to the problem") {
  const Problem problem = half_problem();
  CHECK(to_string(problem) == "dtype=f16 head_dim=64 window_right=bounded lse=write");
  CHECK(*parse_problem(to_string(problem)) == problem);
  const Problem odd{.dtype = DType::bf16,
                    .output_dtype = DType::f32,
                    .head_dim = 40,
                    .head_dim_v = 72,
                    .blocks = kernel::Blocks::varlen,
                    .keys = kernel::Keys::paged,
                    .bias = kernel::Bias::boolean,
                    .dropout = kernel::Dropout::on,
                    .align_bytes = 8,
                    .extent = Extent::few_tiles,
                    .families = only(Family::mma) | only(Family::simt)};
  CHECK(to_string(odd) ==
        "dtype=bf16 output_dtype=f32 head_dim=40 head_dim_v=72 blocks=varlen keys=paged bias=boolean "
        "dropout=on "
        "align_bytes=8 extent=few_tiles families=simt|mma");
  CHECK(*parse_problem(to_string(odd)) == odd);
  CHECK(parse_problem("families=any head_dim=8")->families == Families::any);
}

TEST_CASE("a merge's text has no head_dim, and its output's dtype follows") {
  const Problem merge{.operation = kernel::Operation::merge,
                      .dtype = DType::f16,
                      .output_dtype = DType::f16,
                      .head_dim_v = 64,
                      .lse = Lse::write};
  CHECK(to_string(merge) == "operation=merge dtype=f16 head_dim_v=64 lse=write");
  CHECK(*parse_problem(to_string(merge)) == merge);
}

TEST_CASE("a problem's text with a mistake names the word") {
  const auto message = [](const char* text) { return parse_problem(text).failure().message; };
  CHECK(message("dtype=f8 head_dim=64") == "problem: 'f8' is no value of dtype");
  CHECK(message("head_dim=64 dtype=f16 head_dim=32") == "problem: head_dim is there twice");
  CHECK(message("heads=4") == "problem: unknown field 'heads'");
  CHECK(message("head_dim=64x") == "problem: '64x' is no value of head_dim");
  CHECK(message("head_dim") == "problem: 'head_dim' is not name=value");
  CHECK(message("head_dim=64 families=mma|warp") == "problem: 'mma|warp' is no value of families");
  CHECK(message("") == "problem: head_dim=N is missing");
  CHECK(message("operation=merge") == "problem: head_dim_v=N is missing");
}

TEST_CASE("16-bit problems run on mma from sm_80, on simt before, and say why") {
  const auto ampere = choose(half_problem(), *arch_from_name("sm_80"));
  REQUIRE(ampere.ok());
  CHECK(ampere->spec.family == Family::mma);
  CHECK(reasons_of(*ampere, Family::mma).empty());

  const auto turing = choose(half_problem(), *arch_from_name("sm_75"));
  REQUIRE(turing.ok());
  CHECK(turing->spec.family == Family::simt);
  CHECK(reasons_of(*turing, Family::mma)[0] == "needs compute capability 8.0 or later, this GPU has 7.5");
}

TEST_CASE("a family that the call insists on and that cannot run fails with its reasons first") {
  Problem problem = half_problem();
  problem.dtype = DType::f32;
  problem.families = only(Family::mma);
  const auto choice = choose(problem, *arch_from_name("sm_90a"));
  REQUIRE_FALSE(choice.ok());
  CHECK(choice.failure().kind == ErrorKind::unsupported);
  CHECK(choice.failure().message.find("on sm_90a: no f32 kernels") != std::string::npos);
  CHECK(choice.failure().message.find("simt: the call allows mma alone") != std::string::npos);
}

TEST_CASE("a call may allow several families: the preferred one runs") {
  Problem problem = half_problem();
  problem.families = only(Family::simt) | only(Family::mma);
  CHECK(choose(problem, *arch_from_name("sm_90a"))->spec.family == Family::mma);
  problem.families = only(Family::simt);
  const auto choice = choose(problem, *arch_from_name("sm_90a"));
  CHECK(choice->spec.family == Family::simt);
  CHECK(reasons_of(*choice, Family::mma) == std::vector<std::string>{"the call allows simt alone"});
}

TEST_CASE("reasons name the features that a family lacks, and what it is not for at all") {
  const Arch hopper = *arch_from_name("sm_90a");
  Problem problem = half_problem();
  problem.blocks = kernel::Blocks::varlen;
  problem.keys = kernel::Keys::paged;
  problem.bias = kernel::Bias::f32;
  problem.dropout = kernel::Dropout::on;
  problem.boxes = 1;
  CHECK(not_supported_reasons(Family::sm90, problem, hopper) ==
        std::vector<std::string>{
            "no kernels with a bias tensor of packed sequences: their columns begin anywhere, "
            "the copy engine's at multiples of 16 bytes"});
  CHECK(not_supported_reasons(Family::cpu, problem, hopper) ==
        std::vector<std::string>{"cpu kernels do not run on cuda tensors"});
  CHECK(not_supported_reasons(Family::merge, problem, hopper) ==
        std::vector<std::string>{"no merge kernels for forward"});
  problem.operation = kernel::Operation::merge;
  CHECK(not_supported_reasons(Family::mma, problem, hopper) ==
        std::vector<std::string>{"no mma kernels for merge"});
}

TEST_CASE("head dims outside 1 to 512 are refused on every architecture") {
  for (const char* name : {"x86-64-v3", "x86-64-v4", "sm_60", "sm_75", "sm_90a"}) {
    for (const int head_dim : {0, 513}) {
      Problem problem{.head_dim = head_dim, .head_dim_v = 64};
      const auto choice = choose(problem, *arch_from_name(name));
      REQUIRE_FALSE(choice.ok());
      CHECK(choice.failure().message.find("is outside 1 to 512") != std::string::npos);
    }
  }
}

TEST_CASE("every problem finds a candidate on every architecture, within its shared memory") {
  for (const char* name : kArchs) {
    const Arch arch = *arch_from_name(name);
    for (Problem problem : everything()) {
      for (const int head_dim : head_dims()) {
        for (const int head_dim_v : {1, head_dim, kernel::kMaxHeadDim}) {
          problem.head_dim = head_dim;
          problem.head_dim_v = head_dim_v;
          problem.align_bytes = problem.head_dim % 8 == 0 ? 16 : kernel::size_of(problem.dtype);
          const auto choice = choose(problem, arch);
          REQUIRE_MESSAGE(choice.ok(), to_string(problem), " on ", name);
          CHECK(shared_bytes(choice->spec) <= std::max(arch.shared_bytes, 0));
        }
      }
    }
  }
}

TEST_CASE("every merge and its backward find a candidate on every architecture") {
  for (const auto operation : {kernel::Operation::merge, kernel::Operation::grad_merge}) {
    for (const char* name : kArchs) {
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        for (const int head_dim_v : head_dims()) {
          const Problem problem{.operation = operation, .dtype = dtype, .head_dim_v = head_dim_v};
          const auto choice = choose(problem, *arch_from_name(name));
          REQUIRE_MESSAGE(choice.ok(), to_string(problem), " on ", name);
          CHECK(choice->spec.operation == operation);
        }
      }
    }
  }
}

TEST_CASE("every backward problem finds a candidate on a CPU") {
  for (const auto& [problem, arch] : backward_problems()) {
    const bool has_gradient = problem.operation != kernel::Operation::grad_bias ||
                              (problem.bias != kernel::Bias::none && problem.bias != kernel::Bias::boolean);
    if (arch.backend != Backend::cpu || problem.operation == kernel::Operation::round_query ||
        problem.query_gradient != kernel::QueryGradient::apart || !has_gradient) {
      continue;
    }
    REQUIRE_MESSAGE(choose(problem, arch).ok(), to_string(problem), " on ", arch.target);
  }
}

TEST_CASE("sm90 adds up the query's gradient beside those of key and value; what it lacks goes to others") {
  const Arch hopper = *arch_from_name("sm_90a");
  Problem problem{.operation = kernel::Operation::grad_key_value,
                  .dtype = DType::bf16,
                  .output_dtype = DType::bf16,
                  .head_dim = 128,
                  .head_dim_v = 128,
                  .window_right = Edge::bounded,
                  .query_gradient = kernel::QueryGradient::atomic,
                  .boxes = 1};
  CHECK(query_gradient_of(problem, hopper, /*deterministic=*/false) == kernel::QueryGradient::atomic);
  CHECK(query_gradient_of(problem, hopper, /*deterministic=*/true) == kernel::QueryGradient::ordered);
  REQUIRE(choose(problem, hopper).ok());
  CHECK(choose(problem, hopper)->spec.family == Family::sm90);

  problem.dropout = kernel::Dropout::on;
  REQUIRE(choose(problem, hopper).ok());
  CHECK(choose(problem, hopper)->spec.family == Family::sm90);
  problem.dropout = kernel::Dropout::off;
  problem.blocks = kernel::Blocks::varlen;
  problem.query_gradient = kernel::QueryGradient::ordered;
  for (const auto& [head_dim, head_dim_v] : {std::pair{128, 128}, {256, 256}, {192, 128}, {64, 256}}) {
    problem.head_dim = head_dim;
    problem.head_dim_v = head_dim_v;
    REQUIRE(choose(problem, hopper).ok());
    CHECK(choose(problem, hopper)->spec.family == Family::sm90);
  }

  for (const auto bias : {kernel::Bias::none, kernel::Bias::f32, kernel::Bias::boolean}) {
    for (const auto dropout : {kernel::Dropout::off, kernel::Dropout::on}) {
      problem.bias = bias;
      problem.dropout = dropout;
      for (problem.head_dim = 8; problem.head_dim <= 256; problem.head_dim += 8) {
        problem.head_dim_v = problem.head_dim;
        CHECK(not_supported_reasons(Family::sm90, problem, hopper).empty());
      }
    }
  }
  problem.head_dim = problem.head_dim_v = 256;

  Problem local{problem};
  local.dropout = kernel::Dropout::off;
  local.window_left = local.window_right = kernel::Edge::bounded;
  for (const int head_dim : {64, 72}) {
    local.head_dim = local.head_dim_v = head_dim;
    CHECK(query_gradient_of(local, hopper, /*deterministic=*/true) == kernel::QueryGradient::ordered);
  }

  problem.bias = kernel::Bias::none;
  problem.keys = kernel::Keys::paged;
  CHECK(query_gradient_of(problem, hopper, /*deterministic=*/false) == kernel::QueryGradient::atomic);
  CHECK(query_gradient_of(problem, hopper, /*deterministic=*/true) == kernel::QueryGradient::ordered);
  CHECK(not_supported_reasons(Family::sm90, problem, hopper).empty());

  problem.query_gradient = kernel::QueryGradient::apart;
  problem.boxes = 0;
  CHECK(not_supported_reasons(Family::sm90, problem, hopper) ==
        std::vector<std::string>{
            "the copy engine cannot take the tensors: strides should be multiples of 16 bytes and not 0",
            "adds up the query's gradient: not for calls without it"});
}

TEST_CASE("sm90 sums up the gradient of a bias tensor, whatever it was added to") {
  const Arch hopper = *arch_from_name("sm_90a");
  Problem problem = half_problem();
  problem.operation = kernel::Operation::grad_bias;
  problem.boxes = 1;
  for (const auto bias : {kernel::Bias::f32, kernel::Bias::f16, kernel::Bias::bf16}) {
    for (const auto blocks : {kernel::Blocks::dense, kernel::Blocks::varlen}) {
      for (const auto dropout : {kernel::Dropout::off, kernel::Dropout::on}) {
        for (problem.head_dim = 8; problem.head_dim <= 256; problem.head_dim += 8) {
          problem.head_dim_v = problem.head_dim;
          problem.bias = bias;
          problem.blocks = blocks;
          problem.dropout = dropout;
          REQUIRE(choose(problem, hopper).ok());
          CHECK(choose(problem, hopper)->spec.family == Family::sm90);
        }
      }
    }
  }
}

TEST_CASE("a problem is large unless its queries or its tiles are few") {
  CHECK(extent_of(1000, 1025) == Extent::large);
  CHECK(extent_of(15, 1025) == Extent::large);  // 9 tiles each
  CHECK(extent_of(1000, 1024) == Extent::few_queries);
  CHECK(extent_of(129, 1) == Extent::few_queries);
  CHECK(extent_of(128, 128) == Extent::few_tiles);
  CHECK(extent_of(14, 1025) == Extent::few_tiles);
  CHECK(extent_of(1, 0) == Extent::few_tiles);
}

TEST_CASE("a row that is not for large problems serves none") {
  const Arch hopper = *arch_from_name("sm_90a");
  int others = 0;
  for (Problem problem : everything()) {
    for (const int head_dim : {32, 64, 96, 128, 192, 256}) {
      problem.head_dim = problem.head_dim_v = head_dim;
      const auto row = [&](Extent extent) {
        problem.extent = extent;
        return choose(problem, hopper)->candidate;
      };
      const Candidate* large = row(Extent::large);
      CHECK((large->extents & 1u) != 0);
      others += row(Extent::few_queries) != large || row(Extent::few_tiles) != large ? 1 : 0;
    }
  }
  CHECK(others > 0);
}

TEST_CASE(
    "what may be split has a kernel for parts of its keys on every GPU that runs mma, and another has none") {
  for (const char* name : kArchs) {
    const Arch arch = *arch_from_name(name);
    for (Problem problem : everything()) {
      for (const int head_dim : head_dims()) {
        problem.head_dim = problem.head_dim_v = head_dim;
        problem.split = kernel::Split::on;
        const bool expected = may_split_keys(problem) && arch.backend == Backend::cuda && arch.sm >= 80;
        const auto choice = choose(problem, arch);
        CHECK(choice.ok() == expected);
        if (choice.ok()) CHECK(choice->spec.family == Family::mma);
      }
    }
  }
  Problem problem = half_problem();
  CHECK(may_split_keys(problem));
  problem.families = only(Family::sm90);
  CHECK_FALSE(may_split_keys(problem));
  problem.split = kernel::Split::on;
  const Arch hopper = *arch_from_name("sm_90a");
  problem.boxes = 1;
  CHECK(not_supported_reasons(Family::sm90, problem, hopper).front() ==
        "no kernels with keys shared out over blocks");
}

TEST_CASE("candidate names are unique and every row is the choice for something") {
  std::set<std::string> names;
  for (const Candidate& row : candidates()) {
    CHECK(names.insert(row.name).second);
    CHECK(row.head_dim_max % 8 == 0);
  }

  std::set<std::string> chosen;
  for (const char* name : kArchs) {
    const Arch arch = *arch_from_name(name);
    std::vector<Problem> problems = everything();
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      for (const auto operation : {kernel::Operation::merge, kernel::Operation::grad_merge}) {
        problems.push_back({.operation = operation, .dtype = dtype, .output_dtype = dtype});
      }
    }
    for (Problem problem : problems) {
      for (const int head_dim : head_dims()) {
        problem.head_dim = merges(problem.operation) ? 0 : head_dim;
        problem.head_dim_v = head_dim;
        chosen.insert(choose(problem, arch)->candidate->name);
        problem.split = kernel::Split::on;
        if (const auto choice = choose(problem, arch); choice.ok()) chosen.insert(choice->candidate->name);
        problem.split = kernel::Split::off;
      }
    }
  }
  for (const auto& [problem, arch] : backward_problems()) {
    if (const auto choice = choose(problem, arch); choice.ok()) chosen.insert(choice->candidate->name);
  }
  for (const Candidate& row : candidates()) {
    CHECK_MESSAGE(chosen.contains(row.name), std::string(row.name), " is never chosen: dead tuning data");
  }
}

TEST_CASE("the key changes with every field of the spec") {
  const KernelSpec base = choose(half_problem(), *arch_from_name("sm_90a"))->spec;
  const Digest key = unit_with(base, "sm_90a", kCompiler).key;
  int fields = 0;
  kernel::for_each_field(base, [&](const char* name, const auto& value) {
    KernelSpec changed = base;
    kernel::for_each_field(changed, [&](const char* other, auto& field) {
      if (std::string(name) != other) return;
      using Field = std::remove_cvref_t<decltype(field)>;
      field = static_cast<Field>(static_cast<int>(value) == 0 ? 1 : 0);
    });
    ++fields;
    CHECK_MESSAGE(unit_with(changed, "sm_90a", kCompiler).key != key, name);
  });
  CHECK(fields == kernel::kKernelSpecFields);
}

TEST_CASE("the key changes with target, compiler, options and templates, and with nothing else") {
  const KernelSpec spec = choose(half_problem(), *arch_from_name("sm_90a"))->spec;
  const Digest key = unit_with(spec, "sm_90a", kCompiler).key;
  CHECK(unit_with(spec, "sm_90a", kCompiler).key == key);
  CHECK(unit_with(spec, "sm_90", kCompiler).key != key);
  CHECK(unit_with(spec, "sm_90a", {"nvrtc 13.1 abc", kCompiler.options}).key != key);
  CHECK(unit_with(spec, "sm_90a", {kCompiler.name, {"-std=c++20"}}).key != key);
  // Moving a character from one option to the next must not collide.
  CHECK(unit_with(spec, "sm_90a", {kCompiler.name, {"-std=c++20-", "-no-cache"}}).key != key);

  std::vector<EmbeddedFile> headers(embedded_files().begin(), embedded_files().end());
  const auto change = [&](std::string_view name) {
    std::vector<EmbeddedFile> changed = headers;
    const auto found = std::ranges::find(changed, name, &EmbeddedFile::name);
    REQUIRE(found != changed.end());
    *found = file_with_digest(name, "// changed\n");
    return unit_with(spec, "sm_90a", kCompiler, changed).key;
  };
  CHECK(change("attune/semantics.h") != key);
  CHECK(change("attune/cuda/ptx.cuh") != key);
  CHECK(change("attune/cpu/simd.h") == key);  // the other backend's
}

TEST_CASE("the key's fields name everything it hashes") {
  const KernelSpec spec = choose(half_problem(), *arch_from_name("sm_90a"))->spec;
  std::vector<std::string> tags;
  for (const auto& [tag, value] : key_fields(unit_with(spec, "sm_90a", kCompiler))) tags.push_back(tag);
  CHECK(tags ==
        std::vector<std::string>{"schema", "target", "spec", "source", "headers", "compiler", "options"});
}

TEST_CASE("templates are embedded byte for byte") {
  const auto files = embedded_files();
  CHECK(std::ranges::is_sorted(files, {}, &EmbeddedFile::name));
  const auto semantics = std::ranges::find(files, "attune/semantics.h", &EmbeddedFile::name);
  REQUIRE(semantics != files.end());
  std::FILE* file = std::fopen(ATTUNE_SOURCE_DIR "/templates/attune/semantics.h", "rb");
  REQUIRE(file != nullptr);
  std::string text(semantics->text.size() + 1, '\0');
  text.resize(std::fread(text.data(), 1, text.size(), file));
  std::fclose(file);
  CHECK(text == semantics->text);
}

TEST_CASE("every embedded digest is that of the embedded text, as keys take it on trust") {
  for (const EmbeddedFile& file : embedded_files()) {
    CAPTURE(file.name);
    CHECK(file.digest.hex() == sha256(file.text).hex());
  }
}
