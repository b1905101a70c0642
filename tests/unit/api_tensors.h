// Tensors of the tests of the public API.
#pragma once

#include "attune/tensor.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace attune::test {

/// Numbers that look random and are the same everywhere.
inline std::vector<float> numbers(std::size_t count, unsigned seed) {
  std::vector<float> values(count);
  for (float& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(seed >> 8) / static_cast<float>(1u << 23) - 1.0f;
  }
  return values;
}

inline std::vector<std::int64_t> shape_of(const Tensor& tensor) {
  const MutableTensorView view = tensor.view();
  return {view.shape.begin(), view.shape.begin() + view.rank};
}

}  // namespace attune::test
