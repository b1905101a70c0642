#include "runtime/cuda/tile_counter.h"

#include <array>
#include <atomic>
#include <mutex>

namespace attune::runtime {
namespace {

/// By the ids of streams, which the driver never uses again, unlike their handles.
class CounterTable {
 public:
  std::uint32_t* find(std::uint64_t stream) const {
    for (std::size_t probe = 0; probe < kProbes; ++probe) {
      const Entry& entry = entries_[(stream + probe) % kEntries];
      const std::uint64_t known = entry.stream.load(std::memory_order_acquire);
      if (known == stream) return entry.counter;
      if (known == kEmpty) return nullptr;
    }
    return nullptr;
  }

  /// By one thread at a time. False when there is no room.
  bool insert(std::uint64_t stream, std::uint32_t* counter) {
    for (std::size_t probe = 0; probe < kProbes; ++probe) {
      Entry& entry = entries_[(stream + probe) % kEntries];
      if (entry.stream.load(std::memory_order_relaxed) != kEmpty) continue;
      entry.counter = counter;
      entry.stream.store(stream, std::memory_order_release);
      return true;
    }
    return false;
  }

 private:
  static constexpr std::size_t kEntries = 512;
  static constexpr std::size_t kProbes = 16;
  static constexpr std::uint64_t kEmpty = ~std::uint64_t{0};
  struct Entry {
    std::atomic<std::uint64_t> stream{kEmpty};
    std::uint32_t* counter = nullptr;
  };
  std::array<Entry, kEntries> entries_;
};

CounterTable table;
std::mutex insertion;

bool captured(const Driver& driver, CUstream stream) {
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  return driver.cuStreamIsCapturing(stream, &status) != CUDA_SUCCESS ||
         status != CU_STREAM_CAPTURE_STATUS_NONE;
}

/// A counter that is 0 for what comes after on the stream; null when the driver refuses.
std::uint32_t* make_counter(const Driver& driver, CUstream stream) {
  const RelaxedCapture relaxed(driver);
  CUdeviceptr memory = 0;
  if (driver.cuMemAlloc(&memory, sizeof(std::uint32_t)) != CUDA_SUCCESS) return nullptr;
  if (driver.cuMemsetD32Async(memory, 0, 1, stream) != CUDA_SUCCESS) {
    driver.cuMemFree(memory);
    return nullptr;
  }
  return reinterpret_cast<std::uint32_t*>(memory);
}

}  // namespace

std::uint32_t* tile_counter(const Driver& driver, CUstream stream) {
  unsigned long long id = 0;
  if (driver.cuStreamGetId == nullptr || captured(driver, stream)) return nullptr;
  if (driver.cuStreamGetId(stream, &id) != CUDA_SUCCESS) return nullptr;
  if (std::uint32_t* known = table.find(id)) return known;
  const std::lock_guard lock(insertion);
  if (std::uint32_t* known = table.find(id)) return known;
  std::uint32_t* counter = make_counter(driver, stream);
  if (counter == nullptr || table.insert(id, counter)) return counter;
  driver.cuMemFree(reinterpret_cast<CUdeviceptr>(counter));
  return nullptr;
}

}  // namespace attune::runtime
