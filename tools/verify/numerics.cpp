#include "tools/verify/numerics.h"

#include "codegen/emit.h"
#include "codegen/names.h"
#include "runtime/engine.h"
#include "tools/console.h"
#include "tools/parallel.h"
#include "tools/table.h"
#include "tools/verify/case.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <memory>
#include <set>
#include <span>
#include <tuple>

namespace attune::verify {
namespace {

using codegen::name_of;
using codegen::Problem;

constexpr int kMostClasses = 512;  // kernels to compile: the larger part of the time
constexpr int kFewestClasses = 64;
constexpr int kBatch = 64;  // cases in memory at a time

/// A kernel serves about four cases, and a backward pass has half a dozen of them; in small runs fewer: those
/// are to see many classes.
int classes_of(const NumericsOptions& options) {
  const int cases_of_class = options.pass == Pass::forward ? 4 : 24;
  return std::clamp(options.cases / cases_of_class, std::min(options.cases, kFewestClasses), kMostClasses);
}

Result<void> check(const NumericsOptions& options) {
  if (options.cases < 1) return invalid_argument(fmt::format("{} cases: expected 1 or more", options.cases));
  if (options.only && (*options.only < 0 || *options.only >= options.cases)) {
    return invalid_argument(fmt::format("there is no case {} of {}: expected 0 to {}", *options.only,
                                        options.cases, options.cases - 1));
  }
  return done();
}

/// "" when the family has kernels for the problem, with the query's gradient apart or added up; else why not.
std::string why_not(kernel::Family family, Problem problem, const codegen::Arch& arch) {
  const auto reasons = codegen::not_supported_reasons(family, problem, arch);
  if (reasons.empty()) return "";
  problem.query_gradient = kernel::QueryGradient::atomic;
  return codegen::not_supported_reasons(family, problem, arch).empty() ? "" : reasons.front();
}

/// The families of the run; those that the device has when none is asked for.
Result<std::vector<kernel::Family>> families_of(const NumericsOptions& options, const codegen::Arch& arch) {
  std::vector<kernel::Family> families;
  for (const Family family : options.families) {
    families.push_back(static_cast<kernel::Family>(static_cast<int>(family) - 1));
  }
  const bool forward = options.pass == Pass::forward;
  const Problem usual{.operation = forward ? kernel::Operation::forward : kernel::Operation::grad_key_value,
                      .dtype = kernel::DType::f16,
                      .output_dtype = kernel::DType::f16,
                      .head_dim = 64,
                      .head_dim_v = 64,
                      .boxes = 1};
  ATTUNE_ASSIGN(choice, codegen::choose(usual, arch));
  for (const codegen::Verdict& verdict : choice.verdicts) {
    if (options.families.empty() && why_not(verdict.family, usual, arch).empty()) {
      families.push_back(verdict.family);
    }
  }
  for (const kernel::Family family : families) {
    const std::string reason = why_not(family, usual, arch);
    if (!reason.empty()) return unsupported(fmt::format("{}: {}", name_of(family), reason));
  }
  return families;
}

class Run {
 public:
  Run(const NumericsOptions& options, runtime::Engine& engine, const codegen::Arch& arch)
      : options_(options), engine_(engine), arch_(arch), arena_(options.device) {
    report_.seed = options.seed;
  }

  Result<NumericsReport> go(std::span<const kernel::Family> families) {
    const auto begin = std::chrono::steady_clock::now();
    const Counters before = engine_.counters();
    Random random(options_.seed);
    ATTUNE_ASSIGN(classes, random_classes(random, classes_of(options_), arch_, families, options_.pass));
    classes_ = std::move(classes);
    ATTUNE_TRY(prepare());
    const Counters prepared = engine_.counters();
    run_all();
    const Counters after = engine_.counters();
    report_.kernels = prepared.loads - before.loads;
    report_.compiles = after.compiles - before.compiles;
    report_.launches = after.launches - prepared.launches;
    if (after.loads != prepared.loads) {
      report_.failures.push_back(fmt::format(
          "{} kernels were loaded by cases whose class has its kernel: a run-time extent, a stride or "
          "an alignment is in a key",
          after.loads - prepared.loads));
    }
    report_.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    return std::move(report_);
  }

