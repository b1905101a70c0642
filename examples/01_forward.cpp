// Causal attention of one query block over a longer key cache, on the CPU. The kernel is compiled at the
// first call and read from the cache by every later process.
#include <attune/attune.h>

#include <cstdio>
#include <vector>

int main() try {
  const int batch = 1, len_q = 128, len_k = 512, heads = 8, head_dim = 64;
  std::vector<float> query(batch * len_q * heads * head_dim, 0.5f);
  std::vector<float> key(batch * len_k * heads * head_dim, 0.25f), value(key.size(), 1.0f);

  attune::Attention attention = attune::memory_efficient_attention_forward_requires_grad(
      {query.data(), attune::DType::f32, {batch, len_q, heads, head_dim}},
      {key.data(), attune::DType::f32, {batch, len_k, heads, head_dim}},
      {value.data(), attune::DType::f32, {batch, len_k, heads, head_dim}},
      attune::LowerTriangularFromBottomRightMask{});

  const auto* output = static_cast<const float*>(attention.output.data());
  std::printf("output[0] = %g by %s\n", output[0], attune::last_kernel().c_str());
} catch (const attune::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
