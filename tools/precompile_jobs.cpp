#include "tools/console.h"
#include "tools/device_option.h"
#include "tools/interrupt.h"
#include "tools/parallel.h"
#include "tools/precompile.h"
#include "tools/presets.h"
#include "tools/problem_list.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

namespace attune::tools {
namespace {

using codegen::Problem;

std::vector<std::string> about(const Preset& preset) {
  std::vector<std::string> lines{preset.models};
  for (const auto& [fact, source] : preset.sources) lines.push_back(fmt::format("{}: {}", fact, source));
  return lines;
}

/// How long a kernel takes to compile, roughly: 500 of NVRTC's took about so many seconds. Kernels that go by
/// rows, or merge, have no tiles to unroll.
double compile_work(const kernel::KernelSpec& spec) {
  if (spec.family == kernel::Family::rows || spec.family == kernel::Family::merge) return 0.1;
  return 0.25 + 0.005 * std::max(spec.head_dim, spec.head_dim_v);
}

void plan(Job& job, runtime::Engine& engine) {
  auto explained = engine.explain(job.problem, job.arch, std::nullopt);
  if (!explained.ok()) {
    job.failure = explained.failure();
  } else if (!explained->compiler_problem.empty()) {
    job.failure = environment_failure(explained->compiler_problem);
  } else {
    job.key = explained->unit.key;
    job.candidate = explained->choice.candidate->name;
    job.cached = std::string_view(explained->state) == "cached";
    job.work = job.cached ? 0 : compile_work(explained->choice.spec);
  }
}

/// The first job of each kernel, those with the most work first: what is left for the last core is short.
std::vector<std::size_t> order_of(const std::vector<Job>& jobs) {
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < jobs.size(); ++i) {
    if (!jobs[i].failure && jobs[i].kernel == i) order.push_back(i);
  }
  std::ranges::stable_sort(order, std::ranges::greater{}, [&](std::size_t i) { return jobs[i].work; });
  return order;
}

}  // namespace

std::string Job::name() const {
  return fmt::format("{} {}", arch.target, codegen::to_string(problem));
}

Result<std::vector<ProblemSource>> problem_sources(const PrecompileOptions& options) {
  std::vector<ProblemSource> sources;
  if (!options.list.empty()) {
    ATTUNE_ASSIGN(text, read_list(options.list));
    sources.push_back({std::move(text), options.list, {}});
  }
  ATTUNE_ASSIGN(known, presets());
  for (const std::string& name : options.presets) {
    const auto found = std::ranges::find(known, name, &Preset::name);
    if (found == known.end()) {
      return invalid_argument(
          fmt::format("--preset {}: no such preset; `attune precompile --list` names them", name));
    }
    sources.push_back({problem_list_of(*found), "preset " + name, about(*found)});
  }
  for (const std::string& text : options.problems) sources.push_back({text, "--problem", {}});
  return sources;
}

Result<std::vector<Job>> jobs_of(const PrecompileOptions& options) {
  ATTUNE_ASSIGN(sources, problem_sources(options));
  std::vector<Job> jobs;
  for (const std::string& name : options.archs) {
    ATTUNE_ASSIGN(arch, parse_arch(name));
    std::vector<Problem> wanted;
    for (const ProblemSource& source : sources) {
      ATTUNE_ASSIGN(problems, parse_problem_list(source.text, source.origin, arch));
      for (const Problem& problem : problems) {
        if (std::ranges::find(wanted, problem) == wanted.end()) wanted.push_back(problem);
      }
    }
    for (const Problem& problem : wanted) jobs.push_back({.problem = problem, .arch = arch});
  }
  if (jobs.empty()) return invalid_argument("no problems: name a LIST, or give --preset or --problem");
  return jobs;
}

void plan(std::vector<Job>& jobs, int threads, runtime::Engine& engine) {
  parallel_for(jobs.size(), threads, [&](std::size_t i) { plan(jobs[i], engine); });
  std::map<Digest, std::size_t> first;
  for (std::size_t i = 0; i < jobs.size(); ++i) {
    if (!jobs[i].failure) jobs[i].kernel = first.try_emplace(jobs[i].key, i).first->second;
  }
}

void run(std::vector<Job>& jobs, int threads, runtime::Engine& engine) {
  const std::vector<std::size_t> order = order_of(jobs);
  const double work = std::transform_reduce(order.begin(), order.end(), 0.0, std::plus{},
                                            [&](std::size_t i) { return jobs[i].work; });
  Progress progress(order.size(), work);
  parallel_for(order.size(), threads, [&](std::size_t i) {
    if (interrupted()) return;
    Job& job = jobs[order[i]];
    auto obtained = engine.precompile(job.problem, job.arch);
    if (obtained.ok()) {
      job.obtained = std::move(*obtained);
    } else {
      job.failure = obtained.failure();
    }
    progress.advance(job.name(), job.work);
  });
  for (Job& job : jobs) {
    if (!job.failure) job.failure = jobs[job.kernel].failure;
  }
}

}  // namespace attune::tools
