// attune emit: the source that the generator prints. Needs no compiler and no device.
#include "codegen/candidates.h"
#include "codegen/choose.h"
#include "codegen/emit.h"
#include "codegen/names.h"
#include "runtime/backward.h"
#include "tools/command.h"
#include "tools/device_option.h"
#include "tools/output_file.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <memory>
#include <optional>
#include <utility>
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

/// A row with a problem that it fits, on the oldest architecture where it does.
struct Sample {
  const codegen::Candidate& candidate;
  codegen::Problem problem;
  codegen::Arch arch;
  const char* traits;

  std::string file_name() const {
    return fmt::format("{}_{}_k{}_{}.{}", candidate.name, codegen::name_of(problem.dtype), problem.head_dim_v,
                       traits, candidate.family == kernel::Family::cpu ? "cpp" : "cu");
  }
};

std::optional<codegen::Arch> arch_of(const codegen::Candidate& candidate, const codegen::Problem& problem) {
  if (candidate.family == kernel::Family::cpu) {
    const auto arch = codegen::cpu_arch(candidate.isa);
    return arch.ok() && codegen::fits(candidate, problem, *arch) ? std::optional(*arch) : std::nullopt;
  }
  for (int sm = candidate.sm_min; sm <= candidate.sm_max; ++sm) {
    const auto arch = codegen::cuda_arch(sm);
    if (arch.ok() && codegen::fits(candidate, problem, *arch)) return *arch;
  }
  return std::nullopt;
}

/// All that the row's kernels can do beyond plain attention.
codegen::Problem with_every_feature(const codegen::Candidate& candidate, codegen::Problem problem) {
  const auto takes = [&](unsigned feature) { return (candidate.features & feature) != 0; };
  if (takes(codegen::kWindow)) problem.window_left = problem.window_right = kernel::Edge::bounded;
  if (takes(codegen::kVarlen)) problem.blocks = kernel::Blocks::varlen;
  if (takes(codegen::kPaged)) problem.keys = kernel::Keys::paged;
  if (takes(codegen::kBias)) problem.bias = kernel::Bias::f32;
  if (takes(codegen::kDropout)) problem.dropout = kernel::Dropout::on;
  if (takes(codegen::kAtomic)) problem.query_gradient = kernel::QueryGradient::atomic;
  problem.lse = kernel::Lse::write;
  return problem;
}

/// Of a problem with any traits, those that the operation's kernel looks at.
codegen::Problem of_operation(const codegen::Candidate& candidate, const codegen::Problem& problem) {
  const bool forward = candidate.operation == kernel::Operation::forward;
  if (forward || codegen::merges(candidate.operation)) return problem;
  codegen::Problem own = runtime::problem_of(problem, candidate.operation);
  const bool without_bias = own.bias == kernel::Bias::none || own.bias == kernel::Bias::boolean;
  if (own.operation == kernel::Operation::grad_bias && without_bias) own.bias = kernel::Bias::f32;
  return own;
}

/// Problems that take every branch of a row's kernel: each dtype, plain and with all that the row does, at
/// its largest head_dim and at one that fills no vector.
std::vector<Sample> samples_of(const codegen::Candidate& candidate) {
  std::vector<Sample> samples;
  for (const auto dtype : {kernel::DType::f32, kernel::DType::f16, kernel::DType::bf16}) {
    for (const int head_dim : {candidate.head_dim_max, candidate.head_dim_max - 27}) {
      const codegen::Problem plain{.operation = candidate.operation,
                                   .dtype = dtype,
                                   .output_dtype = dtype,
                                   .head_dim = codegen::merges(candidate.operation) ? 0 : head_dim,
                                   .head_dim_v = head_dim,
                                   .align_bytes = head_dim % 8 == 0 ? 16 : 2,
                                   .boxes = head_dim % 8 == 0 ? 1 : 0};
      for (const auto& [traits, any] :
           {std::pair{"plain", plain}, {"every", with_every_feature(candidate, plain)}}) {
        const codegen::Problem problem = of_operation(candidate, any);
        if (const auto arch = arch_of(candidate, problem)) {
          samples.push_back({candidate, problem, *arch, traits});
        }
      }
    }
  }
  return samples;
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
    for (const Sample& sample : samples_of(candidate)) {
      const fs::path path = folder / sample.file_name();
      ATTUNE_TRY(write_text(path, codegen::emit(codegen::spec_of(candidate, sample.problem), sample.arch)));
      files.push_back({{"path", path.string()},
                       {"candidate", candidate.name},
                       {"target", sample.arch.target},
                       {"problem", codegen::to_string(sample.problem)}});
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
  auto* problem =
      command->add_option("--problem", options->problem, "As for `attune explain`, of one kernel");
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
