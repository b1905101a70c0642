// Choices that were measured: their record, the engine that follows them, and the race that makes them.
#include "runtime/tuned_choice.h"

#include "codegen/choose.h"
#include "codegen/emit.h"
#include "runtime/engine.h"
#include "tests/support/temp_dir.h"
#include "tools/bench_race.h"

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <set>
#include <string>
#include <utility>
#include <vector>

using namespace attune;
using namespace attune::runtime;

namespace {

constexpr codegen::Problem kProblem{.head_dim = 16, .head_dim_v = 16};

/// A device that exists in name alone.
struct FakeBackend final : Backend {
  explicit FakeBackend(std::string device, const char* target = "sm_90a")
      : name(std::move(device)), fake_arch(*codegen::arch_from_name(target)) {}

  const codegen::Arch& arch() const override { return fake_arch; }
  std::string description() const override { return name; }
  Result<codegen::CompilerId> compiler() override { return environment_failure("none"); }
  Result<Image> compile(const codegen::Unit&) override { return environment_failure("none"); }
  Result<std::unique_ptr<Kernel>> load(std::span<const std::byte>, const kernel::KernelSpec&) override {
    return environment_failure("none");
  }
  Result<double> microseconds(int, const std::function<Result<void>()>&) override {
    return environment_failure("none");
  }

  std::string name;
  codegen::Arch fake_arch;
};

const std::vector<codegen::EmbeddedFile> kTemplates{codegen::file_with_digest("attune/a.h", "int a;"),
                                                    codegen::file_with_digest("attune/b.h", "int b;")};

TunedChoice choice_of(const std::string& candidate) {
  return {.candidate = candidate,
          .timings = {{"usual", 3.5}, {candidate, 2.5}},
          .measured_on = "batch 1, heads 1, 16 queries, 16 keys"};
}

std::unique_ptr<Engine> open_engine(EngineOptions options) {
  auto engine = Engine::create(std::move(options));
  REQUIRE_MESSAGE(engine.ok(), engine.failure().message);
  return std::move(*engine);
}

}  // namespace

TEST_CASE("the contenders are all rows of the chosen family that give specs of their own") {
  const codegen::Arch arch = *codegen::arch_from_name("sm_90a");
  codegen::Problem problem{.dtype = kernel::DType::bf16,
                           .output_dtype = kernel::DType::bf16,
                           .head_dim = 64,
                           .head_dim_v = 64,
                           .boxes = 1};
  const auto rows = codegen::contenders(problem, arch);
  REQUIRE(rows.size() > 2);
  const auto usual = codegen::choose(problem, arch);
  REQUIRE(usual.ok());
  CHECK(rows.front() == usual->candidate);
  std::set<std::string> specs;
  for (const codegen::Candidate* row : rows) {
    CHECK(row->family == kernel::Family::sm90);
    CHECK(codegen::fits(*row, problem, arch));
    specs.insert(codegen::describe(codegen::spec_of(*row, problem)));
    const auto tuned = codegen::choose(problem, arch, row->name);
    REQUIRE(tuned.ok());
    CHECK(tuned->candidate == row);
    CHECK(tuned->spec == codegen::spec_of(*row, problem));
  }
  CHECK(specs.size() == rows.size());
  for (const char* other :
       {"mma_64x64x4_d64", "sm90_192x80_d129", ""}) {  // other families, and what is no row
    CHECK(codegen::choose(problem, arch, other)->candidate == usual->candidate);
  }
  problem.head_dim = 9999;
  CHECK(codegen::contenders(problem, arch).empty());
}

TEST_CASE("a record's key changes with everything that makes it stale") {
  const FakeBackend backend("NVIDIA H200 (sm_90a)");
  const Digest key = tuned_key(kProblem, backend, kTemplates);
  CHECK(tuned_key(kProblem, FakeBackend("NVIDIA H200 (sm_90a)"), kTemplates) == key);
  CHECK(tuned_key(kProblem, FakeBackend("NVIDIA H100 (sm_90a)"), kTemplates) != key);
  CHECK(tuned_key(kProblem, FakeBackend("NVIDIA H200 (sm_90a)", "sm_80"), kTemplates) != key);
  codegen::Problem other = kProblem;
  other.lse = kernel::Lse::write;
  CHECK(tuned_key(other, backend, kTemplates) != key);
  auto templates = kTemplates;
  templates[1] = codegen::file_with_digest("attune/b.h", "int c;");
  CHECK(tuned_key(kProblem, backend, templates) != key);
}

