#include "runtime/cuda/nvrtc.h"

#include "codegen/candidates.h"
#include "runtime/cuda/build_id.h"
#include "runtime/cuda/compile_log.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>

namespace attune::runtime {
namespace {

namespace fs = std::filesystem;

std::string dl_error() {
  const char* text = dlerror();
  return text == nullptr ? "unknown error" : text;
}

/// libnvrtc opens its builtins by bare name and has no run path. Opening them by path first, from its own
/// folder, makes that succeed wherever the pair lies. Not fatal: a loader's path may lead to them as well.
void open_builtins(const fs::path& nvrtc, int major, int minor) {
  const fs::path builtins = nvrtc.parent_path() / fmt::format("libnvrtc-builtins.so.{}.{}", major, minor);
  dlopen(builtins.c_str(), RTLD_NOW | RTLD_GLOBAL);
}

}  // namespace

Result<void> Nvrtc::resolve(void* library, const std::string& name) {
#define ATTUNE_NVRTC_RESOLVE(function)                                              \
  function##_ = reinterpret_cast<decltype(function##_)>(dlsym(library, #function)); \
  if (function##_ == nullptr) return environment_failure(name + " lacks " #function);
  ATTUNE_NVRTC_FUNCTIONS(ATTUNE_NVRTC_RESOLVE)
#undef ATTUNE_NVRTC_RESOLVE
  return done();
}

Result<Nvrtc> Nvrtc::open(const std::string& library, bool only_if_loaded) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL | (only_if_loaded ? RTLD_NOLOAD : 0));
  if (handle == nullptr) {
    return environment_failure(only_if_loaded ? library + ": not loaded in this process" : dl_error());
  }
  Nvrtc nvrtc;
  ATTUNE_TRY(nvrtc.resolve(handle, library));
  Dl_info info{};
  const bool located = dladdr(reinterpret_cast<const void*>(nvrtc.nvrtcVersion_), &info) != 0;
  nvrtc.path_ = located && info.dli_fname != nullptr ? info.dli_fname : library;
  if (nvrtc.nvrtcVersion_(&nvrtc.major_, &nvrtc.minor_) != NVRTC_SUCCESS) {
    return environment_failure(nvrtc.path_ + ": nvrtcVersion failed");
  }
  int count = 0;
  if (nvrtc.nvrtcGetNumSupportedArchs_(&count) != NVRTC_SUCCESS || count <= 0) {
    return environment_failure(nvrtc.path_ + ": nvrtcGetNumSupportedArchs failed");
  }
  nvrtc.archs_.resize(static_cast<std::size_t>(count));
  if (nvrtc.nvrtcGetSupportedArchs_(nvrtc.archs_.data()) != NVRTC_SUCCESS) {
    return environment_failure(nvrtc.path_ + ": nvrtcGetSupportedArchs failed");
  }
  open_builtins(nvrtc.path_, nvrtc.major_, nvrtc.minor_);
  nvrtc.identity_ = nvrtc_identity(nvrtc.major_, nvrtc.minor_, build_id(info.dli_fbase, nvrtc.path_));
  return nvrtc;
}

bool Nvrtc::knows(int sm) const {
  return std::ranges::find(archs_, sm) != archs_.end();
}

std::string nvrtc_identity(int major, int minor, const std::string& build_id) {
  return fmt::format("nvrtc {}.{} {}", major, minor, build_id);
}

std::vector<std::string> nvrtc_options(int major, int minor, const codegen::Arch& arch) {
  std::vector<std::string> options{
      "-arch=" + arch.target,
      "-std=c++20",
      "-default-device",  // functions without annotation, such as semantics.h's, are device functions
      "--modify-stack-limit=false",  // else NVRTC changes the whole process's limit
      "--ptxas-options=-v",          // registers and spills, into the log
  };
  // NVRTC's own cache on disk, new in 12.9, needs a driver and is unsafe inside a stream capture; Attune has
  // its own.
  if (major > 12 || (major == 12 && minor >= 9)) options.emplace_back("--no-cache");
  return options;
}

Result<Image> Nvrtc::compile(const codegen::Unit& unit) const {
  if (unit.compiler.name != identity_) {
    return environment_failure(
        fmt::format("{} is {}, and {} was asked for: it has changed, or ATTUNE_NVRTC has", path_, identity_,
                    unit.compiler.name));
  }
  std::vector<std::string> owned;  // NVRTC wants terminated strings
  owned.reserve(unit.headers.size() * 2);
  std::vector<const char*> names;
  std::vector<const char*> texts;
  for (const codegen::EmbeddedFile& header : unit.headers) {
    names.push_back(owned.emplace_back(header.name).c_str());
    texts.push_back(owned.emplace_back(header.text).c_str());
  }
  const auto check = [&](nvrtcResult result, const char* what) -> Result<void> {
    if (result == NVRTC_SUCCESS) return done();
    return internal_failure(fmt::format("{} failed: {} ({})", what, nvrtcGetErrorString_(result), path_));
  };
  nvrtcProgram program = nullptr;
  ATTUNE_TRY(check(nvrtcCreateProgram_(&program, unit.source.c_str(), "attune_kernel.cu",
                                       static_cast<int>(names.size()), texts.data(), names.data()),
                   "nvrtcCreateProgram"));
  const auto destroy = [this](nvrtcProgram p) { nvrtcDestroyProgram_(&p); };
  const std::unique_ptr<std::remove_pointer_t<nvrtcProgram>, decltype(destroy)> owner(program, destroy);

  std::vector<const char*> options;
  for (const std::string& option : unit.compiler.options) options.push_back(option.c_str());
  const auto begin = std::chrono::steady_clock::now();
  const nvrtcResult compiled =
      nvrtcCompileProgram_(program, static_cast<int>(options.size()), options.data());
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;

  std::size_t size = 0;
  ATTUNE_TRY(check(nvrtcGetProgramLogSize_(program, &size), "nvrtcGetProgramLogSize"));
  std::string log(size, '\0');
  if (size > 0) ATTUNE_TRY(check(nvrtcGetProgramLog_(program, log.data()), "nvrtcGetProgramLog"));
  log.resize(std::min(log.size(), log.find('\0')));  // the size counts the terminator
  if (compiled != NVRTC_SUCCESS) {
    return internal_failure(fmt::format("{} did not compile for {}: {}\n{}", unit.compiler.name,
                                        unit.arch.target, nvrtcGetErrorString_(compiled), log));
  }

  Image image;
  ATTUNE_TRY(check(nvrtcGetCUBINSize_(program, &size), "nvrtcGetCUBINSize"));
  image.bytes.resize(size);
  ATTUNE_TRY(check(nvrtcGetCUBIN_(program, reinterpret_cast<char*>(image.bytes.data())), "nvrtcGetCUBIN"));
  const CompileFacts facts = read_compile_log(log);
  image.metadata_json = nlohmann::json{
      {"registers", facts.registers},
      {"spill_bytes", facts.spill_bytes},
      {"stack_bytes", facts.stack_bytes},
      {"shared_bytes", codegen::shared_bytes(unit.spec) + facts.static_shared_bytes},
      {"milliseconds",
       {{"compile", took.count() - facts.assembly_milliseconds}, {"assemble", facts.assembly_milliseconds}}},
      {"log", log}}.dump();
  return image;
}

}  // namespace attune::runtime
