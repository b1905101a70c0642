// A forward problem with tensors to run it on: random numbers, in memory of a device.
#pragma once

#include "attune/attune.h"
#include "base/result.h"
#include "codegen/problem.h"
#include "runtime/engine.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace attune::tools {

/// How large it is. With packed sequences the batch is their number, and the lengths are each one's.
struct BenchExtents {
  std::int64_t batch = 0, heads = 0, key_heads = 0, queries = 0, keys = 0;  // 0: not said
};

class BenchProblem {
 public:
  /// Extents that are not said are typical of the device and of the problem's extent. Those of a dense
  /// problem decide which extent it has. Fails with unsupported for another operation than forward.
  static Result<BenchProblem> make(const codegen::Problem& problem, const BenchExtents& wanted,
                                   Device device);

  const codegen::Problem& problem() const { return problem_; }
  const runtime::Call& call() const { return *call_; }
  /// "batch 2, heads 16, 4096 queries, 4096 keys"
  std::string text() const;
  /// The output, in host memory.
  Result<std::vector<float>> output() const;
  /// NaN in the whole output: what a kernel doesn't write is seen.
  Result<void> poison_output();

 private:
  BenchProblem() = default;

  codegen::Problem problem_;
  BenchExtents extents_;
  Tensor query_, key_, value_, bias_tensor_, output_, lse_;
  AttentionBias bias_;  // has the tables that the call points to
  std::optional<runtime::Call> call_;
};

/// Can both be results of the same attention in this type? An error of rounding aside they are equal.
bool agree(const std::vector<float>& output, const std::vector<float>& other, kernel::DType dtype);

}  // namespace attune::tools
