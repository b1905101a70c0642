// attune explain: which kernel a problem gets, or which kernels a backward pass, why, and under which key it
// is cached. Runs on any machine, for any architecture; only the key needs the compiler's version.
#include "codegen/choose.h"
#include "codegen/emit.h"
#include "codegen/names.h"
#include "codegen/unit.h"
#include "runtime/engine.h"
#include "tools/cache_entries.h"
#include "tools/command.h"
#include "tools/console.h"
#include "tools/device_option.h"
#include "tools/nearest_entry.h"
#include "tools/problem_list.h"
#include "tools/table.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace attune::tools {
namespace {

using nlohmann::json;

struct ExplainOptions {
  std::string problem;
  std::string arch = kNativeArch;
  bool source = false;
  bool key = false;
};

struct Explained : runtime::Explanation {
  std::optional<NearestEntry> nearest;  // of a kernel that is not in the cache
};

/// "missed because": a kernel like it is there.
std::string miss_text(const NearestEntry& nearest) {
  Table table;
  for (const Difference& difference : nearest.differences) {
    const auto shown = [](const std::string& text) {
      const bool digest = Digest::from_hex(text).has_value();
      return text.empty() ? "(none)" : printable(digest ? text.substr(0, kShortKey) : text);
    };
    table.row({"  " + printable(difference.field), shown(difference.cached), "->", shown(difference.wanted)});
  }
  return fmt::format("\nnot in the cache; nearest there is {} ({}), which differs in\n{}",
                     nearest.file.key.hex().substr(0, kShortKey), nearest.candidate, table.text());
}

json to_json(const NearestEntry& nearest) {
  json differences = json::array();
  for (const auto& [field, cached, wanted] : nearest.differences) {
    differences.push_back({{"field", field}, {"cached", cached}, {"wanted", wanted}});
  }
  return {{"key", nearest.file.key.hex()},
          {"candidate", nearest.candidate},
          {"differences", std::move(differences)}};
}

std::string verdict_text(const codegen::Verdict& verdict, const codegen::Choice& choice) {
  if (verdict.family == choice.spec.family) return "chosen";
  if (verdict.reasons.empty()) return "could run too";
  return fmt::format("no: {}", fmt::join(verdict.reasons, "; "));
}

/// "by attune bench on batch 2, ...: 89.1 us, the usual choice sm90_192x80_d128 95.0 us"
std::string tuned_text(const runtime::TunedChoice& choice) {
  const auto time_of = [&](const std::string& candidate) {
    const auto found = std::ranges::find(choice.timings, candidate, &runtime::TunedChoice::Timing::candidate);
    return found == choice.timings.end() ? "?" : fmt::format("{:.1f} us", found->microseconds);
  };
  std::string text =
      fmt::format("by `attune bench --tune` on {}: {}", choice.measured_on, time_of(choice.candidate));
  if (choice.timings.empty() || choice.timings.front().candidate == choice.candidate) return text;
  const std::string& usual = choice.timings.front().candidate;
  return text + fmt::format("; the usual choice, {}, {}", usual, time_of(usual));
}

std::string to_text(const Explained& e, const ExplainOptions& options) {
  Table table;
  table.row({"problem", codegen::to_string(e.problem)});
  table.row({"target", e.unit.arch.target});
  table.row({"candidate", e.choice.candidate->name});
  if (e.tuned) table.row({"tuned", tuned_text(*e.tuned)});
  for (const auto& verdict : e.choice.verdicts) {
    table.row({fmt::format("  {}", codegen::name_of(verdict.family)), verdict_text(verdict, e.choice)});
  }
  table.row({"spec", codegen::describe(e.choice.spec)});
  if (!e.compiler_problem.empty()) {
    table.row({"key", "needs the compiler, which is not here (below)"});
  } else {
    table.row({"compiler", e.unit.compiler.name});
    table.row({"key", e.unit.key.hex()});
    table.row({"state", e.layer.empty() ? e.state : fmt::format("{}, in {}", e.state, e.layer)});
  }
  std::string text = table.text();
  if (options.key && e.compiler_problem.empty()) {
    Table fields;
    for (const auto& [tag, value] : codegen::key_fields(e.unit)) {
      std::string line = value;
      std::ranges::replace(line, '\n', ' ');  // the options are one to a line
      fields.row({"  " + tag, std::move(line)});
    }
    text += "\nkey fields\n" + fields.text();
  }
  if (!e.compiler_problem.empty()) text += "\n" + e.compiler_problem + "\n";
  if (e.nearest) text += miss_text(*e.nearest);
  if (options.source) text += "\n" + e.unit.source;
  return text;
}

/// As attune::explain has it, and the nearest entry.
json to_json(const Explained& e) {
  json object = runtime::to_json(e);
  if (e.nearest) object["nearest"] = to_json(*e.nearest);
  return object;
}

/// The kernels of a backward pass as attune::explain_backward has them.
json to_json(const std::vector<Explained>& kernels) {
  if (kernels.size() == 1) return to_json(kernels.front());
  json all = json::array();
  for (const Explained& one : kernels) all.push_back(to_json(one));
  return {{"kernels", std::move(all)}};
}

std::string to_text(const std::vector<Explained>& kernels, const ExplainOptions& options) {
  std::string text;
  for (const Explained& one : kernels) text += (text.empty() ? "" : "\n") + to_text(one, options);
  return text;
}

Result<Explained> explained(const codegen::Problem& problem, const codegen::Arch& arch,
                            std::optional<Device> device, runtime::Engine& engine) {
  ATTUNE_ASSIGN(explanation, engine.explain(problem, arch, device));
  Explained result{std::move(explanation), std::nullopt};
  const bool missed = std::string_view(result.state) == "absent" && !engine.store().root().empty();
  if (missed) result.nearest = nearest_entry(engine.store(), result.unit);
  return result;
}

Result<int> explain(const ExplainOptions& options, bool as_json) {
  ATTUNE_ASSIGN(arch, parse_arch(options.arch));
  ATTUNE_ASSIGN(problems, parse_problems(options.problem, arch));
  ATTUNE_ASSIGN(engine, runtime::Engine::global());
  std::optional<Device> device;  // on which a choice may have been tuned
  if (options.arch == kNativeArch) {
    ATTUNE_ASSIGN(native, parse_device("auto"));
    device = native;
  }
  std::vector<Explained> kernels;
  for (const codegen::Problem& problem : problems) {
    ATTUNE_ASSIGN(kernel, explained(problem, arch, device, *engine));
    kernels.push_back(std::move(kernel));
  }
  ATTUNE_TRY(as_json ? print_json(to_json(kernels)) : print(to_text(kernels, options)));
  return kOk;
}

}  // namespace

void add_explain(CLI::App& app, Session& session) {
  auto options = std::make_shared<ExplainOptions>();
  CLI::App* command =
      app.add_subcommand("explain", "Which kernel a problem gets, or which kernels a backward pass, and why");
  command->add_option("--problem", options->problem, problem_help())->required();
  command->add_option("--arch", options->arch, "sm_90a, x86-64-v4, ... or native")->capture_default_str();
  command->add_flag("--source", options->source, "Print the generated source too");
  command->add_flag("--key", options->key, "Print what the key is made of");
  command->callback([options, &session] {
    session.action = [options, &session] { return explain(*options, session.json); };
  });
}

}  // namespace attune::tools
