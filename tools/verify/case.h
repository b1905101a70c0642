// A random call of the public API: its arguments, what it left behind, and whether that is right.
#pragma once

#include "runtime/check.h"
#include "tools/reference/reference.h"
#include "tools/verify/arena.h"
#include "tools/verify/attention_problem.h"
#include "tools/verify/guarded_tensor.h"
#include "tools/verify/kernel_classes.h"
#include "tools/verify/query_numbers.h"
#include "tools/verify/random.h"

#include <cstddef>
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
  /// Kernels that run() launches, and how many fewer they may be.
  virtual int launches() const = 0;
  virtual int spared_launches() const { return 0; }
  /// The problem of the kernel that last_kernel() names afterwards, if there were any.
  virtual codegen::Problem last(const codegen::Arch& arch) const = 0;
  /// "" when the results are within the tolerance, rows that saw no key are exactly 0 and -inf, and no byte
  /// outside them has changed; else what is wrong.
  virtual std::string verdict() const = 0;

  std::string name;                                          // everything that was drawn
  std::string bias;                                          // its class of the documentation
  std::vector<std::pair<std::string, std::string>> aspects;  // ("type", "f16"): rows of the report
};

/// Draws a case of the class; a mask other than the class's own where its kernels serve it.
std::unique_ptr<Case> random_case(Random& random, const KernelClass& kernel_class, const MaskClass* mask);

// ---- The kinds of cases ----

/// The function that is called: into the caller's memory, or into what Attune allocates.
enum class Function { into, allocate, requires_grad, partial };

class AttentionCase : public Case {
 public:
  AttentionCase(Random& random, const KernelClass& kernel_class, const MaskClass& mask);

  void run(Arena& arena) override;
  int launches() const override;
  codegen::Problem last(const codegen::Arch&) const override;
  std::string verdict() const override;

  AttentionProblem problem;
  GuardedTensor output;
  GuardedTensor lse;  // contiguous

 private:
  bool is_split() const { return problem.traits().split == kernel::Split::on; }
  /// Has the class another extent than the case's few small tensors, or may it be split otherwise than they
  /// would be? Then the call is told the class's.
  bool is_disguised() const;
  void run_disguised(const runtime::Arguments& arguments) const;
  void describe();
  bool writes_lse() const { return problem.traits().lse == kernel::Lse::write; }
  std::vector<Part> parts() const;

  Function function_ = Function::into;
  int parts_of_keys_ = 1;
};

/// Gradients of results that the reference or Attune's own forward computed. In deterministic mode the call
/// is made twice, and must give the same bits.
class BackwardCase : public Case {
 public:
  BackwardCase(Random& random, const KernelClass& kernel_class, const MaskClass& mask);

  void run(Arena& arena) override;
  int launches() const override;
  int spared_launches() const override;
  codegen::Problem last(const codegen::Arch& arch) const override;
  std::string verdict() const override;

  /// Once it has run, where the output is forward's. Without the numbers that are NaN.
  reference::BackwardInputs inputs() const;

  AttentionProblem problem;

 private:
  struct Call;
  struct Result {
    const char* name;
    bool wanted = false;
    GuardedTensor tensor;
  };

  /// A packed sequence with NaN in queries, or in gradients of their outputs: that reaches no other sequence.
  struct NanSequence {
    AttentionProblem::Sequence rows;
    std::vector<bool> queries;  // those that are NaN
    bool in_query;              // or in the output's gradient?
    GuardedTensor query;        // without the NaN
  };

  void draw_nan_sequence(Random& random);
  void poison(GuardedTensor& tensor);
  void draw_forward(Random& random);
  void draw_grad_output(Random& random);
  void draw_results(Random& random);
  void describe();
  reference::BackwardInputs all_inputs() const;
  bool is_of_nan_sequence(const Result& result, std::size_t element) const;
  std::string overlook_nan(const Result& result, const reference::Gradient& right,
                           const reference::Gradient& reached, std::vector<double>& gradient) const;
  double gradient_spread(Random& random) const;
  bool has_bias_gradient() const;
  bool always_adds_query_gradient() const;
  kernel::QueryGradient query_gradient(const codegen::Arch& arch) const;
  bool computes(const Result& result) const;
  std::size_t most_workspace() const;
  std::vector<Part> parts() const;
  void run_once(Arena& arena);
  void run_into(Arena& arena, Call& call);
  void run_allocating(Arena& arena, Call& call);

  GuardedTensor output_, grad_output_;
  QueryNumbers lse_, grad_lse_;
  Result query_{"grad_query"}, key_{"grad_key"}, value_{"grad_value"}, bias_{"grad_bias"};
  GuardedTensor workspace_;
  bool own_forward_;  // output and lse are what Attune computes
  bool has_grad_lse_;
  bool deterministic_;
  Function function_;
  bool own_workspace_;  // the caller's
  const char* grad_output_layout_ = "";
  double grad_spread_ = 1;
  std::optional<NanSequence> nan_;
  std::string wrong_;  // that was found out while it ran
};

class MergeCase : public Case {
 public:
  MergeCase(Random& random, const KernelClass& kernel_class);

  void run(Arena& arena) override;
  int launches() const override;
  codegen::Problem last(const codegen::Arch& arch) const override;
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
