#include "tools/verify/arena.h"

#include "attune/error.h"
#include "runtime/cuda/cuda_backend.h"

#include <functional>
#include <numeric>

namespace attune::verify {
namespace {

std::size_t room_for(const GuardedTensor& tensor) {
  return tensor.storage().size();  // a multiple of its alignment
}

void take_or_throw(const Result<void>& result) {
  if (!result.ok()) throw Error(result.failure().kind, result.failure().message);
}

}  // namespace

void Arena::begin(const std::vector<Part>& parts) {
  copies_.clear();
  used_ = 0;
  if (device_.type == DeviceType::cpu) return;
  std::size_t wanted = 0;
  for (const Part& part : parts) wanted += room_for(*part.tensor);
  if (wanted <= bytes_) return;
  memory_.emplace(DType::f32, device_, std::vector{static_cast<std::int64_t>(wanted / sizeof(float))});
  bytes_ = wanted;
}

MutableTensorView Arena::put(const GuardedTensor& tensor) {
  if (device_.type == DeviceType::cpu) return tensor.view();
  std::byte* copy = static_cast<std::byte*>(memory_->data()) + used_;
  used_ += room_for(tensor);
  copies_.emplace_back(&tensor, copy);
  take_or_throw(
      runtime::cuda_copy_to_device(device_.index, copy, tensor.storage().data(), tensor.storage().size()));
  return tensor.view_in(copy, device_);
}

void Arena::finish() {
  for (const auto& [tensor, copy] : copies_) {
    take_or_throw(
        runtime::cuda_copy_to_host(device_.index, tensor->storage().data(), copy, tensor->storage().size()));
  }
}

void Arena::take(const Tensor& result, GuardedTensor& into) const {
  TensorView elements = result.view();
  if (device_.type == DeviceType::cpu) return into.assign(elements);
  const std::size_t count = std::accumulate(elements.shape.begin(), elements.shape.begin() + elements.rank,
                                            std::size_t{1}, std::multiplies<>());
  std::vector<std::byte> bytes(count * item_bytes(elements.dtype));
  if (!bytes.empty()) {
    take_or_throw(runtime::cuda_copy_to_host(device_.index, bytes.data(), result.data(), bytes.size()));
  }
  elements.data = bytes.data();
  into.assign(elements);
}

}  // namespace attune::verify