 private:
  /// Compiles and loads every kernel that the cases need, on all cores.
  Result<void> prepare() {
    std::vector<Problem> problems;
    std::set<std::string> specs;
    for (const KernelClass& one : classes_) {
      if (options_.only && &class_of(*options_.only) != &one) continue;
      for (const Problem& problem : problems_of(one, arch_)) {
        ATTUNE_ASSIGN(choice, codegen::choose(problem, arch_));
        if (specs.insert(codegen::describe(choice.spec)).second) problems.push_back(problem);
      }
    }
    report_.specs = specs.size();
    std::vector<Result<void>> results(problems.size(), done());
    tools::parallel_for(problems.size(), tools::default_jobs(), [&](std::size_t i) {
      results[i] = engine_.prepare(problems[i], options_.device);
      progress("kernel");
    });
    for (std::size_t i = 0; i < problems.size(); ++i) {
      if (results[i].ok()) continue;
      Failure failure = results[i].failure();
      failure.message = fmt::format("{}: {}", codegen::to_string(problems[i]), failure.message);
      return failure;
    }
    return done();
  }

  void run_all() {
    const int first = options_.only.value_or(0);
    const int end = options_.only ? first + 1 : options_.cases;
    for (int begin = first; begin < end; begin += kBatch) run_batch(begin, std::min(begin + kBatch, end));
  }

  void run_batch(int begin, int end) {
    const auto count = static_cast<std::size_t>(end - begin);
    std::vector<std::unique_ptr<Case>> cases(count);
    std::vector<std::string> wrong(count);
    const auto on_all_cores = [&](const auto& work) {
      tools::parallel_for(count, tools::default_jobs(), work);
    };
    on_all_cores([&](std::size_t i) { cases[i] = draw(begin + static_cast<int>(i)); });
    for (std::size_t i = 0; i < count; ++i) wrong[i] = run(*cases[i]);
    on_all_cores([&](std::size_t i) {
      if (wrong[i].empty()) wrong[i] = cases[i]->verdict();
    });
    for (std::size_t i = 0; i < count; ++i) tally(begin + static_cast<int>(i), *cases[i], wrong[i]);
  }

  const KernelClass& class_of(int index) const { return classes_[index % classes_.size()]; }

  /// Every case has random numbers of its own, so that one alone can be drawn again.
  std::unique_ptr<Case> draw(int index) const {
    Random random(options_.seed, 1 + static_cast<std::uint64_t>(index));
    const KernelClass& one = class_of(index);
    std::vector<const MaskClass*> served;
    for (const MaskClass& mask : mask_classes()) {
      if (serves(one.problem, mask)) served.push_back(&mask);
    }
    const bool first = index < static_cast<int>(classes_.size()) || served.empty();
    return random_case(random, one, first ? one.mask : random.pick(served));
  }

  /// "" when the call succeeded and ran what it should have.
  std::string run(Case& one) {
    const std::uint64_t launches = engine_.counters().launches;
    try {
      one.run(arena_);
    } catch (const Error& error) {
      return fmt::format("threw: {}", error.what());
    }
    const auto launched = static_cast<int>(engine_.counters().launches - launches);
    const int most = one.launches();
    if (launched > most || launched < most - one.spared_launches()) {
      return fmt::format("{} launches, expected {}", launched, most);
    }
    if (launched == 0) return "";
    const auto expected = codegen::choose(one.last(arch_), arch_);
    if (!expected.ok()) return expected.failure().message;
    if (last_kernel() == expected->candidate->name) return "";
    return fmt::format("{} ran, expected {}", last_kernel(), expected->candidate->name);
  }

  void tally(int index, const Case& one, const std::string& wrong) {
    ++report_.cases;
    const auto add = [&](Tally& tally) {
      ++tally.cases;
      tally.failed += wrong.empty() ? 0 : 1;
    };
    std::map<std::string, std::string> values;
    for (const auto& [aspect, value] : one.aspects) {
      add(report_.tallies[aspect][value]);
      values[aspect] = value;
    }
    add(report_.coverage[one.bias][values["family"]][values["type"]]);
    if (!wrong.empty()) report_.failures.push_back(fmt::format("case {}: {}: {}", index, one.name, wrong));
    progress("case");
  }

