// attune devices: what this machine can compute on.
#include "codegen/arch.h"
#include "runtime/cpu/cpu_backend.h"
#include "runtime/cuda/cuda_backend.h"
#include "tools/command.h"
#include "tools/console.h"
#include "tools/table.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace attune::tools {
namespace {

using nlohmann::json;

/// "sm_90a"; a GPU that no kernel knows says so.
std::string target_of(const Result<codegen::Arch>& arch) {
  return arch.ok() ? arch->target : "unsupported";
}

Result<int> devices(bool as_json) {
  const runtime::CpuReport cpu = runtime::cpu_report();
  const runtime::CudaReport cuda = runtime::cuda_report();
  const std::string cpu_target = target_of(codegen::cpu_arch(cpu.isa));
  Table table({"device", "target", "name", ">memory"});
  table.row({"cpu", cpu_target, fmt::format("{} threads", cpu.threads), ""});
  json list = json::array({{{"device", "cpu"}, {"target", cpu_target}, {"threads", cpu.threads}}});
  for (const runtime::CudaDeviceInfo& gpu : cuda.devices) {
    const std::string device = fmt::format("cuda:{}", gpu.index);
    const std::string target = target_of(codegen::cuda_arch(gpu.sm));
    table.row({device, target, fmt::format("{}, {} multiprocessors", gpu.name, gpu.multiprocessors),
               bytes_text(gpu.memory_bytes)});
    list.push_back({{"device", device},
                    {"target", target},
                    {"name", gpu.name},
                    {"multiprocessors", gpu.multiprocessors},
                    {"memory_bytes", gpu.memory_bytes}});
  }
  ATTUNE_TRY(as_json ? print_json({{"devices", std::move(list)}}) : print(table.text()));
  return kOk;
}

}  // namespace

void add_devices(CLI::App& app, Session& session) {
  app.add_subcommand("devices", "What this machine can compute on")->callback([&session] {
    session.action = [&session] { return devices(session.json); };
  });
}

}  // namespace attune::tools
