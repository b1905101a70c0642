// Gradients: a query learns to look at one of eight keys. Its value is 1, the others' is 0, so the output is
// the attention that the key gets, and its gradient with respect to the query says how to get more.
#include <attune/attune.h>

#include <cstdio>
#include <vector>

int main() try {
  constexpr int kKeys = 8, kHeadDim = 16, kTarget = 3, kSteps = 20;
  std::vector<float> query(kHeadDim, 0.0f), key(kKeys * kHeadDim, 0.0f), value(kKeys, 0.0f);
  for (int j = 0; j < kKeys; ++j) key[j * kHeadDim + j] = 1.0f;
  value[kTarget] = 1.0f;
  const float grad_output = 1.0f;

  const attune::TensorView q(query.data(), attune::DType::f32, {1, 1, 1, kHeadDim});
  const attune::TensorView k(key.data(), attune::DType::f32, {1, kKeys, 1, kHeadDim});
  const attune::TensorView v(value.data(), attune::DType::f32, {1, kKeys, 1, 1});
  const attune::TensorView g(&grad_output, attune::DType::f32, {1, 1, 1, 1});
  for (int step = 0; step <= kSteps; ++step) {
    const auto [output, lse] = attune::memory_efficient_attention_forward_requires_grad(q, k, v);
    if (step % kSteps == 0) {
      std::printf("step %d: attention %.3f\n", step, *static_cast<const float*>(output.data()));
    }
    const attune::Gradients gradients =
        attune::memory_efficient_attention_backward(g, output.view(), lse.view(), q, k, v);
    const auto* grad_query = static_cast<const float*>(gradients.query.data());
    for (int c = 0; c < kHeadDim; ++c) query[c] += 200.0f * grad_query[c];
  }
  std::printf("gradients by %s\n", attune::last_kernel().c_str());
} catch (const attune::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
