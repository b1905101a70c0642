// `attune precompile` in its parts: what it is asked for, the kernels that this takes, and its reports.
#pragma once

#include "base/digest.h"
#include "base/result.h"
#include "codegen/arch.h"
#include "codegen/problem.h"
#include "runtime/engine.h"

#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace attune::tools {

struct PrecompileOptions {
  std::string list;
  std::vector<std::string> problems;
  std::vector<std::string> presets;
  std::vector<std::string> archs{"native"};
  int jobs = 1;
  bool check = false;
  bool only_list = false;
};

/// One problem on one architecture.
struct Job {
  codegen::Problem problem;
  codegen::Arch arch;
  std::optional<Failure> failure;

  // Once it is planned:
  Digest key;
  std::string candidate;
  bool cached = false;
  double work = 0;         // of its compilation, in any unit
  std::size_t kernel = 0;  // the first job with this key, perhaps itself: problems may share a kernel

  // Of the first with its key, once it has run; null: it failed or was not reached.
  std::shared_ptr<const runtime::Obtained> obtained;

  std::string name() const;
};

// ---- precompile_jobs.cpp ----

/// A part of what is asked for: a list for parse_problem_list.
struct ProblemSource {
  std::string text;
  std::string origin;              // of messages: the file, "preset llama", "--problem"
  std::vector<std::string> about;  // a preset: what it is, and where that is known from
};
Result<std::vector<ProblemSource>> problem_sources(const PrecompileOptions& options);

/// A job for each different problem on each architecture.
Result<std::vector<Job>> jobs_of(const PrecompileOptions& options);

/// Looks up what kernel each job takes, and whether the cache has it. Jobs without one have their failure.
void plan(std::vector<Job>& jobs, int threads, runtime::Engine& engine);

/// Obtains every kernel once, those that compile longest first, until an interrupt. One that fails does not
/// stop the others.
void run(std::vector<Job>& jobs, int threads, runtime::Engine& engine);

// ---- precompile_report.cpp ----

/// Over different kernels.
struct Tally {
  std::size_t kernels = 0;
  std::size_t hits = 0;
  std::size_t compiled = 0;
  std::size_t failed = 0;  // problems
  std::size_t left = 0;    // not reached before an interrupt
  double compile_seconds = 0;
  std::uint64_t bytes = 0;
};

struct Summary {
  std::map<std::string, Tally> targets;
  Tally total;
  double seconds = 0;
  std::uint64_t store_errors = 0;
};

Summary summary_of(const std::vector<Job>& jobs);
nlohmann::json to_json(const std::vector<Job>& jobs, const Summary& summary);
std::string to_text(const std::vector<Job>& jobs, const Summary& summary);

/// What a program would have to compile, or could not; of planned jobs.
struct Check {
  std::size_t kernels = 0;
  std::vector<const Job*> missing;
  std::vector<const Job*> failed;
};

Check check_of(const std::vector<Job>& jobs);
nlohmann::json to_json(const Check& check);
std::string to_text(const Check& check);

/// Environment if a job failed of it, else wrong result if one failed, else ok.
int exit_code_of(const std::vector<Job>& jobs);

}  // namespace attune::tools
