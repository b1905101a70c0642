// attune explain: which kernel a problem gets, or which kernels a backward pass, why, and under which key it
// is cached. Runs on any machine, for any architecture; only the key needs the compiler's version.
#include "codegen/choose.h"
#include "codegen/emit.h"
#include "codegen/names.h"
#include "codegen/unit.h"
#include "runtime/engine.h"
#include "tools/command.h"
#include "tools/device_option.h"
#include "tools/problem_list.h"
#include "tools/table.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace attune::tools {
namespace {

using nlohmann::json;

struct ExplainOptions {
  std::string problem;
  std::string arch = "native";
  bool source = false;
  bool key = false;
};

std::string verdict_text(const codegen::Verdict& verdict, const codegen::Choice& choice) {
  if (verdict.family == choice.spec.family) return "chosen";
  if (verdict.reasons.empty()) return "could run too";
  return fmt::format("no: {}", fmt::join(verdict.reasons, "; "));
}

std::string to_text(const runtime::Explanation& e, const ExplainOptions& options) {
  Table table;
  table.row({"problem", codegen::to_string(e.problem)});
  table.row({"target", e.unit.arch.target});
  table.row({"candidate", e.choice.candidate->name});
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
  if (options.source) text += "\n" + e.unit.source;
  return text;
}

/// The kernels of a backward pass as attune::explain_backward has them; one kernel as attune::explain has it.
json to_json(const std::vector<runtime::Explanation>& kernels) {
  if (kernels.size() == 1) return runtime::to_json(kernels.front());
  json all = json::array();
  for (const runtime::Explanation& one : kernels) all.push_back(runtime::to_json(one));
  return {{"kernels", std::move(all)}};
}

std::string to_text(const std::vector<runtime::Explanation>& kernels, const ExplainOptions& options) {
  std::string text;
  for (const runtime::Explanation& one : kernels) text += (text.empty() ? "" : "\n") + to_text(one, options);
  return text;
}

Result<int> explain(const ExplainOptions& options, bool as_json) {
  ATTUNE_ASSIGN(arch, parse_arch(options.arch));
  ATTUNE_ASSIGN(problems, parse_problems(options.problem, arch));
  ATTUNE_ASSIGN(engine, runtime::Engine::global());
  std::vector<runtime::Explanation> kernels;
  for (const codegen::Problem& problem : problems) {
    ATTUNE_ASSIGN(explanation, engine->explain(problem, arch, std::nullopt));
    kernels.push_back(std::move(explanation));
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
