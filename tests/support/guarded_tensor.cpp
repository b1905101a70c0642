#include "tests/support/guarded_tensor.h"

#include "tools/reference/element.h"

#include <fmt/format.h>

#include <algorithm>

namespace attune::test {

using namespace attune::reference;

namespace {

constexpr std::int64_t kGuardBytes = 1024;  // a row of 256 float32
constexpr kernel::u16 kPoison = 0xffa5;     // a NaN as float16, as bfloat16 and, doubled, as float32

std::int64_t round_up(std::int64_t x, std::int64_t granule) {
  return (x + granule - 1) / granule * granule;
}

}  // namespace

Layout random_layout(Random& random, DType dtype, int rank, int align_bytes, Access access) {
  Layout layout;
  layout.granule = std::max<std::int64_t>(1, align_bytes / item_bytes(dtype));
  // An odd multiple: aligned to align_bytes and, below 16, to no more.
  layout.offset = align_bytes < 16 ? layout.granule * random.pick({1, 3}) : 0;
  std::span<int> outer(layout.order.data(), rank - 1);
  if (random.chance(0.5)) random.shuffle(outer);
  for (int axis = 0; axis < rank; ++axis) {
    if (random.chance(0.5)) layout.gap[axis] = layout.granule * random.integer(1, 5);
    if (axis == rank - 1) continue;
    layout.broadcast[axis] = access == Access::read && random.chance(0.07);
    layout.reversed[axis] = random.chance(0.07);
  }
  return layout;
}

GuardedTensor::GuardedTensor(DType dtype, const std::vector<std::int64_t>& shape, const Layout& layout) {
  shape_.dtype = dtype;
  shape_.rank = static_cast<int>(shape.size());
  std::ranges::copy(shape, shape_.shape.begin());

  std::int64_t span = 1;    // elements that the axes so far take
  std::int64_t lowest = 0;  // offset of the lowest element from element [0, 0, ...], not positive
  for (int level = shape_.rank - 1; level >= 0; --level) {
    const int axis = layout.order[level];
    const bool innermost = level == shape_.rank - 1;
    std::int64_t stride = innermost ? 1 : round_up(span, layout.granule);
    if (layout.broadcast[axis]) stride = 0;
    if (stride != 0) span = stride * std::max<std::int64_t>(1, shape[axis]) + layout.gap[axis];
    if (layout.reversed[axis]) {
      stride = -stride;
      lowest += stride * std::max<std::int64_t>(0, shape[axis] - 1);
    }
    shape_.strides[axis] = stride;
  }
  const std::int64_t item = item_bytes(dtype);
  first_ = kGuardBytes + (layout.offset - lowest) * item;
  const std::int64_t bytes = kGuardBytes + (layout.offset + span) * item + kGuardBytes;
  blocks_.resize(static_cast<std::size_t>(round_up(bytes, sizeof(Block))) / sizeof(Block));
  for (std::span<std::byte> rest = storage(); !rest.empty(); rest = rest.subspan(sizeof kPoison)) {
    std::memcpy(rest.data(), &kPoison, sizeof kPoison);
  }
  sealed_ = blocks_;
}

void GuardedTensor::fill(const std::function<float()>& next) {
  const MutableTensorView tensor = view();
  auto* data = static_cast<std::byte*>(tensor.data);
  for_each_element(tensor, [&](std::int64_t offset) {
    store(tensor.dtype, data + offset * item_bytes(tensor.dtype), next());
  });
  sealed_ = blocks_;
}

MutableTensorView GuardedTensor::view() const {
  return view_in(blocks_.data(), Device{});
}

MutableTensorView GuardedTensor::view_in(void* storage, Device device) const {
  MutableTensorView tensor = shape_;
  tensor.device = device;
  tensor.data = static_cast<std::byte*>(storage) + first_;
  return tensor;
}

std::span<std::byte> GuardedTensor::storage() const {
  return std::as_writable_bytes(std::span(blocks_));
}

std::vector<double> GuardedTensor::values() const {
  const std::vector<float> elements = dense(view());
  return {elements.begin(), elements.end()};
}

std::string GuardedTensor::damage(Access allowed) const {
  const std::span<const std::byte> before = std::as_bytes(std::span(sealed_));
  std::vector<std::byte> now(storage().begin(), storage().end());
  if (allowed == Access::write) {
    const std::int64_t item = item_bytes(shape_.dtype);
    for_each_element(shape_, [&](std::int64_t offset) {
      const std::int64_t at = first_ + offset * item;
      std::copy_n(before.begin() + at, item, now.begin() + at);
    });
  }
  const auto [was, is] = std::ranges::mismatch(before, now);
  if (is == now.end()) return "";
  return fmt::format("byte {} from the first element was overwritten", (is - now.begin()) - first_);
}

}  // namespace attune::test
