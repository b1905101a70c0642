// Problems for tests of the yardsticks: one that is worked out by hand, and tensors and classes to draw more.
#pragma once

#include "codegen/arch.h"
#include "tools/reference/reference.h"
#include "tools/verify/kernel_classes.h"
#include "tools/verify/random.h"

#include <array>
#include <initializer_list>
#include <optional>
#include <vector>

namespace attune::test {

/// One batch, one head, float32: query 2 x 2, key 3 x 2, value 3 x 1. With a scale of 1 query 0 has the
/// scores 0, 1, 2 and query 1 has 0, 2, 1.
struct Small {
  std::array<float, 4> query{1, 0, 0, 1};
  std::array<float, 6> key{0, 0, 1, 2, 2, 1};
  std::array<float, 3> value{1, 10, 100};

  reference::Inputs inputs(const AttentionBias& bias = {}, std::optional<double> scale = 1.0) const {
    return {.query = {query.data(), DType::f32, {1, 2, 1, 2}},
            .key = {key.data(), DType::f32, {1, 3, 1, 2}},
            .value = {value.data(), DType::f32, {1, 3, 1, 1}},
            .bias = bias,
            .scale = scale};
  }
};

inline TensorView view_of(const std::vector<float>& numbers, std::initializer_list<std::int64_t> shape) {
  return {numbers.data(), DType::f32, shape};
}

template <typename Number = float>
std::vector<Number> random_numbers(verify::Random& random, std::size_t count) {
  std::vector<Number> numbers(count);
  for (Number& number : numbers) number = static_cast<Number>(random.normal());
  return numbers;
}

inline std::vector<verify::KernelClass> cpu_classes(verify::Random& random, int count) {
  const kernel::Family families[] = {kernel::Family::cpu};
  return *verify::random_classes(random, count, *codegen::cpu_arch(codegen::Isa::avx512), families);
}

}  // namespace attune::test
