// The arguments that attention and its backward pass have in common, drawn at random.
#pragma once

#include "attune/attune.h"
#include "tools/reference/reference.h"
#include "tools/verify/arena.h"
#include "tools/verify/guarded_tensor.h"
#include "tools/verify/kernel_classes.h"
#include "tools/verify/random.h"

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace attune::verify {

class AttentionProblem {
 public:
  using Shape = std::vector<std::int64_t>;

  AttentionProblem(Random& random, const KernelClass& kernel_class, const MaskClass& mask);

  /// The problem in its own memory, its mask made from lists of the host.
  reference::Inputs inputs() const;
  /// What a call reads.
  std::vector<Part> parts() const;

  struct Arguments {
    TensorView query, key, value;
    AttentionBias bias;
    AttentionOptions options;
  };
  /// On the device, which parts() have room on.
  Arguments on(Arena& arena) const;

  /// [B, Mq, H, Kv] as the layout has it.
  Shape output_shape() const;
  /// [batch, H, length] or [batch, G, H, length].
  Shape lse_shape(std::int64_t batch, std::int64_t length) const;
  /// Any layout that the class's kernels take, for a tensor of the output's rank.
  Layout layout(Random& random, DType dtype, Access access) const;

  const codegen::Problem& traits() const { return class_.problem; }
  DType dtype() const { return static_cast<DType>(traits().dtype); }
  DType output_dtype() const { return static_cast<DType>(traits().output_dtype); }
  const MaskPlan& plan() const { return plan_; }
  int batch() const { return batch_; }
  /// The rows of the query that belong to a packed sequence, and those of key and value.
  struct Sequence {
    std::vector<bool> query, key;
  };
  /// None where queries and keys are those of batch entries.
  std::vector<Sequence> sequences() const;

  /// Of all batch entries and heads.
  std::size_t queries() const;
  double p() const { return p_; }
  double value_spread() const { return value_spread_; }
  bool has_bias_tensor() const { return traits().bias != kernel::Bias::none; }
  /// Do the same query heads share a head of key and one of value?
  bool shares_alike() const { return key_heads_ == value_heads_; }

  std::string mask_name() const { return mask_.name; }
  /// Everything that was drawn.
  std::string text() const;
  /// Rows of the report.
  std::vector<std::pair<std::string, std::string>> aspects() const;

  GuardedTensor query, key, value;
  GuardedTensor bias_tensor;  // where has_bias_tensor()
  std::optional<double> scale;

 private:
  struct Used;
  void draw_extents(Random& random);
  void draw_options(Random& random);
  void draw_tensors(Random& random);
  void poison_unseen(const Used& used);
  void draw_bias_tensor(Random& random, const Used& used);
  AttentionBias bias_on(Arena& arena) const;

  const KernelClass class_;
  const MaskClass& mask_;
  MaskPlan plan_;
  Route route_ = Route::lists;
  int batch_ = 1;
  Shape query_heads_, key_heads_, value_heads_;         // [], [H] or [G, H]
  GuardedTensor q_starts_, k_starts_, k_lens_, pages_;  // tables, where the route takes them from the device
  double p_ = 0;
  DropoutState dropout_;
  double score_spread_ = 1, value_spread_ = 1;
};

}  // namespace attune::verify
