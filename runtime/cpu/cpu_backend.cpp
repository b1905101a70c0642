#include "runtime/cpu/cpu_backend.h"

#include "attune/backward.h"
#include "attune/blocks.h"
#include "attune/merge.h"
#include "base/env.h"
#include "codegen/emit.h"
#include "runtime/cpu/plugin_loader.h"
#include "runtime/cpu/shared_object.h"
#include "runtime/cpu/thread_pool.h"

#include <fmt/format.h>

#include <pthread.h>

#include <atomic>
#include <charconv>
#include <chrono>

namespace attune::runtime {
namespace {

using codegen::Isa;
using kernel::KernelSpec;

constexpr int kMaxThreads = 4096;

/// What the CPU and the operating system support. Features decide, never the name of the CPU.
Isa detect_isa() {
#if defined(__x86_64__)
  // These look at the enabled register state (XCR0) as well as at cpuid.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
                    __builtin_cpu_supports("movbe");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::none;
#else
  return Isa::none;
#endif
}

Result<int> wanted_threads() {
  const auto text = env("ATTUNE_THREADS");
  if (!text) return available_threads();
  int threads = 0;
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), threads);
  if (error != std::errc() || end != text->data() + text->size() || threads < 1 || threads > kMaxThreads) {
    return invalid_argument(
        fmt::format("ATTUNE_THREADS={}: expected a count from 1 to {}", *text, kMaxThreads));
  }
  return threads;
}

/// The process's pool. After a fork the child has none of the helpers, so it starts with a pool of its own.
class SharedPool {
 public:
  explicit SharedPool(int threads) {
    threads_ = threads;
    pthread_atfork(nullptr, nullptr, [] { pool_.store(nullptr); });
  }
  int threads() const { return threads_; }

  ThreadPool& get() const {
    if (ThreadPool* pool = pool_.load(std::memory_order_acquire)) return *pool;
    auto fresh = std::make_unique<ThreadPool>(threads_);
    ThreadPool* expected = nullptr;
    if (!pool_.compare_exchange_strong(expected, fresh.get(), std::memory_order_acq_rel)) return *expected;
    return *fresh.release();
  }

 private:
  inline static std::atomic<ThreadPool*> pool_{nullptr};
  int threads_;
};

template <typename Params>
using EntryPoint = void (*)(const Params*, long long slot, void* scratch);
using ScratchBytes = int (*)();

/// The slots of one call (blocks.h, merge.h) as tasks.
template <typename Params>
class Slots final : public TaskRunner {
 public:
  Slots(void* entry, const Params& params)
      : entry_(reinterpret_cast<EntryPoint<Params>>(entry)), params_(params) {}

  void run_task(std::int64_t index, void* scratch) const noexcept override {
    entry_(&params_, index, scratch);
  }

 private:
  const EntryPoint<Params> entry_;
  const Params& params_;
};

class CpuKernel final : public Kernel {
 public:
  CpuKernel(SharedObject object, void* entry, int scratch_bytes, const KernelSpec& spec,
            const SharedPool& pool)
      : object_(std::move(object)), entry_(entry), scratch_bytes_(scratch_bytes), spec_(spec), pool_(pool) {}

  Result<void> forward(const kernel::ForwardParams& params, void* /*stream*/) override {
    return run(params, kernel::forward_slots(spec_, params));
  }
  Result<void> merge(const kernel::MergeParams& params, void* /*stream*/) override {
    return run(params, kernel::merge_slots(spec_, params));
  }
  Result<void> backward(const kernel::BackwardParams& params, void* /*stream*/) override {
    return run(params, kernel::backward_slots(spec_, params));
  }
  Result<void> grad_merge(const kernel::GradMergeParams& params, void* /*stream*/) override {
    return run(params, kernel::merge_slots(spec_, params));
  }

 private:
  template <typename Params>
  Result<void> run(const Params& params, std::int64_t slots) {
    return pool_.get().run(Slots<Params>(entry_, params), slots, static_cast<std::size_t>(scratch_bytes_));
  }

  const SharedObject object_;
  void* const entry_;
  const int scratch_bytes_;
  const KernelSpec spec_;
  const SharedPool& pool_;
};

class CpuBackend final : public Backend {
 public:
  CpuBackend(codegen::Arch arch, int threads) : arch_(std::move(arch)), pool_(threads) {}

  const codegen::Arch& arch() const override { return arch_; }
  Result<codegen::CompilerId> compiler() override { return clang_compiler(arch_); }
  Result<Image> compile(const codegen::Unit& unit) override { return clang_compile(unit); }

  Result<std::unique_ptr<Kernel>> load(std::span<const std::byte> image, const KernelSpec& spec) override {
    ATTUNE_ASSIGN(object, SharedObject::load(image));
    void* const entry = object.symbol(codegen::kEntryName);
    const auto scratch_bytes = reinterpret_cast<ScratchBytes>(object.symbol(codegen::kScratchName));
    if (entry == nullptr || scratch_bytes == nullptr) {
      return invalid_argument(fmt::format("a CPU kernel of {} bytes lacks {} or {}: remove it from the cache",
                                          image.size(), codegen::kEntryName, codegen::kScratchName));
    }
    return std::unique_ptr<Kernel>(
        std::make_unique<CpuKernel>(std::move(object), entry, scratch_bytes(), spec, pool_));
  }

  std::string description() const override {
    return fmt::format("{}, {} thread{}", arch_.target, pool_.threads(), pool_.threads() == 1 ? "" : "s");
  }

  Result<double> microseconds(int count, const std::function<Result<void>()>& call) override {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < count; ++i) ATTUNE_TRY(call());
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count() /
           count;
  }

 private:
  const codegen::Arch arch_;
  const SharedPool pool_;
};

Result<Backend*> make_backend() {
  ATTUNE_ASSIGN(arch, codegen::cpu_arch(detect_isa()));
  ATTUNE_ASSIGN(threads, wanted_threads());
  return new CpuBackend(std::move(arch), threads);  // never destroyed: helpers may outlive static destruction
}

}  // namespace

Result<Backend*> cpu_backend() {
  static const Result<Backend*> backend = make_backend();
  return backend;
}

CpuReport cpu_report() {
  CpuReport report;
  report.isa = detect_isa();
  if (const auto arch = codegen::cpu_arch(report.isa); !arch.ok())
    report.isa_problem = arch.failure().message;
  const auto threads = wanted_threads();
  report.threads = threads.ok() ? *threads : available_threads();
  report.plugin_tried = plugin_candidates();
  if (const auto& clang = plugin(); clang.ok()) {
    report.plugin_path = clang->path;
    report.plugin_version = fmt::format("clang {}", clang->version());
  } else {
    report.plugin_problem = clang.failure().message;
  }
  return report;
}

}  // namespace attune::runtime
