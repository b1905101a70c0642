// attune verify: is what runs here what it should be?
#include "base/file.h"
#include "tools/command.h"
#include "tools/console.h"
#include "tools/device_option.h"
#include "tools/option_values.h"
#include "tools/table.h"
#include "tools/verify/masks.h"
#include "tools/verify/numerics.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <memory>
#include <optional>
#include <vector>

namespace attune::tools {
namespace {

using nlohmann::json;

void add_backend_option(CLI::App* command, std::string& backend) {
  command->add_option("--backend", backend, "Where to run: auto, cpu or cuda")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
}

// ---- verify masks ----

struct MasksCommand {
  std::string file;
  std::string backend = "auto";
};

Result<json> read_json(const std::string& path) {
  const auto bytes = read_file(path);
  if (!bytes.ok()) return invalid_argument(bytes.failure().message);
  const auto* text = reinterpret_cast<const char*>(bytes->data());
  json value = json::parse(text, text + bytes->size(), nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) return invalid_argument(fmt::format("{}: not JSON", path));
  return value;
}

/// Every family that a device has: those that serve any mask, and the others where they do.
std::vector<verify::MaskKernel> kernels_of(Device device) {
  if (device.type == DeviceType::cpu) return {{Family::cpu, DType::f32}};
  return {
      {Family::simt, DType::f32}, {Family::mma, DType::f16}, {Family::sm90, DType::bf16, /*optional=*/true}};
}

json to_json(const verify::MasksReport& report) {
  const auto tally_json = [](const verify::MaskTally& tally) -> json {
    return {{"cases", tally.cases}, {"materialized", tally.materialized}, {"attended", tally.attended}};
  };
  json result = tally_json(report.total());
  for (const auto& [name, tally] : report.classes) result["classes"][name] = tally_json(tally);
  result["errors"] = report.errors;
  result["refused"] = report.refused;
  result["kernels"] = report.ran;
  result["differences"] = report.differences;
  result["ok"] = report.ok();
  return result;
}

std::string to_text(const verify::MasksReport& report) {
  Table table({"class", ">cases", ">materialize", ">kernels"});
  const auto add = [&](const std::string& name, const verify::MaskTally& tally) {
    table.row({name, std::to_string(tally.cases), std::to_string(tally.materialized),
               std::to_string(tally.attended)});
  };
  for (const auto& [name, tally] : report.classes) add(name, tally);
  const verify::MaskTally total = report.total();
  add("all", total);
  std::vector<std::string> kernels;
  for (const auto& [name, masks] : report.ran) kernels.push_back(fmt::format("{} ({})", name, masks));
  std::string text = table.text();
  text += fmt::format("{} of {} errors equal; kernels (masks): {}\n", report.refused, report.errors,
                      fmt::join(kernels, ", "));
  if (report.ok()) {
    return text + fmt::format("{}: {} of {} masks equal\n", paint("ok", Colour::green, Stream::out),
                              total.attended, total.cases);
  }
  return text + fmt::format("{}: {} differences, the first of them:\n{}",
                            paint("wrong", Colour::red, Stream::out), report.differences.size(),
                            report.differences.front() + "\n");
}

Result<int> verify_masks(const MasksCommand& options, bool as_json) {
  ATTUNE_ASSIGN(goldens, read_json(options.file));
  ATTUNE_ASSIGN(device, parse_device(options.backend));
  Progress progress(verify::count_of_masks(goldens));
  auto report = verify::verify_masks(
      goldens, {.device = device, .kernels = kernels_of(device), .progress = [&](const auto& what) {
                  progress.advance(what);
                }});
  if (!report.ok()) {
    return Failure{report.failure().kind, fmt::format("{}: {}", options.file, report.failure().message)};
  }
  ATTUNE_TRY(as_json ? print_json(to_json(*report)) : print(to_text(*report)));
  return report->ok() ? kOk : kWrongResult;
}

void add_masks(CLI::App* verify, Session& session) {
  auto options = std::make_shared<MasksCommand>();
  CLI::App* command = verify->add_subcommand(
      "masks",
      "Bias classes, and what kernels attend to under them, against masks of another implementation");
  command->add_option("FILE", options->file, "Goldens, as tests/golden/masks.json")->required();
  add_backend_option(command, options->backend);
  command->callback([options, &session] {
    session.action = [options, &session] { return verify_masks(*options, session.json); };
  });
}

// ---- verify numerics ----

struct NumericsCommand {
  std::uint64_t seed = 1;
  int cases = 512;
  std::optional<int> only;
  bool backward = false;
  std::string backend = "auto";
  std::vector<std::string> families;
};

Family family_of(const std::string& name) {
  if (name == "cpu") return Family::cpu;
  if (name == "simt") return Family::simt;
  return name == "mma" ? Family::mma : Family::sm90;
}

Result<int> verify_numerics(const NumericsCommand& command, bool as_json) {
  ATTUNE_ASSIGN(device, parse_device(command.backend));
  verify::NumericsOptions options{.seed = command.seed,
                                  .cases = command.cases,
                                  .pass = command.backward ? verify::Pass::backward : verify::Pass::forward,
                                  .device = device,
                                  .only = command.only};
  for (const std::string& name : command.families) options.families.push_back(family_of(name));
  Progress progress(verify::numerics_steps(options));
  options.progress = [&](const std::string& what) { progress.advance(what); };
  ATTUNE_ASSIGN(report, verify::verify_numerics(options));
  ATTUNE_TRY(as_json ? print_json(verify::json_of(report)) : print(verify::text_of(report)));
  return report.ok() ? kOk : kWrongResult;
}

void add_numerics(CLI::App* verify, Session& session) {
  auto options = std::make_shared<NumericsCommand>();
  CLI::App* command =
      verify->add_subcommand("numerics", "Random problems over all that kernels take, against float64");
  command->add_option("--seed", options->seed, "Draws the same cases again")
      ->check(integer_from<std::uint64_t>(0))
      ->capture_default_str();
  command->add_option("--cases", options->cases, "How many")->check(integer_from(1))->capture_default_str();
  command->add_flag("--backward", options->backward, "Gradients, in place of attention and merges");
  command->add_option("--only", options->only, "Run this one of the cases alone")->check(integer_from(0));
  command
      ->add_option("--family", options->families, "Kernel families, in turns; by default all of the device")
      ->delimiter(',')
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->check(CLI::IsMember({"cpu", "simt", "mma", "sm90"}));
  add_backend_option(command, options->backend);
  command->callback([options, &session] {
    session.action = [options, &session] { return verify_numerics(*options, session.json); };
  });
}

}  // namespace

void add_verify(CLI::App& app, Session& session) {
  CLI::App* command = app.add_subcommand("verify", "Check kernels against goldens and against float64");
  command->require_subcommand(1);
  add_masks(command, session);
  add_numerics(command, session);
}

}  // namespace attune::tools
