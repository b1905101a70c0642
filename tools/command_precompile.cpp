// attune precompile: fills the cache ahead of time, for any architecture, on all cores. One problem that
// fails does not stop the others.
#include "base/file.h"
#include "codegen/arch.h"
#include "runtime/engine.h"
#include "tools/command.h"
#include "tools/console.h"
#include "tools/device_option.h"
#include "tools/parallel.h"
#include "tools/problem_list.h"
#include "tools/table.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <memory>
#include <set>
#include <vector>

namespace attune::tools {
namespace {

using codegen::Arch;
using codegen::Problem;
using nlohmann::json;

struct PrecompileOptions {
  std::string list;
  std::vector<std::string> problems;
  std::vector<std::string> archs{"native"};
  int jobs = default_jobs();
};

struct Job {
  Problem problem;
  Arch arch;
  std::shared_ptr<const runtime::Obtained> obtained;  // null: failed
  std::string failure;

  std::string name() const { return fmt::format("{} {}", arch.target, codegen::to_string(problem)); }
};

/// What the list and the options ask for on an architecture.
Result<std::vector<Problem>> problems_of(const PrecompileOptions& options, std::string_view list,
                                         const Arch& arch) {
  ATTUNE_ASSIGN(problems, parse_problem_list(list, options.list, arch));
  for (const std::string& text : options.problems) {
    ATTUNE_ASSIGN(more, parse_problems(text, arch));
    for (const Problem& problem : more) {
      if (std::ranges::find(problems, problem) == problems.end()) problems.push_back(problem);
    }
  }
  if (problems.empty()) return invalid_argument("no problems: name a LIST or give --problem");
  return problems;
}

Result<std::vector<Job>> jobs_of(const PrecompileOptions& options) {
  std::vector<std::byte> list;
  if (!options.list.empty()) {
    auto bytes = read_file(options.list);
    if (!bytes.ok()) return invalid_argument(bytes.failure().message);
    list = std::move(*bytes);
  }
  const std::string_view text(reinterpret_cast<const char*>(list.data()), list.size());
  std::vector<Job> jobs;
  for (const std::string& name : options.archs) {
    ATTUNE_ASSIGN(arch, parse_arch(name));
    ATTUNE_ASSIGN(problems, problems_of(options, text, arch));
    for (const Problem& problem : problems) jobs.push_back({problem, arch, nullptr, {}});
  }
  return jobs;
}

/// Kernels that nothing would keep are not worth compiling.
Result<void> check_cache_is_written(cache::Store& store) {
  if (store.mode() == cache::Mode::rw || store.mode() == cache::Mode::refresh) return done();
  return environment_failure(
      "the cache is not written: set ATTUNE_CACHE_DIR, or HOME, and leave ATTUNE_CACHE_MODE at rw");
}

void run(std::vector<Job>& jobs, int threads, runtime::Engine& engine) {
  Progress progress(jobs.size());
  parallel_for(jobs.size(), threads, [&](std::size_t i) {
    auto obtained = engine.precompile(jobs[i].problem, jobs[i].arch);
    if (obtained.ok()) {
      jobs[i].obtained = std::move(*obtained);
    } else {
      jobs[i].failure = obtained.failure().message;
    }
    progress.advance(jobs[i].name());
  });
}

struct Summary {
  std::size_t kernels = 0;  // different ones; two problems may share a kernel
  std::size_t hits = 0;
  std::size_t compiled = 0;
  std::size_t failed = 0;
  std::uint64_t bytes = 0;
  std::uint64_t store_errors = 0;
  double seconds = 0;
};

Summary summary_of(const std::vector<Job>& jobs) {
  Summary summary;
  std::set<Digest> seen;
  for (const Job& job : jobs) {
    if (!job.obtained) {
      ++summary.failed;
    } else if (seen.insert(job.obtained->unit.key).second) {
      ++summary.kernels;
      ++(job.obtained->source == runtime::Source::disk ? summary.hits : summary.compiled);
      summary.bytes += job.obtained->image.size();
    }
  }
  return summary;
}

json to_json(const std::vector<Job>& jobs, const Summary& summary) {
  json results = json::array();
  for (const Job& job : jobs) {
    json result{{"problem", codegen::to_string(job.problem)}, {"target", job.arch.target}};
    if (job.obtained) {
      result["key"] = job.obtained->unit.key.hex();
      result["candidate"] = job.obtained->candidate;
      result["source"] = job.obtained->source == runtime::Source::disk ? "disk" : "compiler";
      result["bytes"] = job.obtained->image.size();
    } else {
      result["failure"] = job.failure;
    }
    results.push_back(std::move(result));
  }
  return {{"kernels", summary.kernels},           {"hits", summary.hits},
          {"compiled", summary.compiled},         {"failed", summary.failed},
          {"seconds", summary.seconds},           {"bytes", summary.bytes},
          {"store_errors", summary.store_errors}, {"results", std::move(results)}};
}

std::string to_text(const std::vector<Job>& jobs, const Summary& summary) {
  std::string text;
  for (const Job& job : jobs) {
    if (!job.obtained) {
      text +=
          fmt::format("{} {}\n  {}\n", paint("failed", Colour::red, Stream::out), job.name(), job.failure);
    }
  }
  return text + fmt::format("{} kernels ({}): {} compiled, {} hits, {} failed, in {}\n", summary.kernels,
                            bytes_text(summary.bytes), summary.compiled, summary.hits, summary.failed,
                            duration_text(std::chrono::duration<double>(summary.seconds)));
}

Result<int> precompile(const PrecompileOptions& options, bool as_json) {
  ATTUNE_ASSIGN(jobs, jobs_of(options));
  ATTUNE_ASSIGN(engine, runtime::Engine::global());
  ATTUNE_TRY(check_cache_is_written(engine->store()));
  const auto begin = std::chrono::steady_clock::now();
  run(jobs, options.jobs, *engine);
  Summary summary = summary_of(jobs);
  summary.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  summary.store_errors = engine->store().counters().store_errors;
  ATTUNE_TRY(as_json ? print_json(to_json(jobs, summary)) : print(to_text(jobs, summary)));
  if (summary.store_errors > 0) {
    return environment_failure(
        fmt::format("{} could not be written; `attune doctor` says why", engine->store().root().string()));
  }
  return summary.failed > 0 ? kWrongResult : kOk;
}

}  // namespace

void add_precompile(CLI::App& app, Session& session) {
  auto options = std::make_shared<PrecompileOptions>();
  CLI::App* command =
      app.add_subcommand("precompile", "Compile kernels ahead of time, with or without the device");
  command->add_option("LIST", options->list,
                      "Problems, one a line (ATTUNE_RECORD writes them) or a JSON array");
  command->add_option("--problem", options->problems, "One more problem, as for `attune explain`")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command->add_option("--arch", options->archs, "Architectures: sm_90a,x86-64-v4 or native")
      ->delimiter(',')
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->capture_default_str();
  command->add_option("--jobs", options->jobs, "Compilers at a time")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->callback([options, &session] {
    session.action = [options, &session] { return precompile(*options, session.json); };
  });
}

}  // namespace attune::tools
