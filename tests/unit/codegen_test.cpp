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
          .head_dim = 64,
          .head_dim_v = 64,
          .window_right = Edge::bounded,
          .lse = Lse::write};
}

Unit unit_with(const KernelSpec& spec, const char* arch, CompilerId compiler,
               std::span<const EmbeddedFile> headers = embedded_files()) {
  return make_unit(spec, *arch_from_name(arch), std::move(compiler), headers);
}

const CompilerId kCompiler{"nvrtc 13.0 abc", {"-std=c++20", "--no-cache"}};

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
  Problem odd{.dtype = DType::bf16, .head_dim = 40, .head_dim_v = 72, .align_bytes = 8, .force = Force::mma};
  CHECK(*parse_problem(to_string(odd)) == odd);
}

TEST_CASE("a problem's text with a mistake names the word") {
  const auto message = [](const char* text) { return parse_problem(text).failure().message; };
  CHECK(message("dtype=f8 head_dim=64") == "problem: 'f8' is no value of dtype");
  CHECK(message("heads=4") == "problem: unknown field 'heads'");
  CHECK(message("head_dim=64x") == "problem: '64x' is no value of head_dim");
  CHECK(message("head_dim") == "problem: 'head_dim' is not name=value");
  CHECK(message("") == "problem: head_dim=N is missing");
}

TEST_CASE("16-bit problems run on mma from sm_80, on simt before, and say why") {
  const auto ampere = choose(half_problem(), *arch_from_name("sm_80"));
  REQUIRE(ampere.ok());
  CHECK(ampere->spec.family == Family::mma);
  CHECK(ampere->verdicts[0].reasons.empty());

  const auto turing = choose(half_problem(), *arch_from_name("sm_75"));
  REQUIRE(turing.ok());
  CHECK(turing->spec.family == Family::simt);
  CHECK(turing->verdicts[0].reasons[0] == "needs compute capability 8.0 or later, this GPU has 7.5");
}

TEST_CASE("a forced family that cannot run fails with its reasons first") {
  Problem problem = half_problem();
  problem.dtype = DType::f32;
  problem.force = Force::mma;
  const auto choice = choose(problem, *arch_from_name("sm_90a"));
  REQUIRE_FALSE(choice.ok());
  CHECK(choice.failure().kind == ErrorKind::unsupported);
  CHECK(choice.failure().message.find("on sm_90a: no f32 kernels") != std::string::npos);
  CHECK(choice.failure().message.find("simt: the call forces mma") != std::string::npos);
}

TEST_CASE("head dims outside 1 to 256 are refused on every architecture") {
  for (const char* name : {"x86-64-v3", "x86-64-v4", "sm_60", "sm_75", "sm_90a"}) {
    for (const int head_dim : {0, 257}) {
      Problem problem{.head_dim = head_dim, .head_dim_v = 64};
      const auto choice = choose(problem, *arch_from_name(name));
      REQUIRE_FALSE(choice.ok());
      CHECK(choice.failure().message.find("is outside 1 to 256") != std::string::npos);
    }
  }
}

TEST_CASE("every problem finds a candidate on every architecture, within its shared memory") {
  for (const char* name : {"sm_60", "sm_61", "sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a",
                           "sm_120a", "x86-64-v3", "x86-64-v4"}) {
    const Arch arch = *arch_from_name(name);
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      for (int head_dim = 1; head_dim <= 256; ++head_dim) {
        for (const int head_dim_v : {1, head_dim, 256}) {
          const int align = head_dim % 8 == 0 ? 16 : kernel::size_of(dtype);
          const Problem problem{
              .dtype = dtype, .head_dim = head_dim, .head_dim_v = head_dim_v, .align_bytes = align};
          const auto choice = choose(problem, arch);
          REQUIRE_MESSAGE(choice.ok(), to_string(problem), " on ", name);
          CHECK(shared_bytes(choice->spec) <= std::max(arch.shared_bytes, 0));
        }
      }
    }
  }
}

TEST_CASE("candidate names are unique and every row is the choice for something") {
  std::set<std::string> names;
  for (const Candidate& row : candidates()) CHECK(names.insert(row.name).second);

  std::set<std::string> chosen;
  for (const char* name : {"sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a",
                           "sm_120a", "x86-64-v3", "x86-64-v4"}) {
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      for (int head_dim = 1; head_dim <= 256; ++head_dim) {
        for (const Edge edge : {Edge::open, Edge::bounded}) {
          const Problem problem{
              .dtype = dtype, .head_dim = head_dim, .head_dim_v = head_dim, .window_right = edge};
          chosen.insert(choose(problem, *arch_from_name(name))->candidate->name);
        }
      }
    }
  }
  for (const Candidate& row : candidates()) {
    CHECK_MESSAGE(chosen.contains(row.name), row.name, " is never chosen: dead tuning data");
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
    if (changed == base) return;  // an enumeration of one value so far
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
    found->text = "// changed\n";
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
