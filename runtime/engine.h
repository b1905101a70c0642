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
#include "runtime/backward.h"
#include "runtime/engine_options.h"
#include "runtime/explanation.h"
#include "runtime/images.h"
#include "runtime/tuned_choice.h"

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace attune::runtime {

/// One attention call, checked and reduced: which kernel it needs, and what that kernel is told.
struct Call {
  codegen::Problem problem;
  kernel::ForwardParams params;
  Device device;
  void* stream = nullptr;
  void* workspace = nullptr;  // where keys are split: Engine::plan() says into how many parts
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
  /// Decides whether the keys of a call are split, which takes a workspace and two launches (split_keys.h).
  Result<void> plan(Call& call);
  Result<void> run(const MergeCall& call);
  Result<void> run(const GradMergeCall& call);
  /// Launches every kernel of the pass, or none: all are loaded before the first is launched.
  Result<void> run(const BackwardCall& call);
  /// Likewise, as it was planned with the call's workspace.
  Result<void> run(const BackwardCall& call, const BackwardPlan& plan);
  /// Into a new plan: the launches of a backward call on its device, and the workspace that they need.
  Result<void> plan(const BackwardCall& call, BackwardPlan& plan);
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

  /// The kernel of one candidate, loaded, whatever would be chosen. For `attune bench`, which then keeps the
  /// choice that it made: from the next process on, calls on devices of this kind follow it.
  Result<std::shared_ptr<Kernel>> kernel_of(const codegen::Candidate& candidate,
                                            const codegen::Problem& problem, Device device);
  Result<void> keep(const TunedChoice& choice, const codegen::Problem& problem, Device device);

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

}  // namespace attune::runtime
