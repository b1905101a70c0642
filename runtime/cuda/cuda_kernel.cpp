#include "runtime/cuda/cuda_kernel.h"

#include "attune/backward.h"
#include "attune/blocks.h"
#include "attune/cuda/shared.h"
#include "attune/merge.h"
#include "codegen/candidates.h"
#include "codegen/emit.h"
#include "runtime/cuda/grad_bias_sm90_launch.h"
#include "runtime/cuda/grad_key_value_sm90_launch.h"
#include "runtime/cuda/grid.h"
#include "runtime/cuda/sm90_launch.h"
#include "runtime/pack_heads.h"

#include <fmt/format.h>

#include <array>
#include <atomic>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace attune::runtime {
namespace {

/// Does the driver say of the image's bytes that they are no kernel for it? Other failures, as of memory or
/// of an earlier kernel, say nothing about them.
bool refuses_image(CUresult result) {
  switch (result) {
    case CUDA_ERROR_INVALID_IMAGE:
    case CUDA_ERROR_INVALID_SOURCE:
    case CUDA_ERROR_NO_BINARY_FOR_GPU:
    case CUDA_ERROR_NOT_FOUND:
    case CUDA_ERROR_UNSUPPORTED_PTX_VERSION: return true;
    default: return false;
  }
}

/// The image in the driver: one library for all contexts since CUDA 12.0, a module for each before. Once a
/// function was handed out it is never unloaded: work may be under way until the process ends.
class LoadedImage {
 public:
  LoadedImage(const CudaDevice& device, std::span<const std::byte> image, int shared_bytes)
      : device_(device), image_(image.begin(), image.end()), shared_bytes_(shared_bytes) {}
  LoadedImage(const LoadedImage&) = delete;
  LoadedImage& operator=(const LoadedImage&) = delete;
  ~LoadedImage() {
    if (library_ == nullptr || used_) return;
    const RelaxedCapture relaxed(*device_.driver);
    device_.driver->cuLibraryUnload(library_);
  }

  /// The kernel's handle in the current context, resident and with its shared memory granted.
  Result<CUfunction> resolve() {
    const RelaxedCapture relaxed(*device_.driver);
    ATTUNE_ASSIGN(function, device_.driver->cuLibraryLoadData != nullptr ? from_library() : from_module());
    used_ = true;
    return function;
  }

 private:
  Result<CUfunction> from_library() {
    const Driver& driver = *device_.driver;
    if (library_ == nullptr) {
      ATTUNE_TRY(check_load(
          driver.cuLibraryLoadData(&library_, image_.data(), nullptr, nullptr, 0, nullptr, nullptr, 0)));
      image_ = {};  // the driver keeps its own copy
    }
    CUkernel kernel = nullptr;
    ATTUNE_TRY(check_load(driver.cuLibraryGetKernel(&kernel, library_, codegen::kEntryName)));
    CUfunction function = nullptr;
    ATTUNE_TRY(check_load(driver.cuKernelGetFunction(&function, kernel)));
    ATTUNE_TRY(make_resident(function));
    return function;
  }

  Result<CUfunction> from_module() {
    const Driver& driver = *device_.driver;
    CUmodule module = nullptr;
    ATTUNE_TRY(check_load(driver.cuModuleLoadData(&module, image_.data())));
    CUfunction function = nullptr;
    auto ready = check_load(driver.cuModuleGetFunction(&function, module, codegen::kEntryName));
    if (ready.ok()) ready = make_resident(function);
    if (ready.ok()) return function;
    driver.cuModuleUnload(module);
    return ready.failure();
  }

  Result<void> make_resident(CUfunction function) const {
    const Driver& driver = *device_.driver;
    ATTUNE_TRY(driver.check(
        driver.cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes_),
        "granting the kernel its shared memory"));
    return driver.cuFuncLoad == nullptr ? done() : check_load(driver.cuFuncLoad(function));
  }

  /// Fails with invalid_argument when the driver refuses the image.
  Result<void> check_load(CUresult result) const {
    if (!refuses_image(result)) return device_.driver->check(result, "loading a kernel");
    const std::string rejected =
        fmt::format("driver {} rejected a kernel image for {} on {}",
                    cuda_version_text(device_.driver->version), device_.arch.target, device_.name);
    return invalid_argument(device_.driver->check(result, rejected.c_str()).failure().message);
  }

  const CudaDevice& device_;
  std::vector<std::byte> image_;
  int shared_bytes_;
  CUlibrary library_ = nullptr;
  bool used_ = false;
};

/// A context's function, of the first contexts found without a lock. Handles of destroyed contexts come back
/// for new ones, ids never do.
class FunctionTable {
 public:
  /// Null of contexts that came later, too.
  CUfunction find(std::uint64_t context) const {
    for (const Entry& entry : entries_) {
      const std::uint64_t known = entry.context.load(std::memory_order_acquire);
      if (known == context) return entry.function;
      if (known == kEmpty) return nullptr;
    }
    return nullptr;
  }

