// attune doctor: what was found on this machine, what is missing, and how to get it.
#include "base/env.h"
#include "base/file.h"
#include "cache/curl.h"
#include "runtime/cpu/cpu_backend.h"
#include "runtime/cuda/cuda_backend.h"
#include "runtime/engine.h"
#include "tools/command.h"
#include "tools/console.h"
#include "tools/table.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <unistd.h>

#include <filesystem>
#include <optional>
#include <utility>
#include <vector>

namespace attune::tools {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

/// One thing that was looked for. `problem` is empty when it is well; `remedy` says how to get it.
struct Finding {
  const char* name;
  std::string found;
  std::string problem;
  const char* remedy;
  std::vector<std::string> tried = {};
};

// ---- What to look for ----

Finding cpu_finding(const runtime::CpuReport& cpu) {
  const auto arch = codegen::cpu_arch(cpu.isa);
  return {.name = "cpu",
          .found = arch.ok() ? fmt::format("{}, {} threads", arch->target, cpu.threads) : "",
          .problem = cpu.isa_problem,
          .remedy = "CPU kernels need a CPU with AVX2, FMA and F16C"};
}

Finding plugin_finding(const runtime::CpuReport& cpu) {
  return {.name = "cpu compiler",
          .found = fmt::format("{} {}", cpu.plugin_version, cpu.plugin_path),
          .problem = cpu.plugin_problem,
          .remedy =
              "install llvm-19-dev, libclang-19-dev and liblld-19-dev and build again; kernels that are "
              "in the cache run without it",
          .tried = cpu.plugin_tried};
}

Finding driver_finding(const runtime::CudaReport& cuda) {
  return {.name = "gpu driver",
          .found = fmt::format("CUDA {} {}", cuda.driver_version, cuda.driver_path),
          .problem = cuda.driver_problem,
          .remedy = "install NVIDIA's driver; in a container, start it with the GPU (--gpus all)"};
}

Finding gpu_finding(const runtime::CudaReport& cuda) {
  std::vector<std::string> names;
  for (const auto& gpu : cuda.devices) {
    names.push_back(fmt::format("{} ({}.{})", gpu.name, gpu.sm / 10, gpu.sm % 10));
  }
  return {.name = "gpu",
          .found = fmt::format("{}", fmt::join(names, ", ")),
          .problem = names.empty() ? "none" : "",
          .remedy = "without a GPU, `attune precompile --arch sm_90a` still fills a cache for one"};
}

Finding nvrtc_finding(const runtime::CudaReport& cuda) {
  return {.name = "gpu compiler",
          .found = fmt::format("NVRTC {} {}", cuda.nvrtc_version, cuda.nvrtc_path),
          .problem = cuda.built_with_cuda ? cuda.nvrtc_problem
                                          : "this build has no GPU backend: no CUDA headers were found",
          .remedy = "pip install nvidia-cuda-nvrtc, or install a CUDA toolkit, or set ATTUNE_NVRTC",
          .tried = cuda.nvrtc_tried};
}

/// The folder itself, or the nearest one above it that is there.
fs::path nearest_existing(fs::path path) {
  std::error_code error;
  while (!fs::exists(path, error) && path.has_relative_path()) path = path.parent_path();
  return path;
}

/// Why a kernel could not be written there; empty when it could. Creates nothing.
std::string cache_problem(const cache::Store& store) {
  if (store.root().empty()) return "no folder is named";
  std::error_code error;
  const fs::path nearest = nearest_existing(store.root());
  if (!fs::is_directory(nearest, error)) return nearest.string() + " is not a folder";
  if (nearest == store.root()) {
    if (const auto checked = check_private_directory(nearest); !checked.ok())
      return checked.failure().message;
  }
  return ::access(nearest.c_str(), W_OK | X_OK) == 0 ? "" : nearest.string() + " cannot be written";
}

const char* name_of(cache::Mode mode) {
  switch (mode) {
    case cache::Mode::rw: return "rw";
    case cache::Mode::ro: return "ro";
    case cache::Mode::off: return "off";
    case cache::Mode::refresh: return "refresh";
  }
  return "";
}

Finding cache_finding() {
  Finding finding{
      .name = "cache",
      .found = {},
      .problem = {},
      .remedy = "set ATTUNE_CACHE_DIR to a folder of your own; without one, every process compiles anew"};
  const auto engine = runtime::Engine::global();
  if (!engine.ok()) {
    finding.problem = engine.failure().message;
    finding.remedy = "correct the variable: the list below has its values";
    return finding;
  }
  const cache::Store& store = (*engine)->store();
  finding.found = fmt::format("{} ({} kernels, {}, mode {})", store.root().string(), store.list().size(),
                              bytes_text(store.bytes_on_disk()), name_of(store.mode()));
  finding.problem = cache_problem(store);
  return finding;
}

/// Nothing when no remote is named; a wrong name is the cache's finding.
std::optional<Finding> remote_finding() {
  const auto options = runtime::EngineOptions::from_environment();
  if (!options.ok() || !options->remote) return std::nullopt;
  const cache::RemoteOptions& remote = *options->remote;
  const auto curl = cache::curl_description();
  return Finding{
      .name = "remote",
      .found = curl.ok() ? fmt::format("{} ({}), {}", remote.url, remote.writable ? "rw" : "ro", *curl) : "",
      .problem = curl.ok() ? "" : curl.failure().message,
      .remedy = "install libcurl4, or unset ATTUNE_REMOTE"};
}

// ---- The report ----

json to_json(const std::vector<Finding>& findings, bool cpu_works, bool cuda_works) {
  json list = json::array();
  for (const Finding& finding : findings) {
    list.push_back({{"name", finding.name},
                    {"ok", finding.problem.empty()},
                    {"found", finding.problem.empty() ? json(finding.found) : json(nullptr)},
                    {"problem", finding.problem.empty() ? json(nullptr) : json(finding.problem)},
                    {"remedy", finding.problem.empty() ? json(nullptr) : json(finding.remedy)},
                    {"tried", finding.tried}});
  }
  json variables = json::array();
  for (const EnvVariable& variable : env_variables()) {
    const auto value = env(variable.name);
    variables.push_back({{"name", variable.name},
                         {"value", value ? json(*value) : json(nullptr)},
                         {"values", variable.values},
                         {"effect", variable.effect}});
  }
  return {{"version", ATTUNE_VERSION},
          {"cpu_works", cpu_works},
          {"cuda_works", cuda_works},
          {"findings", std::move(list)},
          {"environment", std::move(variables)}};
}

std::string to_text(const std::vector<Finding>& findings, bool cpu_works, bool cuda_works) {
  Table found;
  std::string missing;
  for (const Finding& finding : findings) {
    const bool ok = finding.problem.empty();
    found.row({finding.name,
               ok ? paint("ok", Colour::green, Stream::out) : paint("missing", Colour::yellow, Stream::out),
               ok ? finding.found : finding.problem});
    if (ok) continue;
    missing += fmt::format("{}: {}\n", finding.name, finding.remedy);
    for (const std::string& place : finding.tried) missing += fmt::format("  looked at {}\n", place);
  }
  Table variables;
  for (const EnvVariable& variable : env_variables()) {
    variables.row({variable.name, env(variable.name).value_or("(not set)"),
                   fmt::format("{}: {}", variable.values, variable.effect)});
  }
  const auto verdict = [](bool works) { return works ? "works" : "does not work"; };
  std::string text = fmt::format("Attune {}: the CPU backend {}, the GPU backend {}.\n\n{}", ATTUNE_VERSION,
                                 verdict(cpu_works), verdict(cuda_works), found.text());
  if (!missing.empty()) text += "\nWhat is missing\n" + missing;
  return text + "\nEnvironment\n" + variables.text();
}

Result<int> doctor(bool as_json) {
  const runtime::CpuReport cpu = runtime::cpu_report();
  const runtime::CudaReport cuda = runtime::cuda_report();
  std::vector<Finding> findings{cpu_finding(cpu),  plugin_finding(cpu), driver_finding(cuda),
                                gpu_finding(cuda), nvrtc_finding(cuda), cache_finding()};
  if (auto remote = remote_finding()) findings.push_back(std::move(*remote));
  const bool cpu_works = cpu.isa_problem.empty() && cpu.plugin_problem.empty();
  const bool cuda_works = cuda.driver_problem.empty() && !cuda.devices.empty() && cuda.nvrtc_problem.empty();
  ATTUNE_TRY(as_json ? print_json(to_json(findings, cpu_works, cuda_works))
                     : print(to_text(findings, cpu_works, cuda_works)));
  return cpu_works || cuda_works ? kOk : kEnvironment;
}

}  // namespace

void add_doctor(CLI::App& app, Session& session) {
  app.add_subcommand("doctor", "What was found on this machine, what is missing, and how to get it")
      ->callback([&session] { session.action = [&session] { return doctor(session.json); }; });
}

}  // namespace attune::tools
