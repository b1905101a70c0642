#include "runtime/tuned_choice.h"

#include "attune/version.h"
#include "codegen/choose.h"
#include "codegen/emit.h"
#include "codegen/names.h"
#include "runtime/explanation.h"

#include <nlohmann/json.hpp>

#include <algorithm>

namespace attune::runtime {
namespace {

using nlohmann::json;

// Bump when the meaning of a choice changes.
constexpr const char* kSchema = "attune-tuned-1";

Result<TunedChoice::Timing> timing_of(const json& object) {
  const json candidate = object.is_object() ? object.value("candidate", json()) : json();
  const json microseconds = object.is_object() ? object.value("microseconds", json()) : json();
  if (!candidate.is_string() || !microseconds.is_number())
    return environment_failure("a timing is malformed");
  return TunedChoice::Timing{candidate, microseconds};
}

}  // namespace

Digest tuned_key(const codegen::Problem& problem, const Backend& backend,
                 std::span<const codegen::EmbeddedFile> templates) {
  FieldDigest digest;
  digest.field("schema", kSchema)
      .field("version", ATTUNE_VERSION)
      .field("device", backend.description())
      .field("target", backend.arch().target)
      .field("problem", codegen::to_string(problem));
  for (const codegen::Candidate* row : codegen::contenders(problem, backend.arch())) {
    digest.field(row->name, codegen::describe(codegen::spec_of(*row, problem)));
  }
  for (const codegen::EmbeddedFile& file : templates) digest.field(file.name, file.digest);
  return digest.finish();
}

cache::Entry tuned_entry(const Digest& key, const TunedChoice& choice, const codegen::Problem& problem,
                         const Backend& backend) {
  json metadata = to_json(choice);
  metadata["kind"] = kTunedChoiceKind;
  metadata["attune"] = ATTUNE_VERSION;
  metadata["target"] = backend.arch().target;
  metadata["device"] = backend.description();
  metadata["problem"] = codegen::to_string(problem);
  const auto rows = codegen::contenders(problem, backend.arch());
  const auto row = std::ranges::find(rows, choice.candidate, &codegen::Candidate::name);
  if (row != rows.end()) metadata["spec"] = spec_json(codegen::spec_of(**row, problem));
  return {.key = key, .metadata_json = metadata.dump(), .payload = {}};
}

Result<TunedChoice> tuned_choice_of(const cache::Entry& entry) {
  const json metadata = json::parse(entry.metadata_json, nullptr, /*allow_exceptions=*/false);
  const auto field = [&](const char* name) {
    return metadata.is_object() ? metadata.value(name, json()) : json();
  };
  if (field("kind") != kTunedChoiceKind) return environment_failure("it is no tuned choice");
  if (!field("candidate").is_string() || !field("measured_on").is_string() || !field("timings").is_array()) {
    return environment_failure("a field of the tuned choice is malformed");
  }
  TunedChoice choice{.candidate = field("candidate"), .timings = {}, .measured_on = field("measured_on")};
  for (const json& object : field("timings")) {
    ATTUNE_ASSIGN(timing, timing_of(object));
    choice.timings.push_back(std::move(timing));
  }
  return choice;
}

json to_json(const TunedChoice& choice) {
  json timings = json::array();
  for (const auto& [candidate, microseconds] : choice.timings) {
    timings.push_back({{"candidate", candidate}, {"microseconds", microseconds}});
  }
  return {{"candidate", choice.candidate}, {"measured_on", choice.measured_on}, {"timings", timings}};
}

}  // namespace attune::runtime
