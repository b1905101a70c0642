// attune bench: how long each candidate takes for a problem on a device; --tune keeps the fastest as the
// choice.
#include "codegen/choose.h"
#include "runtime/engine.h"
#include "tools/bench_problem.h"
#include "tools/bench_race.h"
#include "tools/command.h"
#include "tools/console.h"
#include "tools/device_option.h"
#include "tools/parallel.h"
#include "tools/problem_list.h"
#include "tools/table.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

namespace attune::tools {
namespace {

using nlohmann::json;

struct BenchOptions {
  std::string list;
  std::vector<std::string> problems;
  std::string device = "auto";
  BenchExtents extents;
  bool tune = false;
};

struct Contender {
  const codegen::Candidate* candidate;
  std::shared_ptr<runtime::Kernel> kernel;
  double microseconds = 0;
};

/// What was found out about one problem.
struct Measured {
  codegen::Problem problem;
  std::string extents;
  std::string chosen;                     // that calls take
  std::vector<Contender> contenders;      // the usual choice first
  std::vector<std::string> disqualified;  // and why
  std::size_t winner = 0;
};

// ---- Measuring ----

/// The kernels that can be had, the others' reasons in `disqualified`. The usual choice must be among them.
Result<std::vector<Contender>> load(const codegen::Problem& problem, Device device, runtime::Engine& engine,
                                    std::vector<std::string>& disqualified) {
  ATTUNE_ASSIGN(backend, runtime::backend_of(device));
  const auto rows = codegen::contenders(problem, backend->arch());
  if (rows.empty()) ATTUNE_TRY(codegen::choose(problem, backend->arch()));  // which says why
  std::vector<std::optional<Result<std::shared_ptr<runtime::Kernel>>>> loaded(rows.size());
  parallel_for(rows.size(), default_jobs(),
               [&](std::size_t i) { loaded[i] = engine.kernel_of(*rows[i], problem, device); });
  std::vector<Contender> contenders;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (loaded[i]->ok()) {
      contenders.push_back({rows[i], **loaded[i]});
    } else if (i == 0) {
      return loaded[i]->failure();
    } else {
      disqualified.push_back(fmt::format("{}: {}", rows[i]->name, loaded[i]->failure().message));
    }
  }
  return contenders;
}

/// Whoever's output is not the usual choice's is out.
Result<void> compare(BenchProblem& problem, Measured& measured) {
  const char* const usual_name = measured.contenders.front().candidate->name;
  std::vector<float> usual;
  std::vector<Contender> right;
  for (Contender& contender : measured.contenders) {
    ATTUNE_TRY(problem.poison_output());
    ATTUNE_TRY(contender.kernel->forward(problem.call().params, nullptr));
    ATTUNE_ASSIGN(output, problem.output());
    if (usual.empty()) usual = output;
    if (agree(usual, output, problem.problem().dtype)) {
      right.push_back(std::move(contender));
    } else {
      measured.disqualified.push_back(
          fmt::format("{}: its output is not that of {}", contender.candidate->name, usual_name));
    }
  }
  if (right.empty())
    return internal_failure(fmt::format("{} computes numbers that are not finite", usual_name));
  measured.contenders = std::move(right);
  return done();
}

Result<Measured> measure(const codegen::Problem& wanted, const BenchOptions& options, Device device,
                         runtime::Engine& engine) {
  ATTUNE_ASSIGN(problem, BenchProblem::make(wanted, options.extents, device));
  ATTUNE_ASSIGN(backend, runtime::backend_of(device));
  ATTUNE_ASSIGN(explanation, engine.explain(problem.problem(), backend->arch(), device));
  Measured measured{
      .problem = problem.problem(), .extents = problem.text(), .chosen = explanation.choice.candidate->name};
  ATTUNE_ASSIGN(contenders, load(problem.problem(), device, engine, measured.disqualified));
  measured.contenders = std::move(contenders);
  ATTUNE_TRY(compare(problem, measured));
  ATTUNE_ASSIGN(microseconds, race(measured.contenders.size(), [&](std::size_t i, int calls) {
                  runtime::Kernel& kernel = *measured.contenders[i].kernel;
                  return backend->microseconds(
                      calls, [&] { return kernel.forward(problem.call().params, nullptr); });
                }));
  for (std::size_t i = 0; i < microseconds.size(); ++i) measured.contenders[i].microseconds = microseconds[i];
  measured.winner = winner_of(microseconds);
  return measured;
}

runtime::TunedChoice choice_of(const Measured& measured) {
  runtime::TunedChoice choice{.candidate = measured.contenders[measured.winner].candidate->name,
                              .timings = {},
                              .measured_on = measured.extents};
  for (const Contender& contender : measured.contenders) {
    choice.timings.push_back({contender.candidate->name, contender.microseconds});
  }
  return choice;
}

// ---- The report ----

json to_json(const Measured& measured) {
  json object = runtime::to_json(choice_of(measured));
  object["problem"] = codegen::to_string(measured.problem);
  object["chosen"] = measured.chosen;
  object["disqualified"] = measured.disqualified;
  return object;
}

std::string to_text(const Measured& measured) {
  const auto& contenders = measured.contenders;
  Table table({"candidate", ">us", ">of the fastest", ""});
  const double best = std::ranges::min(contenders, {}, &Contender::microseconds).microseconds;
  for (std::size_t i = 0; i < contenders.size(); ++i) {
    const auto& [candidate, kernel, microseconds] = contenders[i];
    std::string remark = measured.chosen == candidate->name ? "chosen so far" : "";
    if (i == measured.winner) remark += remark.empty() ? "fastest" : ", fastest";
    table.row({candidate->name, fmt::format("{:.1f}", microseconds),
               fmt::format("{:.2f}", microseconds / best), remark});
  }
  std::string text =
      fmt::format("{}\n{}\n{}", codegen::to_string(measured.problem), measured.extents, table.text());
  for (const std::string& line : measured.disqualified) text += fmt::format("out: {}\n", printable(line));
  return text;
}

// ---- The command ----

Result<std::vector<codegen::Problem>> problems_of(const BenchOptions& options, const codegen::Arch& arch) {
  std::vector<codegen::Problem> problems;
  const auto add = [&](std::string_view text, const std::string& origin) -> Result<void> {
    ATTUNE_ASSIGN(parsed, parse_problem_list(text, origin, arch));
    for (const codegen::Problem& problem : parsed) {
      if (std::ranges::find(problems, problem) == problems.end()) problems.push_back(problem);
    }
    return done();
  };
  if (!options.list.empty()) {
    ATTUNE_ASSIGN(text, read_list(options.list));
    ATTUNE_TRY(add(text, options.list));
  }
  for (const std::string& problem : options.problems) ATTUNE_TRY(add(problem, "--problem"));
  if (problems.empty()) return invalid_argument("no problem to measure: give a LIST or --problem");
  return problems;
}

Result<void> check_choices_are_kept(runtime::Engine& engine) {
  cache::Store& store = engine.store();
  if (store.mode() == cache::Mode::rw && store.writable()) return done();
  return environment_failure(
      "no later process would find the choice: set ATTUNE_CACHE_DIR, or HOME, to a folder that can be "
      "written, and leave ATTUNE_CACHE_MODE at rw");
}

Result<int> bench(const BenchOptions& options, bool as_json) {
  ATTUNE_ASSIGN(device, parse_device(options.device));
  ATTUNE_ASSIGN(backend, runtime::backend_of(device));
  ATTUNE_ASSIGN(problems, problems_of(options, backend->arch()));
  ATTUNE_ASSIGN(engine, runtime::Engine::global());
  if (options.tune) ATTUNE_TRY(check_choices_are_kept(*engine));
  json all = json::array();
  for (const codegen::Problem& problem : problems) {
    ATTUNE_ASSIGN(measured, measure(problem, options, device, *engine));
    if (options.tune) ATTUNE_TRY(engine->keep(choice_of(measured), measured.problem, device));
    if (!as_json) {
      ATTUNE_TRY(print(fmt::format("{}{}\n", to_text(measured),
                                   options.tune ? "kept: " + choice_of(measured).candidate + "\n" : "")));
    }
    all.push_back(to_json(measured));
  }
  if (engine->store().counters().store_errors > 0) {
    return environment_failure(
        fmt::format("{} could not be written; `attune doctor` says why", engine->store().root().string()));
  }
  if (as_json) {
    ATTUNE_TRY(print_json(
        {{"device", backend->description()}, {"kept", options.tune}, {"problems", std::move(all)}}));
  }
  return kOk;
}

}  // namespace

