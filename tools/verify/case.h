// A random call of the public API: its arguments, what it left behind, and whether that is right.
#pragma once

#include "tools/reference/reference.h"
#include "tools/verify/arena.h"
#include "tools/verify/guarded_tensor.h"
#include "tools/verify/kernel_classes.h"
#include "tools/verify/random.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace attune::verify {

class Case {
 public:
  virtual ~Case() = default;

  /// Calls the API on the arena's device; the results are in the case's own memory afterwards. Throws Error.
  virtual void run(Arena& arena) = 0;
  /// Kernels that the call launches.
  virtual int launches() const = 0;
  /// "" when the results are within the tolerance, rows that saw no key are exactly 0 and -inf, and no byte
  /// outside them has changed; else what is wrong.
  virtual std::string verdict() const = 0;

  std::string name;                                          // everything that was drawn
  std::string bias;                                          // its class of the documentation
  std::vector<std::pair<std::string, std::string>> aspects;  // ("type", "f16"): rows of the report
};

/// Draws a case of the class; a mask other than the class's own where its kernels serve it.
std::unique_ptr<Case> random_case(Random& random, const KernelClass& kernel_class, const MaskClass* mask);

// ---- The two kinds of cases ----

/// The function that is called: into the caller's memory, or into what Attune allocates.
enum class Function { into, allocate, requires_grad, partial };

class AttentionCase : public Case {
 public:
  AttentionCase(Random& random, const KernelClass& kernel_class, const MaskClass& mask);

  void run(Arena& arena) override;
  int launches() const override;
  std::string verdict() const override;

  /// The problem in the case's own memory, its mask made from lists of the host.
  reference::Inputs inputs() const;

  GuardedTensor query, key, value, output;
  GuardedTensor lse;  // contiguous
  std::optional<double> scale;

 private:
  struct Used;
  void draw_extents(Random& random);
  void draw_options(Random& random);
  void draw_tensors(Random& random);
  void poison_unseen(const Used& used);
  void draw_bias_tensor(Random& random, const Used& used);
  void describe();
  bool writes_lse() const { return class_.problem.lse == kernel::Lse::write; }
  std::vector<std::int64_t> heads_or_one() const;
  AttentionBias bias_on(Arena& arena) const;
  std::vector<Part> parts() const;

  const KernelClass class_;
  const MaskClass& mask_;
  MaskPlan plan_;
  Route route_ = Route::lists;
  Function function_ = Function::into;
  int batch_ = 1;
  std::vector<std::int64_t> query_heads_, key_heads_, value_heads_;  // [], [H] or [G, H]
  GuardedTensor bias_tensor_;
  bool has_bias_tensor_ = false;
  GuardedTensor q_starts_, k_starts_, k_lens_, pages_;  // tables, where the route takes them from the device
  double p_ = 0;
  DropoutState dropout_;
  double score_spread_ = 1, value_spread_ = 1;
};

class MergeCase : public Case {
 public:
  MergeCase(Random& random, const KernelClass& kernel_class);

  void run(Arena& arena) override;
  int launches() const override;
  std::string verdict() const override;

  reference::MergeInputs inputs() const;

 private:
  void draw_lse(Random& random);
  void draw_attn(Random& random);
  void poison_hidden();
  void describe();
  std::vector<std::int64_t> lse_shape(int len) const;
  std::vector<Part> parts() const;
  bool writes_lse() const { return class_.problem.lse == kernel::Lse::write; }

  const KernelClass class_;
  bool stacked_ = false;
  bool into_ = false;
  int chunks_ = 1;
  int batch_ = 1, len_ = 1;
  std::vector<std::int64_t> heads_;                        // [], [H] or [G, H]
  double value_spread_ = 1, lse_spread_ = 1, hidden_ = 0;  // hidden: rows of a chunk that saw no key
  std::vector<GuardedTensor> attn_, lse_;                  // one of each when stacked
  GuardedTensor output_, lse_out_;
};

}  // namespace attune::verify
