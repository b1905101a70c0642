// Int32Table: numbers that stand in a list of the host, on a device, or both.
#include "attune/attn_bias.h"
#include "attune/semantics.h"
#include "runtime/check_tensors.h"
#include "runtime/cuda/cuda_backend.h"
#include "runtime/raise.h"

#include <atomic>
#include <map>
#include <mutex>
#include <utility>

namespace attune {
namespace {

using runtime::refuse;
using runtime::take;
using runtime::text_of;

/// Checks that a tensor can be a table; returns how many numbers it has.
std::int64_t table_size(const TensorView& tensor) {
  if (tensor.dtype != DType::i32) {
    refuse("a table of a bias (lengths, starts, block tables) must be an i32 tensor; convert it");
  }
  if (tensor.rank < 1 || tensor.rank > 2) {
    refuse("a table of a bias (lengths, starts, block tables) has rank {}, expected 1 or 2", tensor.rank);
  }
  std::int64_t size = 1;
  for (int axis = tensor.rank - 1; axis >= 0; --axis) {
    if (tensor.shape[axis] < 0 || tensor.shape[axis] > kernel::kMaxLength) {
      refuse("a table of a bias (lengths, starts, block tables) has extent {} on axis {}, expected 0 to 2^29",
             tensor.shape[axis], axis);
    }
    if (tensor.shape[axis] > 1 && tensor.strides[axis] != size) {
      refuse(
          "a table of a bias (lengths, starts, block tables) must be contiguous, but axis {} has stride {}; "
          "copy it",
          axis, tensor.strides[axis]);
    }
    size *= tensor.shape[axis];
  }
  if (size > 0 && tensor.data == nullptr) refuse("a table of a bias has a null data pointer");
  take(runtime::check_memory("a table of a bias", tensor));
  return size;
}

/// A copy of the host's list on a device. Copies are never taken back while the table lives, so that calls
/// read the list of them without a lock.
struct DeviceCopy {
  int device;
  const void* data;
  const DeviceCopy* next;
};

/// The copies of tables that are gone. Kernels on any stream may still read them, so they are freed together
/// once their device has come to rest: at an upload, which waits anyway, when enough have gathered.
class Retired {
 public:
  void add(int device, const void* data) {
    const std::lock_guard lock(mutex_);
    of_device_[device].push_back(data);
  }

  void free_if_many(int device) {
    std::vector<const void*> copies;
    {
      const std::lock_guard lock(mutex_);
      if (of_device_[device].size() < kMany) return;
      copies.swap(of_device_[device]);
    }
    const bool at_rest = runtime::cuda_synchronize(device).ok();
    for (const void* copy : copies) {
      if (at_rest) {
        runtime::cuda_free(device, const_cast<void*>(copy));
      } else {
        add(device, copy);
      }
    }
  }

 private:
  static constexpr std::size_t kMany = 64;
  std::mutex mutex_;
  std::map<int, std::vector<const void*>> of_device_;
};

/// Never destroyed: tables of static storage duration may go after it would.
Retired& retired() {
  static auto* const copies = new Retired;
  return *copies;
}

}  // namespace

struct Int32Table::State {
  std::int64_t size = 0;
  bool on_host = false;
  std::vector<std::int32_t> host;
  const std::int32_t* tensor = nullptr;  // the caller's, on `device`
  Device device;
  std::atomic<const DeviceCopy*> copies{nullptr};
  std::mutex uploading;

  explicit State(std::vector<std::int32_t> list)
      : size(static_cast<std::int64_t>(list.size())), on_host(true), host(std::move(list)) {}
  explicit State(const TensorView& view) : size(table_size(view)) {
    const auto* data = static_cast<const std::int32_t*>(view.data);
    if (view.device.type == DeviceType::cpu) {
      on_host = true;
      host.assign(data, data + size);
    } else {
      tensor = data;
      device = view.device;
    }
  }
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() {
    const DeviceCopy* copy = copies.load();
    while (copy != nullptr) {
      retired().add(copy->device, copy->data);
      delete std::exchange(copy, copy->next);
    }
  }

  const DeviceCopy* copy_on(int index) const {
    const DeviceCopy* copy = copies.load(std::memory_order_acquire);
    while (copy != nullptr && copy->device != index) copy = copy->next;
    return copy;
  }

  const DeviceCopy* upload(int index, void* stream) {
    const std::lock_guard lock(uploading);
    if (const DeviceCopy* copy = copy_on(index)) return copy;  // another thread was faster
    const void* data =
        take(runtime::cuda_upload(index, host.data(), host.size() * sizeof(std::int32_t), stream));
    retired().free_if_many(index);  // not before the upload, which refuses a captured stream
    const auto* copy = new DeviceCopy{index, data, copies.load(std::memory_order_relaxed)};
    copies.store(copy, std::memory_order_release);
    return copy;
  }
};

Int32Table::Int32Table(std::vector<std::int32_t> host) : state_(std::make_shared<State>(std::move(host))) {}

Int32Table::Int32Table(const TensorView& tensor) : state_(std::make_shared<State>(tensor)) {}

Int32Table::Int32Table(std::vector<std::int32_t> host, const TensorView& tensor)
    : state_(std::make_shared<State>(tensor)) {
  if (static_cast<std::int64_t>(host.size()) != state_->size) {
    refuse("a table of a bias has {} numbers on the host but {} on {}", host.size(), state_->size,
           text_of(tensor.device));
  }
  state_->on_host = true;
  state_->host = std::move(host);
}

std::int64_t Int32Table::size() const {
  return state_->size;
}

bool Int32Table::on_host() const {
  return state_->on_host;
}

const std::vector<std::int32_t>& Int32Table::host() const {
  if (!state_->on_host) {
    refuse("the numbers of this table are on {} alone; read() copies them back", text_of(state_->device));
  }
  return state_->host;
}

const std::int32_t* Int32Table::on(Device device, void* stream) const {
  if (state_->tensor != nullptr && state_->device == device) return state_->tensor;
  if (!state_->on_host && state_->size > 0) {
    refuse(
        "a table of the bias is on {}, but attention runs on {}; give the table "
        "there or as a list of the host",
        text_of(state_->device), text_of(device));
  }
  if (device.type == DeviceType::cpu || state_->size == 0) return state_->host.data();
  const DeviceCopy* copy = state_->copy_on(device.index);
  if (copy == nullptr) copy = state_->upload(device.index, stream);
  return static_cast<const std::int32_t*>(copy->data);
}

std::vector<std::int32_t> Int32Table::read() const {
  if (state_->on_host) return state_->host;
  std::vector<std::int32_t> numbers(static_cast<std::size_t>(state_->size));
  if (numbers.empty()) return numbers;
  take(runtime::cuda_copy_to_host(state_->device.index, numbers.data(), state_->tensor,
                                  numbers.size() * sizeof(std::int32_t)));
  return numbers;
}

}  // namespace attune
