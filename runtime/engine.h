// Engine: problem -> spec -> source -> key -> cache or compiler -> loaded kernel -> launch. The only place
// that joins codegen, cache and the backends.
#pragma once

#include "attune/attune.h"
#include "attune/params.h"
#include "base/result.h"
#include "cache/store.h"
#include "codegen/choose.h"
#include "codegen/problem.h"
#include "codegen/unit.h"
#include "runtime/backend.h"

#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace attune::runtime {

enum class JitMode {
  automatic,
  never,
  always
};  // ATTUNE_JIT: never refuses to compile; always ignores the cache

struct EngineOptions {
  std::optional<std::filesystem::path> cache_root;
  cache::Mode cache_mode = cache::Mode::rw;
  JitMode jit = JitMode::automatic;
  std::string record_path;  // ATTUNE_RECORD: append each new problem as a precompile line

  /// From ATTUNE_CACHE_DIR, ATTUNE_CACHE_MODE, ATTUNE_JIT, ATTUNE_RECORD. An unknown value is an
  /// invalid_argument.
  static Result<EngineOptions> from_environment();
};

/// One attention call, checked and reduced: which kernel it needs, and what that kernel is told.
struct Call {
  codegen::Problem problem;
  kernel::ForwardParams params;
  Device device;
  void* stream = nullptr;
};

/// How a kernel came to be loaded; for explain, the counters and the tests.
enum class Source { memory, disk, compiler };

struct Prepared {
  codegen::Unit unit;
  std::string candidate;
  std::string metadata_json;
  Source source = Source::memory;
};

class Engine {
 public:
  explicit Engine(EngineOptions options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// The process's engine, made from the environment at first use. Never destroyed.
  static Result<Engine*> global();

  /// Runs. On a hit: one table look-up and one launch; no string, lock, allocation or environment read.
  Result<void> run(const Call& call);
  /// Compiles and loads without launching.
  Result<void> prepare(const codegen::Problem& problem, Device device);
  /// Looks up or compiles for an architecture that need not be here; stores, does not load. For `attune
  /// precompile`.
  Result<Prepared> precompile(const codegen::Problem& problem, const codegen::Arch& arch);
  /// The JSON object that attune::explain documents.
  Result<std::string> explain(const codegen::Problem& problem, Device device);

  Counters counters() const;
  cache::Store& store();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// The candidate that this thread's last run() used.
const std::string& last_kernel_name();

/// The backend of a device, CPU or CUDA.
Result<Backend*> backend_of(Device device);

/// Identity of the compiler for an architecture, and compilation without a device.
Result<codegen::CompilerId> compiler_for(const codegen::Arch& arch);
Result<Image> compile_for(const codegen::Unit& unit);

}  // namespace attune::runtime
