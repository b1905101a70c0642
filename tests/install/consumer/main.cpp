#include <attune/attune.h>

#include <cstdio>

int main() {
  const float one = 1, three = 3;
  const attune::TensorView query(&one, attune::DType::f32, {1, 1, 1, 1});
  const attune::TensorView value(&three, attune::DType::f32, {1, 1, 1, 1});
  try {
    // The exception must be catchable across the library's border.
    attune::memory_efficient_attention(query, query, value, {}, {.scale = 1e300});
    return 1;
  } catch (const attune::Error& error) {
    if (error.kind() != attune::ErrorKind::invalid_argument) return 1;
  }
  const attune::Tensor output = attune::memory_efficient_attention(query, query, value);
  std::printf("output %g\n", *static_cast<const float*>(output.data()));
}
