// Tensors of the C++ API as the C ABI takes them.
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

/// What a kept forward call on these tensors is run with.
inline attune_forward_memory memory_of(const attune_tensor& query, const attune_tensor& key,
                                       const attune_tensor& value, const attune_tensor& output,
                                       const attune_tensor& lse) {
  attune_forward_memory memory = ATTUNE_FORWARD_MEMORY_INIT;
  memory.query = query.data;
  memory.key = key.data;
  memory.value = value.data;
  memory.output = output.data;
  memory.lse = static_cast<float*>(lse.data);
  return memory;
}

}  // namespace attune::test
