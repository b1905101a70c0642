#include "tools/command.h"
#include "tools/console.h"
#include "tools/precompile.h"
#include "tools/table.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>

namespace attune::tools {
namespace {

using nlohmann::json;
using namespace nlohmann::literals;

constexpr const char* kTotal = "together";

/// What compiling it took, as its metadata says: in one number, or by phases.
double compile_seconds(const runtime::Obtained& obtained) {
  const json metadata = json::parse(obtained.metadata_json, nullptr, /*allow_exceptions=*/false);
  const json phases = metadata.value("/compile/milliseconds"_json_pointer, json::object());
  double milliseconds = 0;
  for (const json& phase : phases) milliseconds += phase.is_number() ? phase.get<double>() : 0;
  return milliseconds / 1000;
}

bool is_hit(const runtime::Obtained& obtained) {
  return obtained.source == runtime::Source::disk;
}

void count(const std::vector<Job>& jobs, std::size_t i, Tally& tally) {
  const Job& job = jobs[i];
  if (job.failure) {
    ++tally.failed;
  } else if (job.kernel != i) {
    return;  // counted with the first of its kernel
  } else if (!job.obtained) {
    ++tally.left;
  } else {
    ++tally.kernels;
    ++(is_hit(*job.obtained) ? tally.hits : tally.compiled);
    if (!is_hit(*job.obtained)) tally.compile_seconds += compile_seconds(*job.obtained);
    tally.bytes += job.obtained->image.size();
  }
}

json to_json(const Tally& tally) {
  return {{"kernels", tally.kernels}, {"hits", tally.hits}, {"compiled", tally.compiled},
          {"failed", tally.failed},   {"left", tally.left}, {"compile_seconds", tally.compile_seconds},
          {"bytes", tally.bytes}};
}

json named(const Job& job) {
  return {{"problem", codegen::to_string(job.problem)}, {"target", job.arch.target}};
}

json to_json(const std::vector<Job>& jobs, std::size_t i) {
  const Job& job = jobs[i];
  json result = named(job);
  const auto& obtained = jobs[job.kernel].obtained;
  if (job.failure) {
    result["failure"] = job.failure->message;
  } else if (obtained) {
    result["key"] = obtained->unit.key.hex();
    result["candidate"] = obtained->candidate;
    result["source"] = is_hit(*obtained) ? "disk" : "compiler";
    result["bytes"] = obtained->image.size();
  }
  return result;
}

void add_row(Table& table, const std::string& name, const Tally& tally) {
  table.row({name, std::to_string(tally.kernels), std::to_string(tally.hits), std::to_string(tally.compiled),
             std::to_string(tally.failed),
             duration_text(std::chrono::duration<double>(tally.compile_seconds)), bytes_text(tally.bytes)});
}

std::vector<const Job*> failed_of(const std::vector<Job>& jobs) {
  std::vector<const Job*> failed;
  for (const Job& job : jobs) {
    if (job.failure) failed.push_back(&job);
  }
  return failed;
}

/// Each reason once, under the problems that have it.
std::string failures_text(const std::vector<const Job*>& failed) {
  std::vector<std::string> reasons;  // in order of appearance
  std::map<std::string, std::string> names;
  for (const Job* job : failed) {
    std::string& lines = names[job->failure->message];
    if (lines.empty()) reasons.push_back(job->failure->message);
    lines += fmt::format("{} {}\n", paint("failed", Colour::red, Stream::out), job->name());
  }
  std::string text;
  for (const std::string& reason : reasons) text += fmt::format("{}  {}\n", names[reason], reason);
  return text;
}

}  // namespace

Summary summary_of(const std::vector<Job>& jobs) {
  Summary summary;
  for (std::size_t i = 0; i < jobs.size(); ++i) {
    count(jobs, i, summary.targets[jobs[i].arch.target]);
    count(jobs, i, summary.total);
  }
  return summary;
}

json to_json(const std::vector<Job>& jobs, const Summary& summary) {
  json object = to_json(summary.total);
  json targets = json::object();
  for (const auto& [target, tally] : summary.targets) targets[target] = to_json(tally);
  json results = json::array();
  for (std::size_t i = 0; i < jobs.size(); ++i) results.push_back(to_json(jobs, i));
  object["seconds"] = summary.seconds;
  object["store_errors"] = summary.store_errors;
  object["targets"] = std::move(targets);
  object["results"] = std::move(results);
  return object;
}

std::string to_text(const std::vector<Job>& jobs, const Summary& summary) {
  Table table({"target", ">kernels", ">hits", ">compiled", ">failed", ">compile time", ">size"});
  for (const auto& [target, tally] : summary.targets) add_row(table, target, tally);
  if (summary.targets.size() > 1) add_row(table, kTotal, summary.total);
  const std::string left =
      summary.total.left > 0 ? fmt::format(", {} kernels left", summary.total.left) : std::string();
  return fmt::format("{}{}{} problems in {}{}\n", failures_text(failed_of(jobs)), table.text(), jobs.size(),
                     duration_text(std::chrono::duration<double>(summary.seconds)), left);
}

Check check_of(const std::vector<Job>& jobs) {
  Check check;
  check.failed = failed_of(jobs);
  for (std::size_t i = 0; i < jobs.size(); ++i) {
    if (jobs[i].failure || jobs[i].kernel != i) continue;
    ++check.kernels;
    if (!jobs[i].cached) check.missing.push_back(&jobs[i]);
  }
  return check;
}

json to_json(const Check& check) {
  json missing = json::array();
  for (const Job* job : check.missing) {
    missing.push_back(named(*job));
    missing.back()["key"] = job->key.hex();
    missing.back()["candidate"] = job->candidate;
  }
  json failed = json::array();
  for (const Job* job : check.failed) {
    failed.push_back(named(*job));
    failed.back()["failure"] = job->failure->message;
  }
  return {{"kernels", check.kernels},
          {"cached", check.kernels - check.missing.size()},
          {"missing", std::move(missing)},
          {"failed", std::move(failed)}};
}

std::string to_text(const Check& check) {
  Table table;
  for (const Job* job : check.missing) {
    table.row({paint("missing", Colour::red, Stream::out), job->arch.target, job->candidate,
               codegen::to_string(job->problem)});
  }
  return fmt::format("{}{}{} kernels: {} in the cache, {} would be compiled at run time\n",
                     failures_text(check.failed), table.text(), check.kernels,
                     check.kernels - check.missing.size(), check.missing.size());
}

int exit_code_of(const std::vector<Job>& jobs) {
  const auto failed = failed_of(jobs);
  if (failed.empty()) return kOk;
  const bool environment = std::ranges::any_of(
      failed, [](const Job* job) { return job->failure->kind == ErrorKind::environment; });
  return environment ? kEnvironment : kWrongResult;
}

}  // namespace attune::tools