TEST_CASE("a record is read as it was written, and nothing else is read as one") {
  const FakeBackend backend("NVIDIA H200 (sm_90a)");
  const std::string candidate = codegen::contenders(kProblem, backend.arch()).back()->name;
  const cache::Entry entry = tuned_entry({}, choice_of(candidate), kProblem, backend);
  const auto read = tuned_choice_of(entry);
  REQUIRE(read.ok());
  CHECK(to_json(*read) == to_json(choice_of(candidate)));
  const auto metadata = nlohmann::json::parse(entry.metadata_json);
  CHECK(metadata["device"] == "NVIDIA H200 (sm_90a)");
  CHECK(metadata["problem"] == codegen::to_string(kProblem));
  CHECK(metadata["spec"]["head_dim"] == 16);

  for (const char* text : {"", "[]", "{}", R"({"kind": "kernel"})", R"({"kind": "tuned choice"})"}) {
    CAPTURE(text);
    CHECK_FALSE(tuned_choice_of({.key = {}, .metadata_json = text, .payload = {}}).ok());
  }
  for (const auto& [field, value] : std::vector<std::pair<const char*, nlohmann::json>>{
           {"candidate", 7},
           {"measured_on", nullptr},
           {"timings", "fast"},
           {"timings", {7}},
           {"timings", {{{"candidate", "a"}, {"microseconds", "soon"}}}}}) {
    CAPTURE(field);
    auto damaged = metadata;
    damaged[field] = value;
    CHECK_FALSE(tuned_choice_of({.key = {}, .metadata_json = damaged.dump(), .payload = {}}).ok());
  }
}

TEST_CASE("a later process follows the choice that was kept, if it is told nothing else") {
  const auto backend = backend_of(Device{});
  if (!backend.ok()) return;
  const codegen::Arch& arch = (*backend)->arch();
  const auto rows = codegen::contenders(kProblem, arch);
  REQUIRE(rows.size() >= 2);
  const test::TempDir dir;
  const EngineOptions options{.cache_root = dir.path()};
  const auto explained = [&](const EngineOptions& wanted) {
    auto explanation = open_engine(wanted)->explain(kProblem, arch, Device{});
    REQUIRE(explanation.ok());
    return std::move(*explanation);
  };
  CHECK(explained(options).choice.candidate == rows.front());
  CHECK_FALSE(explained(options).tuned);

  const auto engine = open_engine(options);
  REQUIRE(engine->keep(choice_of(rows.back()->name), kProblem, Device{}).ok());
  const Explanation tuned = explained(options);
  CHECK(tuned.choice.candidate == rows.back());
  REQUIRE(tuned.tuned);
  CHECK(tuned.tuned->measured_on == choice_of("").measured_on);
  // Without a device nobody knows what was measured on it.
  CHECK(engine->explain(kProblem, arch, std::nullopt)->choice.candidate == rows.front());

  EngineOptions ignoring = options;
  ignoring.follow_tuned = false;
  CHECK(explained(ignoring).choice.candidate == rows.front());

  // The plain kernel of a candidate that is gone, as a record of an unknown row is.
  REQUIRE(engine->keep(choice_of("cpu_that_was"), kProblem, Device{}).ok());
  CHECK(explained(options).choice.candidate == rows.front());
}

#if ATTUNE_HAVE_LLVM
TEST_CASE("calls run the choice, and looking for one that nobody made is no miss") {
  const auto rows = codegen::contenders(kProblem, (*backend_of(Device{}))->arch());
  const test::TempDir dir;
  const auto first = open_engine({.cache_root = dir.path()});
  REQUIRE(first->prepare(kProblem, Device{}).ok());
  CHECK(first->counters().cache_misses == 1);  // the kernel
  REQUIRE(first->keep(choice_of(rows.back()->name), kProblem, Device{}).ok());

  const auto second = open_engine({.cache_root = dir.path()});
  REQUIRE(second->prepare(kProblem, Device{}).ok());
  CHECK(second->counters().compiles == 1);  // the choice's kernel
  const auto unit = second->explain(kProblem, (*backend_of(Device{}))->arch(), Device{});
  REQUIRE(unit.ok());
  CHECK(unit->choice.candidate == rows.back());
  CHECK(std::string(unit->state) == "loaded");

  // Its kernel is gone and can't be made: the usual one runs.
  const auto third = open_engine({.cache_root = dir.path(), .jit = JitMode::never});
  std::filesystem::remove(second->store().path_of(unit->unit.key));
  REQUIRE(third->prepare(kProblem, Device{}).ok());
  CHECK(third->counters().compiles == 0);
}
#endif

TEST_CASE("a race takes turns, drops who is far behind, and prefers the usual choice among equals") {
  std::vector<std::vector<int>> calls(3);
  const std::vector<double> truth{100, 90, 400};
  int turn = 0;
  const auto stopwatch = [&](std::size_t i, int count) -> Result<double> {
    calls[i].push_back(count);
    const bool disturbed = ++turn % 5 == 0;  // one in five: medians don't see it
    return truth[i] * (disturbed ? 3 : 1);
  };
  const auto microseconds = tools::race(3, stopwatch);
  REQUIRE(microseconds.ok());
  CHECK((*microseconds)[0] == 100);
  CHECK((*microseconds)[1] == 90);
  CHECK((*microseconds)[2] >= 400);
  CHECK(calls[0].size() == calls[1].size());
  CHECK(calls[2].size() == 2);  // to warm up, and one turn
  CHECK(calls[0][0] == 1);
  CHECK(calls[0][1] == 20);
  CHECK(tools::winner_of(*microseconds) == 1);
  CHECK(tools::winner_of({100, 99, 98.5}) == 0);
  CHECK(tools::winner_of({100, 97, 96}) == 2);
  CHECK(tools::winner_of({5}) == 0);
  const auto failed =
      tools::race(2, [](std::size_t, int) -> Result<double> { return environment_failure("lost"); });
  REQUIRE_FALSE(failed.ok());
  CHECK(failed.failure().message == "lost");
}
