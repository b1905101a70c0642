// Single elements of tensors in CPU memory, and the rounding of a float to a tensor's type.
#pragma once

#include "attune/attune.h"
#include "attune/num.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace attune::reference {

/// A boolean is 0 or 1.
inline float load(DType dtype, const void* address) {
  if (dtype == DType::boolean) return *static_cast<const unsigned char*>(address) != 0 ? 1.0f : 0.0f;
  if (dtype == DType::f32) {
    float value;
    std::memcpy(&value, address, sizeof value);
    return value;
  }
  kernel::u16 bits;
  std::memcpy(&bits, address, sizeof bits);
  return dtype == DType::f16 ? kernel::f16_to_float(bits) : kernel::bf16_to_float(bits);
}

inline void store(DType dtype, void* address, float value) {
  if (dtype == DType::boolean) {
    *static_cast<unsigned char*>(address) = value != 0;
    return;
  }
  if (dtype == DType::f32) {
    std::memcpy(address, &value, sizeof value);
    return;
  }
  const kernel::u16 bits = dtype == DType::f16 ? kernel::float_to_f16(value) : kernel::float_to_bf16(value);
  std::memcpy(address, &bits, sizeof bits);
}

inline float rounded(DType dtype, float value) {
  switch (dtype) {
    case DType::f16: return kernel::f16_to_float(kernel::float_to_f16(value));
    case DType::bf16: return kernel::bf16_to_float(kernel::float_to_bf16(value));
    default: return value;
  }
}

/// Calls visit(offset in elements) for every element, row-major.
template <typename Pointer, typename Visit>
void for_each_element(const BasicTensorView<Pointer>& tensor, Visit&& visit) {
  std::int64_t count = 1;
  for (int axis = 0; axis < tensor.rank; ++axis) count *= tensor.shape[axis];
  std::array<std::int64_t, kMaxRank> index{};
  for (; count > 0; --count) {
    std::int64_t offset = 0;
    for (int axis = 0; axis < tensor.rank; ++axis) offset += index[axis] * tensor.strides[axis];
    visit(offset);
    for (int axis = tensor.rank - 1; axis >= 0 && ++index[axis] == tensor.shape[axis]; --axis) {
      index[axis] = 0;
    }
  }
}

/// A copy of the tensor's elements, row-major; an element of every floating type, and a boolean, fits a
/// float.
inline std::vector<float> dense(const TensorView& tensor) {
  std::vector<float> elements;
  const auto* data = static_cast<const std::byte*>(tensor.data);
  for_each_element(tensor, [&](std::int64_t offset) {
    elements.push_back(load(tensor.dtype, data + offset * item_bytes(tensor.dtype)));
  });
  return elements;
}

}  // namespace attune::reference
