// The device that cases run on, and their tensors in its memory.
#pragma once

#include "attune/tensor.h"
#include "tools/verify/guarded_tensor.h"

#include <cstddef>
#include <optional>
#include <utility>
#include <vector>

namespace attune::verify {

/// On the CPU tensors stay where they are. On a GPU one allocation holds those of one case at a time,
/// surroundings included. Failures of the device throw Error.
class Arena {
 public:
  explicit Arena(Device device) : device_(device) {}

  Device device() const { return device_; }
  /// Forgets the tensors of the last case and makes room for these.
  void begin(const std::vector<Part>& parts);
  /// One of them as the device sees it.
  MutableTensorView put(const GuardedTensor& tensor);
  /// Waits for the device and brings back everything that was put, surroundings included.
  void finish();

  /// Copies what Attune allocated into a tensor's elements.
  void take(const Tensor& result, GuardedTensor& into) const;

 private:
  Device device_;
  std::optional<Tensor> memory_;
  std::size_t bytes_ = 0;  // of memory_
  std::size_t used_ = 0;
  std::vector<std::pair<const GuardedTensor*, std::byte*>> copies_;
};

}  // namespace attune::verify
