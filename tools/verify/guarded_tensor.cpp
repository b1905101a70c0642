#include "tools/verify/guarded_tensor.h"

#include "tools/reference/element.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>

namespace attune::verify {
namespace {

using reference::for_each_element;

constexpr std::int64_t kGuardBytes = 2048;  // a row of 512 float32
constexpr kernel::u16 kPoison = 0xffa5;     // a NaN as float16, as bfloat16 and, doubled, as float32

std::int64_t round_up(std::int64_t x, std::int64_t granule) {
  return (x + granule - 1) / granule * granule;
}

/// Poison, from a place that is a whole number of elements from the storage's beginning.
void poison(std::span<std::byte> bytes) {
  for (std::size_t at = 0; at < bytes.size(); ++at) {
    bytes[at] = reinterpret_cast<const std::byte*>(&kPoison)[at % sizeof kPoison];
  }
}

std::int64_t offset_of(const TensorView& tensor, const Index& index) {
  return std::inner_product(index.begin(), index.begin() + tensor.rank, tensor.strides.begin(),
                            std::int64_t{0});
}

/// Calls visit(index) for every index, row-major.
template <typename Visit>
void for_each_index(const TensorView& tensor, Visit&& visit) {
  TensorView counter = tensor;  // whose offsets are the indices' numbers
  std::int64_t number = 1;
  for (int axis = tensor.rank - 1; axis >= 0; --axis) {
    counter.strides[axis] = number;
    number *= tensor.shape[axis];
  }
  for_each_element(counter, [&](std::int64_t at) {
    Index index{};
    for (int axis = 0; axis < tensor.rank; ++axis) {
      index[axis] = at / counter.strides[axis] % tensor.shape[axis];
    }
    visit(index);
  });
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

Layout random_box_layout(Random& random, DType dtype, int rank) {
  Layout layout;
  layout.granule = 16 / item_bytes(dtype);
  const bool heads_first = rank > 3 && random.chance(0.4);
  if (heads_first)
    std::rotate(layout.order.begin() + 1, layout.order.begin() + 2, layout.order.begin() + rank - 1);
  for (int axis = 0; axis < rank; ++axis) {
    const bool heads_of_groups = rank == 5 && axis == 3;  // groups and heads are walked with one stride
    if (!heads_of_groups && random.chance(0.5)) layout.gap[axis] = layout.granule * random.integer(1, 5);
  }
  return layout;
}

Layout random_bias_box_layout(Random& random, DType dtype, int rank) {
  Layout layout;
  layout.granule = 16 / item_bytes(dtype);
  const int head = rank - 3;  // or the batch entry; groups and heads are walked with one stride
  for (int axis = 0; axis < rank; ++axis) {
    if (axis != head && random.chance(0.5)) layout.gap[axis] = layout.granule * random.integer(1, 5);
    const bool group = rank == 5 && axis == 1;
    layout.broadcast[axis] = axis < rank - 1 && !group && random.chance(0.1);
  }
  return layout;
}

Layout random_strides(Random& random, int rank) {
  Layout layout;
  layout.offset = random.integer(0, 3);
  layout.step = random.pick({1, 1, 1, 2, 3});
  std::span<int> axes(layout.order.data(), rank);
  if (random.chance(0.5)) random.shuffle(axes);
  for (int axis = 0; axis < rank; ++axis) {
    if (random.chance(0.5)) layout.gap[axis] = random.integer(1, 5);
    layout.broadcast[axis] = random.chance(0.1);
    layout.reversed[axis] = random.chance(0.07);
  }
  return layout;
}

Layout random_scattered(Random& random, DType dtype, const std::vector<std::int64_t>& shape) {
  const auto rank = static_cast<int>(shape.size());
  Layout layout;
  do {
    layout = random_strides(random, rank);
    layout.step += 1;
  } while (GuardedTensor(dtype, shape, layout).view().strides[rank - 1] == 1);
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
    std::int64_t stride = innermost ? layout.step : round_up(span, layout.granule);
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
  poison(storage());
  sealed_ = blocks_;
}

GuardedTensor::GuardedTensor(const std::vector<std::int32_t>& table)
    : GuardedTensor(DType::i32, {static_cast<std::int64_t>(table.size())}, Layout{}) {
  if (table.empty()) return;  // its null pointer is nothing for memcpy
  std::memcpy(storage().data() + first_, table.data(), table.size() * sizeof(std::int32_t));
  sealed_ = blocks_;
}

void GuardedTensor::fill(const std::function<float()>& next) {
  const MutableTensorView tensor = view();
  auto* data = static_cast<std::byte*>(tensor.data);
  for_each_element(tensor, [&](std::int64_t offset) {
    reference::store(tensor.dtype, data + offset * item_bytes(tensor.dtype), next());
  });
  sealed_ = blocks_;
}

void GuardedTensor::poison_unused(const std::function<bool(const Index&)>& used) {
  const std::int64_t item = item_bytes(shape_.dtype);
  std::vector<bool> reached(storage().size() / item);
  const std::int64_t first = first_ / item;
  for_each_index(shape_, [&](const Index& index) {
    if (used(index)) reached[first + offset_of(shape_, index)] = true;
  });
  for_each_element(shape_, [&](std::int64_t offset) {
    if (!reached[first + offset]) poison(storage().subspan((first + offset) * item, item));
  });
  sealed_ = blocks_;
}

void GuardedTensor::assign(const TensorView& from) {
  const MutableTensorView tensor = view();
  const std::int64_t item = item_bytes(tensor.dtype);
  auto* to = static_cast<std::byte*>(tensor.data);
  const auto* data = static_cast<const std::byte*>(from.data);
  for_each_index(tensor, [&](const Index& index) {
    std::memcpy(to + offset_of(tensor, index) * item, data + offset_of(from, index) * item, item);
  });
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
  const std::vector<float> elements = reference::dense(view());
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

}  // namespace attune::verify
