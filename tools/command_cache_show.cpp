// attune cache show: everything known of one kernel.
#include "attune/version.h"
#include "cache/cubin.h"
#include "codegen/arch.h"
#include "codegen/emit.h"
#include "codegen/names.h"
#include "tools/cache_entries.h"
#include "tools/command.h"
#include "tools/console.h"
#include "tools/occupancy.h"
#include "tools/table.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <memory>
#include <optional>

namespace attune::tools {
namespace {

using nlohmann::json;

struct ShowOptions {
  std::string key;
  std::string gpu;
  bool source = false;
};

json instructions_json(const cache::InstructionCounts& counts) {
  return {{"all", counts.all},         {"tensor", counts.tensor},  {"float32", counts.float32},
          {"special", counts.special}, {"global", counts.global},  {"shared", counts.shared},
          {"local", counts.local},     {"barrier", counts.barrier}};
}

json cubin_json(const cache::CubinInfo& cubin) {
  json kernels = json::object();
  for (const cache::CubinKernel& kernel : cubin.kernels) {
    kernels[kernel.name] = {{"registers", kernel.registers},       {"stack_bytes", kernel.stack_bytes},
                            {"shared_bytes", kernel.shared_bytes}, {"barriers", kernel.barriers},
                            {"max_threads", kernel.max_threads},   {"code_bytes", kernel.code_bytes}};
    if (kernel.instructions) kernels[kernel.name]["instructions"] = instructions_json(*kernel.instructions);
  }
  return {{"sm", cubin.sm}, {"kernels", std::move(kernels)}};
}

// ---- Occupancy ----

int number_of(const json& object, const char* name, int otherwise) {
  const auto found = object.find(name);
  return found != object.end() && found->is_number_integer() ? found->get<int>() : otherwise;
}

/// What a launch asks for: the registers of the compiler's log, since warps that ask for more while they run
/// take them from others; and the dynamic shared memory, which no cubin knows.
BlockNeeds needs_of(const cache::CubinKernel& kernel, const json& metadata) {
  const json compiled = metadata.value("compile", json::object());
  return {.threads = kernel.max_threads,
          .registers = number_of(compiled, "registers", kernel.registers),
          .shared_bytes = number_of(compiled, "shared_bytes", kernel.shared_bytes)};
}

/// On the GPU that was asked for, else on the one that it was compiled for.
Result<json> occupancy_json(const cache::CubinInfo& cubin, const json& metadata, const std::string& gpu) {
  if (cubin.kernels.empty() || cubin.kernels.front().max_threads == 0) return json();
  int capability = cubin.sm;
  if (!gpu.empty()) {
    ATTUNE_ASSIGN(named, compute_capability_of(gpu));
    capability = named;
  }
  if (capability / 10 != cubin.sm / 10 || capability < cubin.sm) {
    return invalid_argument(
        fmt::format("--gpu {}: a kernel for sm_{} does not run on compute capability {}.{}", gpu, cubin.sm,
                    capability / 10, capability % 10));
  }
  const BlockNeeds needs = needs_of(cubin.kernels.front(), metadata);
  const auto found = occupancy(needs, capability);
  if (!found.ok() && gpu.empty()) return json();
  ATTUNE_TRY(found.ok() ? done() : Result<void>(found.failure()));
  return json{{"gpu", gpu.empty() ? fmt::format("sm_{}", capability) : gpu},
              {"blocks_per_sm", found->blocks},
              {"warps_per_sm", found->warps},
              {"max_warps_per_sm", found->max_warps},
              {"limited_by", found->limit}};
}

// ---- Source ----

/// The spec that the metadata describes; nothing when this version has other fields or values.
std::optional<kernel::KernelSpec> spec_of(const json& metadata) {
  const json fields = metadata.value("spec", json::object());
  kernel::KernelSpec spec;
  std::size_t known = 0;
  kernel::for_each_field(spec, [&](const char* name, auto& field) {
    known += codegen::parse_text(text_of(fields, name), field) ? 1 : 0;
  });
  if (known != static_cast<std::size_t>(kernel::kKernelSpecFields) || fields.size() != known)
    return std::nullopt;
  return spec;
}

/// No entry holds its source. The spec makes it again, and the key's digest says whether that is the same.
Result<std::string> source_of(const json& metadata) {
  const auto spec = spec_of(metadata);
  const auto arch = codegen::arch_from_name(text_of(metadata, "target"));
  if (spec && arch.ok()) {
    std::string source = codegen::emit(*spec, *arch);
    if (sha256(source).hex() == text_of(metadata.value("key_fields", json::object()), "source"))
      return source;
  }
  return environment_failure(
      fmt::format("Attune {} generated this kernel's source; Attune {} generates another one",
                  text_of(metadata, "attune"), ATTUNE_VERSION));
}

// ---- The report ----

Result<json> report_of(const cache::Listed& listed, const cache::Entry& entry, const ShowOptions& options) {
  const json metadata = metadata_of(entry);
  json object = listed_json(listed);
  object["payload_bytes"] = entry.payload.size();
  object["payload_sha256"] = sha256(entry.payload).hex();
  object["metadata"] = metadata;
  if (is_tuned_choice(metadata)) return object;
  if (text_of(metadata, "target").starts_with("sm_")) {
    ATTUNE_ASSIGN(cubin, cache::read_cubin(entry.payload));
    object["cubin"] = cubin_json(cubin);
    ATTUNE_ASSIGN(occupancy, occupancy_json(cubin, metadata, options.gpu));
    if (!occupancy.is_null()) object["occupancy"] = std::move(occupancy);
  } else if (!options.gpu.empty()) {
    return invalid_argument(fmt::format("--gpu {}: this is a kernel for a CPU", options.gpu));
  }
  if (options.source) {
    ATTUNE_ASSIGN(source, source_of(metadata));
    object["source"] = std::move(source);
  }
  return object;
}

std::string to_text(const json& report) {
  Table table;
  for (const char* name : {"key", "path", "bytes", "payload_bytes", "payload_sha256"}) {
    add_rows(table, "", {{name, report[name]}});
  }
  table.row({"stored", age_text(seconds_since(report["modified_unix"])) + " ago"});
  table.row({"last used", age_text(seconds_since(report["used_unix"])) + " ago, to a day"});
  add_rows(table, "", report["metadata"]);
  for (const char* part : {"cubin", "occupancy"}) {
    if (report.contains(part)) add_rows(table, part, report[part]);
  }
  return table.text() + (report.contains("source") ? "\n" + report["source"].get<std::string>() : "");
}

Result<int> show(const ShowOptions& options, bool as_json) {
  ATTUNE_ASSIGN(store, open_store());
  ATTUNE_ASSIGN(found, find_whole(*store, options.key));
  ATTUNE_ASSIGN(report, report_of(found.first, found.second, options));
  ATTUNE_TRY(as_json ? print_json(report) : print(to_text(report)));
  return kOk;
}

}  // namespace

void add_cache_show(CLI::App& cache, Session& session) {
  auto options = std::make_shared<ShowOptions>();
  CLI::App* command = cache.add_subcommand("show", "Everything known of one kernel");
  command->add_option("KEY", options->key, "Its key or the first digits of it")->required();
  command->add_option("--gpu", options->gpu, "Occupancy on this one: H100, RTX4090, sm_86; else on its own");
  command->add_flag("--source", options->source, "Print its source too");
  command->callback(
      [options, &session] { session.action = [options, &session] { return show(*options, session.json); }; });
}

}  // namespace attune::tools