  /// By one thread at a time.
  CUfunction find_of_all(std::uint64_t context) const {
    if (CUfunction function = find(context)) return function;
    const auto later = later_.find(context);
    return later == later_.end() ? nullptr : later->second;
  }

  /// By one thread at a time.
  void insert(std::uint64_t context, CUfunction function) {
    for (Entry& entry : entries_) {
      if (entry.context.load(std::memory_order_relaxed) != kEmpty) continue;
      entry.function = function;
      entry.context.store(context, std::memory_order_release);
      return;
    }
    later_.emplace(context, function);
  }

 private:
  static constexpr std::uint64_t kEmpty = ~std::uint64_t{0};
  struct Entry {
    std::atomic<std::uint64_t> context{kEmpty};
    CUfunction function = nullptr;
  };
  std::array<Entry, 16> entries_;
  std::unordered_map<std::uint64_t, CUfunction> later_;
};

/// The first CUDA whose graphs know of launches that begin early, as a capture may have them.
constexpr int kEarlyInGraphs = 12030;

class CudaKernel final : public Kernel {
 public:
  CudaKernel(const CudaDevice& device, std::span<const std::byte> image, const kernel::KernelSpec& spec)
      : device_(device),
        driver_(*device.driver),
        spec_(spec),
        image_(device, image, kernel::shared_bytes(spec)) {}

  /// Makes the kernel resident in the context that launches from this thread would use.
  Result<void> prepare() {
    ATTUNE_ASSIGN(scope, ScopedContext::enter(driver_, device_.handle, device_.primary));
    ATTUNE_TRY(function_here());
    return done();
  }

  Result<void> forward(const kernel::ForwardParams& call, void* stream) override {
    const auto packed = packed_heads(spec_, call);
    const kernel::ForwardParams& params = packed ? *packed : call;
    return with_function(kernel::forward_slots(spec_, params), [&](CUfunction function, unsigned slots) {
      if (spec_.family == kernel::Family::sm90)
        return launch_sm90<kernel::ForwardSm90Params>(function, params, stream);
      return launch(function, &params, slots, stream);
    });
  }
  Result<void> merge(const kernel::MergeParams& params, void* stream) override {
    return launch_slots(kernel::merge_slots(spec_, params), params, stream);
  }
  Result<void> backward(const kernel::BackwardParams& params, void* stream) override {
    if (spec_.family != kernel::Family::sm90)
      return launch_slots(kernel::backward_slots(spec_, params), params, stream);
    return with_function(kernel::backward_slots(spec_, params), [&](CUfunction function, unsigned /*slots*/) {
      if (spec_.operation == kernel::Operation::grad_bias)
        return launch_sm90<kernel::GradBiasSm90Params>(function, params, stream);
      return launch_sm90<kernel::GradKeyValueSm90Params>(function, params, stream);
    });
  }
  Result<void> grad_merge(const kernel::GradMergeParams& params, void* stream) override {
    return launch_slots(kernel::merge_slots(spec_, params), params, stream);
  }

 private:
  template <typename Params>
  Result<void> launch_slots(long long slots, const Params& params, void* stream) {
    if (slots == 0) return done();
    return with_function(slots, [&](CUfunction function, unsigned blocks) {
      return launch(function, &params, blocks, stream);
    });
  }

  /// Calls body(function, slots) with a context of the device current.
  template <typename Body>
  Result<void> with_function(long long slots, Body&& body) {
    ATTUNE_ASSIGN(blocks, blocks_of(slots, spec_.block_m));
    // The usual case first: the caller's context is one that has run the kernel. Contexts of other devices
    // are never in the table.
    if (CUcontext current = nullptr;
        driver_.cuCtxGetCurrent(&current) == CUDA_SUCCESS && current != nullptr) {
      if (CUfunction function = functions_.find(id_of(current))) return body(function, blocks);
    }
    ATTUNE_ASSIGN(scope, ScopedContext::enter(driver_, device_.handle, device_.primary));
    ATTUNE_ASSIGN(function, function_here());
    return body(function, blocks);
  }

  std::uint64_t id_of(CUcontext context) const {
    unsigned long long id = 0;
    if (driver_.cuCtxGetId != nullptr && driver_.cuCtxGetId(context, &id) == CUDA_SUCCESS) return id;
    return reinterpret_cast<std::uintptr_t>(context);
  }

  Result<CUfunction> function_here() {
    CUcontext current = nullptr;
    ATTUNE_TRY(driver_.check(driver_.cuCtxGetCurrent(&current), "asking for the current CUDA context"));
    const std::uint64_t id = id_of(current);
    const std::lock_guard lock(mutex_);
    if (CUfunction known = functions_.find_of_all(id)) return known;
    ATTUNE_ASSIGN(function, image_.resolve());
    functions_.insert(id, function);
    return function;
  }