  void progress(const char* what) const {
    if (options_.progress) options_.progress(what);
  }

  const NumericsOptions& options_;
  runtime::Engine& engine_;
  const codegen::Arch& arch_;
  Arena arena_;
  std::vector<KernelClass> classes_;
  NumericsReport report_;
};

std::string text_of(const Tally& tally) {
  if (tally.failed == 0) return fmt::format("{}", tally.cases);
  return fmt::format("{} ({} wrong)", tally.cases, tally.failed);
}

nlohmann::json json_of(const Tally& tally) {
  return {{"cases", tally.cases}, {"failed", tally.failed}};
}

}  // namespace

std::size_t numerics_steps(const NumericsOptions& options) {
  // Classes may share a kernel, and a merge has up to three: good enough for a percentage.
  const int kernels = options.pass == Pass::forward ? 1 : 5;
  if (options.only) return static_cast<std::size_t>(kernels) + 1;
  return static_cast<std::size_t>(kernels * classes_of(options) + options.cases);
}

Result<NumericsReport> verify_numerics(const NumericsOptions& options) {
  ATTUNE_TRY(check(options));
  ATTUNE_ASSIGN(engine, runtime::Engine::global());
  ATTUNE_ASSIGN(backend, runtime::backend_of(options.device));
  ATTUNE_ASSIGN(families, families_of(options, backend->arch()));
  return Run(options, *engine, backend->arch()).go(families);
}

std::string text_of(const NumericsReport& report) {
  std::string text;
  std::set<std::pair<std::string, std::string>> columns;
  for (const auto& [bias, families] : report.coverage) {
    for (const auto& [family, types] : families) {
      for (const auto& [type, tally] : types) columns.insert({family, type});
    }
  }
  std::vector<std::string> headings{"bias"};
  for (const auto& [family, type] : columns) headings.push_back(fmt::format(">{} {}", family, type));
  tools::Table coverage(headings);
  for (const auto& [bias, families] : report.coverage) {
    std::vector<std::string> row{bias};
    for (const auto& [family, type] : columns) {
      const auto types = families.find(family);
      const bool ran = types != families.end() && types->second.contains(type);
      row.push_back(ran ? text_of(types->second.at(type)) : "");
    }
    coverage.row(row);
  }
  text += coverage.text() + "\n";

  tools::Table aspects({"aspect", "value", ">cases"});
  for (const auto& [aspect, values] : report.tallies) {
    if (aspect == "bias") continue;
    for (const auto& [value, tally] : values) aspects.row({aspect, value, text_of(tally)});
  }
  text += aspects.text() + "\n";
  for (const std::string& failure : report.failures) {
    text += fmt::format("{} {}\n", tools::paint("wrong:", tools::Colour::red, tools::Stream::out), failure);
  }
  text += fmt::format(
      "{} cases, {} wrong; {} kernels for {} specs, {} of them compiled now; {} launches; {}; seed {}\n",
      report.cases, report.failures.size(), report.kernels, report.specs, report.compiles, report.launches,
      tools::duration_text(std::chrono::duration<double>(report.seconds)), report.seed);
  return text;
}

nlohmann::json json_of(const NumericsReport& report) {
  nlohmann::json json{{"seed", report.seed},         {"cases", report.cases},
                      {"failures", report.failures}, {"specs", report.specs},
                      {"kernels", report.kernels},   {"compiles", report.compiles},
                      {"launches", report.launches}, {"seconds", report.seconds}};
  for (const auto& [aspect, values] : report.tallies) {
    for (const auto& [value, tally] : values) json["tallies"][aspect][value] = json_of(tally);
  }
  for (const auto& [bias, families] : report.coverage) {
    for (const auto& [family, types] : families) {
      for (const auto& [type, tally] : types) json["coverage"][bias][family][type] = json_of(tally);
    }
  }
  return json;
}

}  // namespace attune::verify
