// attune explain: which kernel a problem gets, why, and under which key it is cached. Runs on any machine,
// for any architecture; only the key needs the compiler's version.
#include "codegen/choose.h"
#include "codegen/emit.h"
#include "codegen/names.h"
#include "codegen/unit.h"
#include "runtime/engine.h"
#include "tools/command.h"
#include "tools/device_option.h"
#include "tools/table.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <memory>
#include <type_traits>

namespace attune::tools {
namespace {

using nlohmann::json;

struct ExplainOptions {
  std::string problem;
  std::string arch = "native";
  bool source = false;
  bool key = false;
};

/// What the command knows in the end; `unit` is meaningful only without a compiler problem.
struct Explanation {
  codegen::Problem problem;
  codegen::Choice choice;
  codegen::Unit unit;
  std::string compiler_problem;
  const char* state = "unknown";  // cached or absent
};

Result<Explanation> explanation_of(const codegen::Problem& problem, const codegen::Arch& arch) {
  Explanation result{.problem = problem, .choice = {}, .unit = {}, .compiler_problem = {}};
  ATTUNE_ASSIGN(choice, codegen::choose(problem, arch));
  result.choice = std::move(choice);
  ATTUNE_ASSIGN(engine, runtime::Engine::global());
  auto compiler = runtime::compiler_for(arch);
  if (!compiler.ok()) {
    result.compiler_problem = compiler.failure().message;
    result.unit = codegen::make_unit(result.choice.spec, arch, {}, engine->headers());
    return result;
  }
  result.unit = codegen::make_unit(result.choice.spec, arch, std::move(*compiler), engine->headers());
  result.state = engine->store().inspect(result.unit.key).ok() ? "cached" : "absent";
  return result;
}

json spec_json(const kernel::KernelSpec& spec) {
  json object = json::object();
  kernel::for_each_field(spec, [&](const char* name, const auto& value) {
    if constexpr (std::is_enum_v<std::remove_cvref_t<decltype(value)>>) {
      object[name] = codegen::name_of(value);
    } else {
      object[name] = value;
    }
  });
  return object;
}

json to_json(const Explanation& e) {
  json verdicts = json::array();
  for (const auto& verdict : e.choice.verdicts) {
    verdicts.push_back({{"family", codegen::name_of(verdict.family)}, {"reasons", verdict.reasons}});
  }
  json object{{"problem", codegen::to_string(e.problem)},
              {"target", e.unit.arch.target},
              {"family", codegen::name_of(e.choice.spec.family)},
              {"candidate", e.choice.candidate->name},
              {"spec", spec_json(e.choice.spec)},
              {"shared_bytes", codegen::shared_bytes(e.choice.spec)},
              {"verdicts", verdicts},
              {"source", e.unit.source},
              {"state", e.state}};
  if (!e.compiler_problem.empty()) {
    object["key"] = nullptr;
    object["compiler_problem"] = e.compiler_problem;
    return object;
  }
  object["key"] = e.unit.key.hex();
  object["compiler"] = e.unit.compiler.name;
  object["key_fields"] = json::object();
  for (const auto& [tag, value] : codegen::key_fields(e.unit)) object["key_fields"][tag] = value;
  return object;
}

std::string verdict_text(const codegen::Verdict& verdict, const codegen::Choice& choice) {
  if (verdict.family == choice.spec.family) return "chosen";
  if (verdict.reasons.empty()) return "could run too";
  return fmt::format("no: {}", fmt::join(verdict.reasons, "; "));
}

std::string to_text(const Explanation& e, const ExplainOptions& options) {
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
    table.row({"state", e.state});
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

Result<int> explain(const ExplainOptions& options, bool as_json) {
  ATTUNE_ASSIGN(problem, codegen::parse_problem(options.problem));
  ATTUNE_ASSIGN(arch, parse_arch(options.arch));
  ATTUNE_ASSIGN(explanation, explanation_of(problem, arch));
  ATTUNE_TRY(as_json ? print_json(to_json(explanation)) : print(to_text(explanation, options)));
  return kOk;
}

}  // namespace

void add_explain(CLI::App& app, Session& session) {
  auto options = std::make_shared<ExplainOptions>();
  CLI::App* command = app.add_subcommand("explain", "Which kernel a problem gets, and why");
  command
      ->add_option("--problem", options->problem, "\"dtype=f16 head_dim=64 window_right=bounded lse=write\"")
      ->required();
  command->add_option("--arch", options->arch, "sm_90a, x86-64-v4, ... or native")->capture_default_str();
  command->add_flag("--source", options->source, "Print the generated source too");
  command->add_flag("--key", options->key, "Print what the key is made of");
  command->callback([options, &session] {
    session.action = [options, &session] { return explain(*options, session.json); };
  });
}

}  // namespace attune::tools
