// A float32 number of each query, as an lse and its gradient are given to a backward pass.
#pragma once

#include "tools/verify/attention_problem.h"
#include "tools/verify/guarded_tensor.h"

#include <cstddef>
#include <functional>
#include <optional>
#include <vector>

namespace attune::verify {

/// Packed like the query's rows, or padded with the sequences on the first axis; longer than it must be, or
/// not. What is no query's is NaN.
class QueryNumbers {
 public:
  QueryNumbers() = default;
  /// In any of these layouts, with any strides.
  QueryNumbers(Random& random, const AttentionProblem& problem);
  /// Packed and contiguous, as forward writes them.
  explicit QueryNumbers(const AttentionProblem& problem);

  /// In the order of reference::Values::lse.
  void fill(const std::vector<double>& numbers);
  std::vector<double> values() const;

  bool padded() const { return padded_; }

  GuardedTensor tensor;

 private:
  void resize(const AttentionProblem& problem, bool padded, int length);
  /// Calls visit(index in Values::lse; nothing in padding) for every element, row-major.
  void for_each(const std::function<void(std::optional<std::size_t>)>& visit) const;

  /// The queries of an index of the first axis: batch entry, first row and how many.
  struct Rows {
    std::size_t batch, begin, count;
  };
  std::vector<Rows> rows_;
  std::size_t heads_ = 1;
  std::size_t length_ = 0;  // of the tensor's last axis
  std::size_t len_q_ = 0;
  bool padded_ = false;
};

}  // namespace attune::verify
