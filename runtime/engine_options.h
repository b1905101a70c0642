// What an engine is told: by its maker or by the environment.
#pragma once

#include "base/result.h"
#include "cache/remote.h"
#include "cache/store.h"
#include "runtime/compile_child.h"

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace attune::runtime {

/// ATTUNE_JIT: what becomes of kernels that no cache has.
enum class JitMode {
  automatic,  // compile what is not in the cache
  never,      // fail instead of compiling
  always,     // compile at every first use, whatever the cache holds
};

/// ATTUNE_CAPTURE: what a call does whose kernel is not loaded yet, while its stream is captured into a
/// graph.
enum class CaptureMode {
  refuse,   // fail, as a capture is not the place to wait for a compiler
  compile,  // obtain and load it: the graph holds its launch and nothing else
};

/// ATTUNE_COMPILE_IN: where compilers run.
enum class CompileIn { process, child };

/// ATTUNE_BACKEND: the backends that calls may use.
enum class BackendChoice { automatic, cuda, cpu };

struct EngineOptions {
  std::optional<std::filesystem::path> cache_root;  // nothing: no cache on disk
  cache::Mode cache_mode = cache::Mode::rw;
  std::uint64_t cache_max_bytes = cache::kDefaultMaxBytes;  // 0: no bound
  std::vector<std::filesystem::path> cache_paths;           // ATTUNE_CACHE_PATH: packs and shared folders
  std::optional<cache::RemoteOptions> remote;               // ATTUNE_REMOTE; nothing: none
  JitMode jit = JitMode::automatic;
  CaptureMode capture = CaptureMode::refuse;
  CompileIn compile_in = CompileIn::process;
  CompileChild compile_child;  // of CompileIn::child
  BackendChoice backend = BackendChoice::automatic;
  bool follow_tuned = true;  // ATTUNE_TUNED: take the choices of `attune bench --tune`
  std::string template_dir;  // ATTUNE_TEMPLATE_DIR: templates from disk instead of the embedded ones
  std::string
      record_path;  // ATTUNE_RECORD: append a line for `attune precompile` per problem at its first use

  /// From the environment (docs/environment.md). An unknown value is an invalid_argument.
  static Result<EngineOptions> from_environment();
};

}  // namespace attune::runtime
