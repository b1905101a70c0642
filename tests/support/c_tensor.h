// A tensor of the C++ API as the C ABI takes it.
#pragma once

#include "attune/attune_c.h"
#include "attune/tensor.h"

#include <algorithm>
#include <cstdint>

namespace attune::test {

/// Points to the same memory.
inline attune_tensor c_tensor(const Tensor& tensor) {
  const MutableTensorView& view = tensor.view();
  attune_tensor c{view.data,
                  static_cast<int32_t>(view.dtype),
                  static_cast<int32_t>(view.device.type),
                  view.device.index,
                  view.rank,
                  {},
                  {}};
  std::ranges::copy(view.shape, c.shape);
  std::ranges::copy(view.strides, c.strides);
  return c;
}

}  // namespace attune::test
