// The backward of a random merge, in a file of its own as it shares nothing with attention's.
#pragma once

#include "tools/verify/case.h"

#include <functional>

namespace attune::verify {

/// Rows and columns of a case's dense tensors: outputs are [batch, len, heads], numbers [batch, heads, len].
struct MergeRows {
  std::size_t batch, len, heads, columns;

  std::size_t count() const { return batch * len * heads; }
  /// Where the row of an output's index is among the numbers.
  std::size_t number_of(std::size_t row) const {
    return (row / (len * heads) * heads + row % heads) * len + row / heads % len;
  }
};

class GradMergeCase : public Case {
 public:
  GradMergeCase(Random& random, const KernelClass& kernel_class);

  void run(Arena& arena) override;
  int launches() const override;
  codegen::Problem last(const codegen::Arch&) const override { return class_.problem; }
  std::string verdict() const override;

 private:
  void draw_spreads(Random& random);
  void draw_chunks(Random& random);
  void draw_merged(Random& random);
  void draw_gradients(Random& random);
  void describe();
  DType dtype() const;
  DType output_dtype() const;
  MergeRows rows() const;
  std::vector<std::int64_t> shape() const;
  std::vector<std::int64_t> lse_shape(int len) const;
  Layout aligned_rows(Random& random, DType dtype, Access access) const;
  GuardedTensor random_rows(DType dtype, const Layout& layout, const std::function<float()>& next) const;
  GuardedTensor random_numbers(Random& random, const std::vector<double>& numbers) const;
  std::vector<double> numbers_of(const GuardedTensor& tensor) const;
  void poison_hidden(GuardedTensor& tensor, const std::vector<double>& lse) const;
  std::vector<Part> parts() const;

  const KernelClass class_;
  int chunks_;
  bool into_;
  bool has_grad_lse_;
  int batch_ = 1, len_ = 1;
  std::vector<std::int64_t> heads_;  // [], [H] or [G, H]
  double value_spread_ = 1, grad_spread_ = 1, lse_spread_ = 1;
  double hidden_ = 0;  // rows of a chunk that saw no key
  const char* grad_output_layout_ = "";
  std::vector<GuardedTensor> attn_, attn_lse_, grad_attn_, grad_attn_lse_;
  GuardedTensor output_, lse_, grad_output_, grad_lse_;
};

}  // namespace attune::verify
