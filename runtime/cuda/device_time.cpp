#include "runtime/cuda/device_time.h"

#include <cstddef>

namespace attune::runtime {
namespace {

// Writing these keeps the device busy for about a millisecond, a slow one for longer: meanwhile the host
// queues some tens of launches.
constexpr std::size_t kBusyBytes = std::size_t{256} << 20;
constexpr int kBusyWrites = 8;

class Event {
 public:
  explicit Event(const Driver& driver) : driver_(driver) {}
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() {
    if (handle_ != nullptr) driver_.cuEventDestroy(handle_);
  }

  Result<void> record() {
    if (handle_ == nullptr) {
      ATTUNE_TRY(driver_.check(driver_.cuEventCreate(&handle_, CU_EVENT_DEFAULT), "making an event"));
    }
    return driver_.check(driver_.cuEventRecord(handle_, nullptr), "recording an event");
  }
  CUevent handle() const { return handle_; }

 private:
  const Driver& driver_;
  CUevent handle_ = nullptr;
};

/// Memory to keep the device busy with.
class Scratch {
 public:
  explicit Scratch(const Driver& driver) : driver_(driver) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (memory_ != 0) driver_.cuMemFree(memory_);
  }

  Result<void> write() {
    if (memory_ == 0) {
      ATTUNE_TRY(driver_.check(driver_.cuMemAlloc(&memory_, kBusyBytes), "allocating scratch memory"));
    }
    return driver_.check(driver_.cuMemsetD32Async(memory_, 0, kBusyBytes / sizeof(int), nullptr),
                         "writing scratch memory");
  }

 private:
  const Driver& driver_;
  CUdeviceptr memory_ = 0;
};

}  // namespace

Result<double> time_on_device(const CudaDevice& device, int count,
                              const std::function<Result<void>()>& call) {
  const Driver& driver = *device.driver;
  ATTUNE_ASSIGN(scope, ScopedContext::enter(driver, device.handle, device.primary));
  Scratch scratch(driver);
  Event begin(driver), end(driver);
  for (int i = 0; i < kBusyWrites; ++i) ATTUNE_TRY(scratch.write());
  ATTUNE_TRY(begin.record());
  for (int i = 0; i < count; ++i) ATTUNE_TRY(call());
  ATTUNE_TRY(end.record());
  ATTUNE_TRY(driver.check(driver.cuEventSynchronize(end.handle()), "waiting for the device"));
  float milliseconds = 0;
  ATTUNE_TRY(driver.check(driver.cuEventElapsedTime(&milliseconds, begin.handle(), end.handle()),
                          "reading an event"));
  return 1000.0 * milliseconds / count;
}

}  // namespace attune::runtime
