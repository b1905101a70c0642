// Launches with many tiles for each multiprocessor, forward: blocks that stay and take tile after tile
// compute the last of them as they compute the first.
#include "runtime/cuda/cuda_backend.h"
#include "runtime/raise.h"
#include "tests/gpu/gpu_main.h"
#include "tests/support/random.h"
#include "tools/reference/judge.h"
#include "tools/verify/guarded_tensor.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

using namespace attune;
using namespace attune::test;
using verify::GuardedTensor;

namespace {

std::size_t bytes_of(const TensorView& tensor) {
  std::size_t bytes = item_bytes(tensor.dtype);
  for (int axis = 0; axis < tensor.rank; ++axis) bytes *= static_cast<std::size_t>(tensor.shape[axis]);
  return bytes;
}

/// Batch entries that are all alike, on the GPU.
class Copies {
 public:
  Copies(Random& random, int count, int length, int head_dim)
      : first_(DType::bf16, {1, length, 1, head_dim}, {}),
        all_(DType::bf16, kGpu, {count, length, 1, head_dim}) {
    first_.fill([&] { return static_cast<float>(random.normal()); });
    const TensorView one = first_.view();
    const std::span entry(static_cast<const std::byte*>(one.data), bytes_of(one));
    std::vector<std::byte> copies;
    for (int i = 0; i < count; ++i) copies.insert(copies.end(), entry.begin(), entry.end());
    runtime::take(runtime::cuda_copy_to_device(0, all_.data(), copies.data(), copies.size()));
  }
  TensorView first() const { return first_.view(); }
  TensorView all() const { return all_.view(); }

 private:
  GuardedTensor first_;
  Tensor all_;
};

std::vector<std::byte> on_host(const Tensor& tensor) {
  std::vector<std::byte> copy(bytes_of(tensor.view()));
  runtime::take(runtime::cuda_copy_to_host(0, copy.data(), tensor.data(), copy.size()));
  return copy;
}

/// Are all `count` parts of it the same?
bool alike(const std::vector<std::byte>& bytes, int count) {
  const std::size_t size = bytes.size() / static_cast<std::size_t>(count);
  return std::equal(bytes.begin() + static_cast<std::ptrdiff_t>(size), bytes.end(), bytes.begin());
}

void check_many_tiles(int count, int length, int head_dim, const AttentionBias& bias, Random& random) {
  const Copies query(random, count, length, head_dim), key(random, count, length, head_dim),
      value(random, count, length, head_dim);
  const Attention ours =
      memory_efficient_attention_forward_requires_grad(query.all(), key.all(), value.all(), bias, {});
  CAPTURE(last_kernel());
  const std::vector<std::byte> output = on_host(ours.output), lse = on_host(ours.lse);
  CHECK(alike(output, count));
  CHECK(alike(lse, count));

  GuardedTensor first(DType::bf16, {1, length, 1, head_dim}, {});
  TensorView computed = first.view();
  computed.data = output.data();
  first.assign(computed);
  const reference::Inputs inputs{query.first(), key.first(), value.first(), bias};
  const auto judged = reference::judge(inputs, reference::reference_attention(inputs), first.values(), {});
  CHECK_MESSAGE(judged.output.ok, judged.output.text());
}

}  // namespace

TEST_CASE("every batch entry of a large launch has the bits of the first, and these are right") {
  Random random(test_seed());
  const AttentionBias causal = LowerTriangularMask{};
  for (const int head_dim : {64, 128, 256}) {
    for (const AttentionBias& bias : {AttentionBias(), causal}) {
      CAPTURE(head_dim);
      check_many_tiles(500, 300, head_dim, bias, random);  // of few queries
      check_many_tiles(120, 1100, head_dim, bias, random);
    }
  }
}