void add_bench(CLI::App& app, Session& session) {
  auto options = std::make_shared<BenchOptions>();
  CLI::App* command = app.add_subcommand(
      "bench", "How long each candidate takes for a problem; --tune makes the fastest the choice");
  command->add_option("LIST", options->list,
                      "Problems, one a line (ATTUNE_RECORD writes them) or a JSON array");
  command->add_option("--problem", options->problems, "One more problem, as for `attune explain`")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command->add_option("--device", options->device, "auto, cpu, cuda or cuda:N")->capture_default_str();
  const auto extent = [&](const char* name, std::int64_t& value, const char* what) {
    command->add_option(name, value, what)->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 24));
  };
  extent("--batch", options->extents.batch,
         "Batch entries, or packed sequences; this and the others have typical defaults");
  extent("--heads", options->extents.heads, "Heads of the query");
  extent("--key-heads", options->extents.key_heads, "Heads of key and value; the query's by default");
  extent("--queries", options->extents.queries, "Queries of a batch entry or sequence");
  extent("--keys", options->extents.keys, "Its keys; as many as queries by default");
  command->add_flag("--tune", options->tune,
                    "Note the fastest in the cache: later processes on such a device choose it");
  command->callback([options, &session] {
    session.action = [options, &session] { return bench(*options, session.json); };
  });
}

}  // namespace attune::tools
