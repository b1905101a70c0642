// Backend: one device as the engine sees it. Compiles a unit to an image, loads an image, launches it.
// runtime/cuda and runtime/cpu implement it; the engine joins it with codegen and cache.
#pragma once

#include "attune/params.h"
#include "base/result.h"
#include "codegen/unit.h"

#include <nlohmann/json_fwd.hpp>

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace attune::runtime {

/// What a compiler returns: the bytes to load (a cubin, a shared object) and what is known about them.
struct Image {
  std::vector<std::byte> bytes;
  std::string metadata_json;  // an object: registers, spill_bytes, stack_bytes, shared_bytes, milliseconds by
                              // phase, log
};

/// A loaded kernel of the operation that its spec names. Thread-safe; lives as long as its backend.
class Kernel {
 public:
  virtual ~Kernel() = default;
  /// Launches on the caller's stream (CUDA; null is the default stream) or runs to completion (CPU). No
  /// checks: the engine has made them. Never called with an empty output, nor with another operation's
  /// parameters.
  virtual Result<void> forward(const kernel::ForwardParams& params, void* stream) = 0;
  virtual Result<void> merge(const kernel::MergeParams& params, void* stream) = 0;
  /// Any of the operations that take BackwardParams. Does nothing when there is nothing to write.
  virtual Result<void> backward(const kernel::BackwardParams& params, void* stream) = 0;
  virtual Result<void> grad_merge(const kernel::GradMergeParams& params, void* stream) = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual const codegen::Arch& arch() const = 0;
  /// Of a GPU: how many blocks run side by side at least.
  virtual int multiprocessors() const { return 1; }
  /// The compiler's identity for the key. Must not load LLVM; fails with environment when there is no
  /// compiler.
  virtual Result<codegen::CompilerId> compiler() = 0;
  /// Compiles. Thread-safe, parallel for different units. A compile error is internal, with the log.
  virtual Result<Image> compile(const codegen::Unit& unit) = 0;
  /// Fails with environment while the stream is being captured into a graph. Asked before a kernel is
  /// compiled and loaded for a launch on it, unless that is allowed: load() leaves a capture unharmed.
  virtual Result<void> may_load(void* /*stream*/) { return done(); }
  /// Loads an image that compile() returned, now or in another process. Fails with invalid_argument when it
  /// is rejected, and with environment when the device or the system fails.
  virtual Result<std::unique_ptr<Kernel>> load(std::span<const std::byte> image,
                                               const kernel::KernelSpec& spec) = 0;
  /// "NVIDIA H200 (sm_90a)", "x86-64-v4, 2 threads"
  virtual std::string description() const = 0;
  /// How long one of `count` calls takes on the device, launched on its default stream one behind the other.
  /// The host's part doesn't count where the device works by itself.
  virtual Result<double> microseconds(int count, const std::function<Result<void>()>& call) = 0;
};

}  // namespace attune::runtime
