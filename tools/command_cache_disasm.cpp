// attune cache disasm: a kernel's instructions, by the disassembler that this machine has.
#include "base/descriptor.h"
#include "tools/cache_entries.h"
#include "tools/command.h"
#include "tools/console.h"
#include "tools/process.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <span>

namespace attune::tools {
namespace {

struct DisasmOptions {
  std::string key;
  std::string tool;
};

/// A program and its arguments before the file.
using Tool = std::vector<std::string>;

/// In the order in which they are tried; a machine with a toolkit need not have it on its PATH.
std::vector<Tool> tools_for(bool gpu) {
  if (!gpu) return {{"llvm-objdump", "-d"}, {"llvm-objdump-19", "-d"}, {"objdump", "-d"}};
  return {{"nvdisasm"},
          {"cuobjdump", "-sass"},
          {"/usr/local/cuda/bin/nvdisasm"},
          {"/usr/local/cuda/bin/cuobjdump", "-sass"}};
}

/// The program that was asked for, with the arguments that it takes.
Tool tool_named(const std::string& program) {
  const std::string name = program.substr(program.rfind('/') + 1);
  if (name.find("cuobjdump") != std::string::npos) return {program, "-sass"};
  if (name.find("objdump") != std::string::npos) return {program, "-d"};
  return {program};
}

std::string hint(bool gpu) {
  return gpu ? "no nvdisasm and no cuobjdump: install a CUDA toolkit or 'pip install nvidia-cuda-nvdisasm', "
               "and name "
               "the program with --tool where it is not on the PATH"
             : "no llvm-objdump and no objdump: install LLVM or binutils, or name the program with --tool";
}

/// The bytes as a file without a name, so that nothing lies anywhere and nobody can replace it: children read
/// it under /proc/self/fd.
Result<Descriptor> file_of(std::span<const std::byte> bytes) {
  Descriptor file(::memfd_create("attune-kernel", 0));
  if (!file.valid()) return environment_failure(fmt::format("memfd_create: {}", std::strerror(errno)));
  while (!bytes.empty()) {
    const ssize_t written = ::write(file.get(), bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return environment_failure(fmt::format("memfd: {}", std::strerror(errno)));
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
  return file;
}

Result<int> disasm(const DisasmOptions& options, bool as_json) {
  ATTUNE_ASSIGN(store, open_store());
  ATTUNE_ASSIGN(found, find_whole(*store, options.key));
  const auto& [listed, entry] = found;
  const auto metadata = metadata_of(entry);
  if (is_tuned_choice(metadata)) {
    return invalid_argument(fmt::format(
        "{} is a choice of `attune bench --tune`, not a kernel; `attune cache show` has it", options.key));
  }
  const bool gpu = text_of(metadata, "target").starts_with("sm_");
  ATTUNE_ASSIGN(file, file_of(entry.payload));
  std::vector<Tool> tools = tools_for(gpu);
  if (!options.tool.empty()) tools = {tool_named(options.tool)};
  for (Tool& tool : tools) {
    tool.push_back(fmt::format("/proc/self/fd/{}", file.get()));
    ATTUNE_ASSIGN(outcome, run_program(tool));
    if (!outcome) continue;
    if (outcome->exit_code != 0) {
      return environment_failure(fmt::format("{} failed with exit code {}", tool[0], outcome->exit_code));
    }
    ATTUNE_TRY(as_json ? print_json({{"key", listed.key.hex()}, {"tool", tool[0]}, {"text", outcome->output}})
                       : print(printable(outcome->output, Lines::many)));
    return kOk;
  }
  return environment_failure(options.tool.empty() ? hint(gpu)
                                                  : fmt::format("--tool {}: no such program", options.tool));
}

}  // namespace

void add_cache_disasm(CLI::App& cache, Session& session) {
  auto options = std::make_shared<DisasmOptions>();
  CLI::App* command =
      cache.add_subcommand("disasm", "A kernel's instructions, by nvdisasm, cuobjdump or objdump");
  command->add_option("KEY", options->key, "Its key or the first digits of it")->required();
  command->add_option("--tool", options->tool, "The program to use");
  command->callback([options, &session] {
    session.action = [options, &session] { return disasm(*options, session.json); };
  });
}

}  // namespace attune::tools