  /// Sm90Params are what its kernel is told: `told`, tensor maps and a schedule.
  template <typename Sm90Params, typename Params>
  Result<void> launch_sm90(CUfunction function, const Params& told, void* stream) const {
    Sm90Params params;
    ATTUNE_TRY(fill_sm90_params(device_, spec_, told, static_cast<CUstream>(stream), params));
    if constexpr (std::is_same_v<Sm90Params, kernel::GradBiasSm90Params>) {
      if (params.slot_blocks > 1) return launch_clusters(function, params, stream);
    }
    const auto cluster = static_cast<unsigned>(kernel::cluster_blocks(spec_));
    return launch(function, &params, sm90_blocks(device_, params) * cluster, stream);
  }

  /// Clusters of a size that the kernel's source does not say.
  Result<void> launch_clusters(CUfunction function, const kernel::GradBiasSm90Params& params,
                               void* stream) const {
    CUlaunchAttribute cluster{};
    cluster.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    cluster.value.clusterDim = {static_cast<unsigned>(params.slot_blocks), 1, 1};
    void* arguments[] = {const_cast<kernel::GradBiasSm90Params*>(&params)};
    const CUlaunchConfig config = config_of(sm90_blocks(device_, params), static_cast<CUstream>(stream));
    return driver_.check(launch_with(cluster, config, function, arguments),
                         "launching an attention kernel in clusters");
  }

  /// One block per slot of the operation's work; sm90 blocks stay and take one after the other.
  Result<void> launch(CUfunction function, const void* params, unsigned blocks, void* stream) const {
    void* arguments[] = {const_cast<void*>(params)};  // the driver copies them
    const CUlaunchConfig config = config_of(blocks, static_cast<CUstream>(stream));
    const CUresult result =
        begins_early() ? launch_early(config, function, arguments)
                       : driver_.cuLaunchKernel(function, blocks, 1, 1, config.blockDimX, config.blockDimY, 1,
                                                config.sharedMemBytes, config.hStream, arguments, nullptr);
    if (result == CUDA_SUCCESS) return done();
    return driver_.check(result, "launching an attention kernel");
  }

  CUlaunchConfig config_of(unsigned blocks, CUstream stream) const {
    const int lone_warps = kernel::lone_warps(spec_);
    return {.gridDimX = blocks,
            .gridDimY = 1,
            .gridDimZ = 1,
            .blockDimX = static_cast<unsigned>(codegen::threads(spec_) / lone_warps),
            .blockDimY = static_cast<unsigned>(lone_warps),
            .blockDimZ = 1,
            .sharedMemBytes = static_cast<unsigned>(kernel::shared_bytes(spec_)),
            .hStream = stream,
            .attrs = nullptr,
            .numAttrs = 0};
  }

  bool begins_early() const {
    return kernel::begins_early(spec_) && device_.arch.sm >= 90 && driver_.cuLaunchKernelEx != nullptr &&
           driver_.version >= kEarlyInGraphs;
  }

  /// As soon as the launch before lets it, so that its way to the GPU is none of the call's time.
  CUresult launch_early(const CUlaunchConfig& config, CUfunction function, void** arguments) const {
    CUlaunchAttribute early{
        .id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, .pad = {}, .value = {}};
    early.value.programmaticStreamSerializationAllowed = 1;
    return launch_with(early, config, function, arguments);
  }

  CUresult launch_with(CUlaunchAttribute attribute, CUlaunchConfig config, CUfunction function,
                       void** arguments) const {
    config.attrs = &attribute;
    config.numAttrs = 1;
    return driver_.cuLaunchKernelEx(&config, function, arguments, nullptr);
  }

  const CudaDevice& device_;
  const Driver& driver_;
  const kernel::KernelSpec spec_;
  std::mutex mutex_;  // guards image_ and writes to functions_
  LoadedImage image_;
  FunctionTable functions_;
};

}  // namespace

Result<std::unique_ptr<Kernel>> load_cuda_kernel(const CudaDevice& device, std::span<const std::byte> image,
                                                 const kernel::KernelSpec& spec) {
  if (spec.family == kernel::Family::sm90 && device.driver->cuTensorMapEncodeTiled == nullptr) {
    return environment_failure(
        fmt::format("driver {} makes no tensor maps, which kernels for Hopper need: install driver 525 (CUDA "
                    "12) or later, or allow other families alone",
                    cuda_version_text(device.driver->version)));
  }
  auto kernel = std::make_unique<CudaKernel>(device, image, spec);
  ATTUNE_TRY(kernel->prepare());
  return std::unique_ptr<Kernel>(std::move(kernel));
}

}  // namespace attune::runtime
