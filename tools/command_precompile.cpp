// attune precompile: fills the cache ahead of time, for any architecture, on all cores; or says what is in it
// and what is not. What was compiled is in the cache at once, so whoever ends it, the next run does the rest.
#include "tools/command.h"
#include "tools/interrupt.h"
#include "tools/parallel.h"
#include "tools/precompile.h"
#include "tools/presets.h"
#include "tools/problem_list.h"
#include "tools/table.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <chrono>
#include <cstdio>
#include <memory>

namespace attune::tools {
namespace {

using nlohmann::json;

// ---- --list ----

std::string head_dims_text(const Preset& preset) {
  std::vector<std::string> texts;
  for (const auto& [key, value] : preset.head_dims) {
    texts.push_back(key == value ? std::to_string(key) : fmt::format("{}/{}", key, value));
  }
  return fmt::format("{}", fmt::join(texts, " "));
}

/// The presets there are.
Result<int> list_presets(bool as_json) {
  ATTUNE_ASSIGN(known, presets());
  Table table({"preset", "head dims", "types", "models"});
  json array = json::array();
  for (const Preset& preset : known) {
    table.row({preset.name, head_dims_text(preset), fmt::format("{}", fmt::join(preset.dtypes, " ")),
               preset.models});
    array.push_back({{"name", preset.name},
                     {"models", preset.models},
                     {"head_dims", preset.head_dims},
                     {"dtypes", preset.dtypes},
                     {"sources", preset.sources}});
  }
  ATTUNE_TRY(as_json ? print_json({{"presets", std::move(array)}}) : print(table.text()));
  return kOk;
}

/// What is asked for as a list that precompile reads, for any architecture.
Result<int> list_problems(const PrecompileOptions& options, bool as_json) {
  ATTUNE_ASSIGN(sources, problem_sources(options));
  if (sources.empty()) return list_presets(as_json);
  std::string text;
  json problems = json::array();
  for (const ProblemSource& source : sources) {
    ATTUNE_ASSIGN(lines, problem_lines(source.text, source.origin));
    text += fmt::format("# {}\n", source.origin);
    for (const std::string& line : source.about) text += fmt::format("# {}\n", line);
    for (const std::string& line : lines) {
      text += line + '\n';
      problems.push_back(line);
    }
  }
  ATTUNE_TRY(as_json ? print_json({{"problems", std::move(problems)}}) : print(text));
  return kOk;
}

// ---- --check ----

Result<void> check_cache_is_read(cache::Store& store) {
  if (store.mode() == cache::Mode::rw || store.mode() == cache::Mode::ro) return done();
  return environment_failure(
      "no program would read the cache: set ATTUNE_CACHE_DIR, or HOME, and ATTUNE_CACHE_MODE to rw or ro");
}

Result<int> check(std::vector<Job>& jobs, int threads, runtime::Engine& engine, bool as_json) {
  ATTUNE_TRY(check_cache_is_read(engine.store()));
  plan(jobs, threads, engine);
  die_if_interrupted();
  const Check outcome = check_of(jobs);
  ATTUNE_TRY(as_json ? print_json(to_json(outcome)) : print(to_text(outcome)));
  const int failed = exit_code_of(jobs);
  return failed == kOk && !outcome.missing.empty() ? kWrongResult : failed;
}

// ---- Compiling ----

/// Kernels that nothing would keep are not worth compiling.
Result<void> check_cache_is_written(cache::Store& store) {
  if (store.mode() == cache::Mode::rw || store.mode() == cache::Mode::refresh) return done();
  return environment_failure(
      "the cache is not written: set ATTUNE_CACHE_DIR, or HOME, and leave ATTUNE_CACHE_MODE at rw");
}

Result<int> compile(std::vector<Job>& jobs, int threads, runtime::Engine& engine, bool as_json) {
  ATTUNE_TRY(check_cache_is_written(engine.store()));
  const auto begin = std::chrono::steady_clock::now();
  plan(jobs, threads, engine);
  run(jobs, threads, engine);
  Summary summary = summary_of(jobs);
  summary.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  summary.store_errors = engine.store().counters().store_errors;
  ATTUNE_TRY(as_json ? print_json(to_json(jobs, summary)) : print(to_text(jobs, summary)));
  if (summary.store_errors > 0) {
    return environment_failure(
        fmt::format("{} could not be written; `attune doctor` says why", engine.store().root().string()));
  }
  if (interrupted()) fmt::print(stderr, "attune: interrupted; the same command compiles what is left\n");
  die_if_interrupted();
  return exit_code_of(jobs);
}

Result<int> precompile(const PrecompileOptions& options, bool as_json) {
  if (options.only_list) return list_problems(options, as_json);
  ATTUNE_ASSIGN(jobs, jobs_of(options));
  ATTUNE_ASSIGN(engine, runtime::Engine::global());
  watch_interrupts();
  return (options.check ? check : compile)(jobs, options.jobs, *engine, as_json);
}

CLI::Option* add_names(CLI::App& command, const char* name, std::vector<std::string>& names,
                       const char* what) {
  return command.add_option(name, names, what)
      ->delimiter(',')
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
}

}  // namespace

void add_precompile(CLI::App& app, Session& session) {
  auto options = std::make_shared<PrecompileOptions>();
  options->jobs = default_jobs();
  CLI::App* command =
      app.add_subcommand("precompile", "Compile kernels ahead of time, with or without the device");
  command->add_option("LIST", options->list,
                      "Problems, one a line (ATTUNE_RECORD writes them) or a JSON array");
  command->add_option("--problem", options->problems, "One more problem, as for `attune explain`")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  add_names(*command, "--preset", options->presets,
            "Families of models: llama,bert; --list alone names them");
  add_names(*command, "--arch", options->archs, "Architectures: sm_90a,x86-64-v4 or native")
      ->capture_default_str();
  command->add_option("--jobs", options->jobs, "Compilers at a time")
      ->check(CLI::Range(1, 1024))
      ->default_str("one for each CPU");
  CLI::Option* list =
      command->add_flag("--list", options->only_list,
                        "Print the problems, as a LIST for any architecture, and compile nothing");
  command
      ->add_flag("--check", options->check,
                 "Compile nothing; exit 1, with a list, when a program would have to")
      ->excludes(list);
  command->callback([options, &session] {
    session.action = [options, &session] { return precompile(*options, session.json); };
  });
}

}  // namespace attune::tools
