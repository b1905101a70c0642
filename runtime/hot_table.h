// The hot path's look-up: problem -> ready kernel, for one device. Readers take no lock, allocate nothing and
// compare plain bytes; writers are rare and serialised.
#pragma once

#include "codegen/problem.h"
#include "runtime/backend.h"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace attune::runtime {

/// A kernel that is ready to launch for one problem on one device.
struct ReadyKernel {
  codegen::Problem problem;
  std::shared_ptr<Kernel> kernel;
  std::string name;  // of the candidate
};

class HotTable {
 public:
  HotTable() { publish(kFirstCapacity); }

  /// Null on a miss. Wait-free.
  const ReadyKernel* find(const codegen::Problem& problem) const {
    const Slots& slots = *current_.load(std::memory_order_acquire);
    for (std::uint64_t i = hash(problem);; ++i) {
      const ReadyKernel* ready = slots.entries[i & slots.mask].load(std::memory_order_acquire);
      if (ready == nullptr || std::memcmp(&ready->problem, &problem, sizeof problem) == 0) return ready;
    }
  }

  /// Adds a kernel unless the problem is there already; returns the one to use from now on.
  const ReadyKernel* insert(std::unique_ptr<ReadyKernel> ready) {
    const std::lock_guard lock(mutex_);
    if (const ReadyKernel* present = find(ready->problem)) return present;
    if (2 * (kernels_.size() + 1) > generations_.back()->entries.size())
      publish(generations_.back()->entries.size() * 2);
    kernels_.push_back(std::move(ready));
    place(*generations_.back(), kernels_.back().get());
    return kernels_.back().get();
  }

 private:
  static constexpr std::size_t kFirstCapacity = 256;

  struct Slots {
    explicit Slots(std::size_t capacity) : mask(capacity - 1), entries(capacity) {}
    std::uint64_t mask;
    std::vector<std::atomic<const ReadyKernel*>> entries;
  };

  static std::uint64_t hash(const codegen::Problem& problem) {
    // A problem is padding-free ints, taken two at a time; multiply and fold mixes them well enough for a
    // table at half load.
    std::uint64_t words[(sizeof(codegen::Problem) + sizeof(std::uint64_t) - 1) / sizeof(std::uint64_t)]{};
    std::memcpy(words, &problem, sizeof problem);
    std::uint64_t h = 0x9e3779b97f4a7c15u;
    for (const std::uint64_t word : words) {
      h = (h ^ word) * 0xff51afd7ed558ccdu;
      h ^= h >> 32;
    }
    return h;
  }

  static void place(Slots& slots, const ReadyKernel* ready) {
    std::uint64_t i = hash(ready->problem);
    while (slots.entries[i & slots.mask].load(std::memory_order_relaxed) != nullptr) ++i;
    slots.entries[i & slots.mask].store(ready, std::memory_order_release);
  }

  /// Readers may still walk an older generation, so none is freed before the table.
  void publish(std::size_t capacity) {
    auto slots = std::make_unique<Slots>(capacity);
    for (const auto& ready : kernels_) place(*slots, ready.get());
    generations_.push_back(std::move(slots));
    current_.store(generations_.back().get(), std::memory_order_release);
  }

  std::atomic<const Slots*> current_{nullptr};
  std::mutex mutex_;
  std::vector<std::unique_ptr<Slots>> generations_;
  std::vector<std::unique_ptr<ReadyKernel>> kernels_;
};

}  // namespace attune::runtime
