// Engine: problem -> spec -> source -> key -> cache or compiler -> loaded kernel -> launch. The only place
// that joins codegen, cache and the backends.
#pragma once

#include "attune/attune.h"
#include "attune/params.h"
#include "base/result.h"
#include "cache/layers.h"
#include "cache/remote.h"
#include "cache/store.h"
#include "codegen/choose.h"
#include "codegen/problem.h"
#include "codegen/unit.h"
#include "runtime/backend.h"
#include "runtime/backward.h"
#include "runtime/compile_child.h"
#include "runtime/explanation.h"

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace attune::runtime {

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
  std::string template_dir;  // ATTUNE_TEMPLATE_DIR: templates from disk instead of the embedded ones
  std::string
      record_path;  // ATTUNE_RECORD: append a line for `attune precompile` per problem at its first use

  /// From the environment (docs/environment.md). An unknown value is an invalid_argument.
  static Result<EngineOptions> from_environment();
};

/// One attention call, checked and reduced: which kernel it needs, and what that kernel is told.
struct Call {
  codegen::Problem problem;
  kernel::ForwardParams params;
  Device device;
  void* stream = nullptr;
};

/// One merge of chunks, likewise.
struct MergeCall {
  codegen::Problem problem;
  kernel::MergeParams params;
  Device device;
  void* stream = nullptr;
};

/// The gradients of one merge, likewise. Launches share out the chunks: those of `params` are not looked at.
struct GradMergeCall {
  codegen::Problem problem;
  kernel::GradMergeParams params;
  std::vector<kernel::GradChunk> chunks;
  Device device;
  void* stream = nullptr;
};

/// Where a kernel's image came from.
enum class Source { disk, compiler };

/// A kernel's image with everything known about it.
struct Obtained {
  codegen::Unit unit;
  std::string candidate;
  std::string metadata_json;
  std::vector<std::byte> image;
  Source source = Source::compiler;
  std::string layer;  // where on disk it was
};

class Engine {
 public:
  /// Fails with environment when the template folder cannot be read.
  static Result<std::unique_ptr<Engine>> create(EngineOptions options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// The process's engine, made from the environment at first use. Never destroyed.
  static Result<Engine*> global();

  /// Runs. On a hit: one table look-up and one launch; no string, lock, allocation or environment read.
  Result<void> run(const Call& call);
  Result<void> run(const MergeCall& call);
  Result<void> run(const GradMergeCall& call);
  /// Launches every kernel of the pass, or none: all are loaded before the first is launched.
  Result<void> run(const BackwardCall& call);
  /// The launches of a backward call on its device, and the workspace that they need.
  Result<BackwardPlan> plan(const BackwardCall& call);
  /// Compiles and loads without launching. While `stream` is captured it is as EngineOptions::capture says.
  Result<void> prepare(const codegen::Problem& problem, Device device, void* stream = nullptr);
  /// Looks up or compiles for an architecture that need not be here; stores, does not load. For `attune
  /// precompile`.
  Result<std::shared_ptr<const Obtained>> precompile(const codegen::Problem& problem,
                                                     const codegen::Arch& arch);
  /// What would run for the problem. `device` is where a loaded kernel is looked for; nothing when the
  /// architecture need not be here.
  Result<Explanation> explain(const codegen::Problem& problem, const codegen::Arch& arch,
                              std::optional<Device> device);

  Counters counters() const;
  cache::Store& store();
  /// The templates that kernels are made of.
  std::span<const codegen::EmbeddedFile> headers() const;

 private:
  struct State;
  explicit Engine(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

/// The candidate that this thread's last run() used; empty before the first.
const std::string& last_kernel_name();

/// The backend of a device, CPU or CUDA.
Result<Backend*> backend_of(Device device);

/// Identity of the compiler for an architecture, and compilation without a device.
Result<codegen::CompilerId> compiler_for(const codegen::Arch& arch);
Result<Image> compile_for(const codegen::Unit& unit);

}  // namespace attune::runtime
