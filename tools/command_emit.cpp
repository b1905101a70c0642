// attune emit: the source that the generator prints. Needs no compiler and no device.
#include "codegen/candidates.h"
#include "codegen/choose.h"
#include "codegen/emit.h"
#include "codegen/names.h"
#include "tools/command.h"
#include "tools/device_option.h"
#include "tools/output_file.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <memory>
#include <vector>

namespace attune::tools {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

struct EmitOptions {
  std::string problem;
  std::string arch = "native";
  std::string output;
  bool all = false;
  std::string folder;
};

Result<void> write_text(const fs::path& path, const std::string& text) {
  return write_output_file(path, std::as_bytes(std::span(text)));
}

// ---- One problem ----

Result<int> emit_one(const EmitOptions& options, bool as_json) {
  ATTUNE_ASSIGN(problem, codegen::parse_problem(options.problem));
  ATTUNE_ASSIGN(arch, parse_arch(options.arch));
  ATTUNE_ASSIGN(choice, codegen::choose(problem, arch));
  const std::string source = codegen::emit(choice.spec, arch);
  if (!options.output.empty()) ATTUNE_TRY(write_text(options.output, source));
  if (as_json) {
    ATTUNE_TRY(print_json({{"problem", codegen::to_string(problem)},
                           {"target", arch.target},
                           {"candidate", choice.candidate->name},
                           {"source", source}}));
  } else if (options.output.empty()) {
    ATTUNE_TRY(print(source));
  }
  return kOk;
}

// ---- Every candidate ----

/// The oldest architecture that a row serves.
Result<codegen::Arch> arch_of(const codegen::Candidate& candidate) {
  if (candidate.family == kernel::Family::cpu) return codegen::cpu_arch(candidate.isa);
  return codegen::cuda_arch(candidate.sm_min);
}

/// Problems that take every branch of a row's kernel: each dtype, with neither and with both edges, without
/// and with the log-sum-exp, at the row's largest head_dim and at one that fills no vector.
std::vector<codegen::Problem> problems_of(const codegen::Candidate& candidate) {
  std::vector<codegen::Problem> problems;
  for (const auto dtype : {kernel::DType::f32, kernel::DType::f16, kernel::DType::bf16}) {
    if ((candidate.dtypes >> static_cast<int>(dtype) & 1u) == 0) continue;
    for (const auto edge : {kernel::Edge::open, kernel::Edge::bounded}) {
      for (const int head_dim : {candidate.head_dim_max, candidate.head_dim_max - 27}) {
        problems.push_back({.dtype = dtype,
                            .head_dim = head_dim,
                            .head_dim_v = head_dim,
                            .window_left = edge,
                            .window_right = edge,
                            .lse = edge == kernel::Edge::open ? kernel::Lse::skip : kernel::Lse::write,
                            .align_bytes = head_dim == candidate.head_dim_max ? 16 : 2});
      }
    }
  }
  return problems;
}

std::string file_name(const codegen::Candidate& candidate, const codegen::Problem& problem) {
  return fmt::format("{}_{}_k{}_{}.{}", candidate.name, codegen::name_of(problem.dtype), problem.head_dim,
                     problem.window_right == kernel::Edge::open ? "full" : "window",
                     candidate.family == kernel::Family::cpu ? "cpp" : "cu");
}

Result<int> emit_all(const EmitOptions& options, bool as_json) {
  const fs::path folder = options.folder;
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) {
    return environment_failure(fmt::format("cannot create {}: {}", folder.string(), error.message()));
  }
  json files = json::array();
  for (const codegen::Candidate& candidate : codegen::candidates()) {
    ATTUNE_ASSIGN(arch, arch_of(candidate));
    for (const codegen::Problem& problem : problems_of(candidate)) {
      const fs::path path = folder / file_name(candidate, problem);
      ATTUNE_TRY(write_text(path, codegen::emit(codegen::spec_of(candidate, problem), arch)));
      files.push_back({{"path", path.string()},
                       {"candidate", candidate.name},
                       {"target", arch.target},
                       {"problem", codegen::to_string(problem)}});
    }
  }
  const std::size_t count = files.size();
  ATTUNE_TRY(as_json ? print_json({{"files", std::move(files)}})
                     : print(fmt::format("{} sources in {}\n", count, folder.string())));
  return kOk;
}

}  // namespace

void add_emit(CLI::App& app, Session& session) {
  auto options = std::make_shared<EmitOptions>();
  CLI::App* command = app.add_subcommand("emit", "The source that the generator prints");
  auto* problem = command->add_option("--problem", options->problem, "As for `attune explain`");
  command->add_option("--arch", options->arch, "sm_90a, x86-64-v4, ... or native")->capture_default_str();
  command->add_option("-o,--output", options->output, "A file; else stdout")->needs(problem);
  auto* out = command->add_option("--out", options->folder, "The folder of --all");
  auto* all = command->add_flag("--all", options->all, "Every candidate on representative problems")
                  ->needs(out)
                  ->excludes(problem);
  out->needs(all);
  command->callback([options, problem, all, &session] {
    if (problem->empty() && all->empty()) throw CLI::RequiredError("emit: --problem P or --all --out DIR");
    session.action = [options, &session] {
      return options->all ? emit_all(*options, session.json) : emit_one(*options, session.json);
    };
  });
}

}  // namespace attune::tools
