// Every check of a call's arguments, made before anything is launched, and the reduction of a checked call to
// a Problem and its launch parameters.
#pragma once

#include "attune/attune.h"
#include "base/result.h"
#include "runtime/backward.h"
#include "runtime/engine.h"

#include <span>

namespace attune::runtime {

struct Arguments {
  const TensorView& query;
  const TensorView& key;
  const TensorView& value;
  const MutableTensorView* output = nullptr;  // null: only shapes matter (prepare, explain)
  const MutableTensorView* lse = nullptr;
  bool with_lse = false;  // when output is null
  const AttentionBias& bias;
  const AttentionOptions& options;
  bool places_tables = false;      // of the bias, on the device: when output is null; else they are
  bool output_like_query = false;  // in its type, when output is null, whatever the options say
};

/// Into a new call, which is copied nowhere on its way. Fails with invalid_argument or unsupported; the
/// message says what, where and what to try. Where an output is given, the bias's tables are on the device
/// when it returns.
Result<void> check(const Arguments& arguments, Call& call);
Result<Call> check(const Arguments& arguments);

struct BackwardArguments {
  const TensorView& grad_output;
  const TensorView& output;
  const TensorView& lse;
  const TensorView& query;
  const TensorView& key;
  const TensorView& value;
  const GradientViews& gradients;
  const AttentionBias& bias;
  const AttentionOptions& options;
  const BackwardOptions& backward;
  bool runs = false;  // else nothing is brought to the device
};

/// Likewise. The workspace is the caller's; its size is checked once the plan is known.
Result<void> check_backward(const BackwardArguments& arguments, BackwardCall& call);
Result<BackwardCall> check_backward(const BackwardArguments& arguments);

struct MergeArguments {
  std::span<const TensorView> attn;
  std::span<const TensorView> lse;
  const MutableTensorView* output = nullptr;  // null: only the chunks are checked
  const MutableTensorView* lse_out = nullptr;
  void* stream = nullptr;
};

/// Checks any number of chunks. The call holds the first kernel::kMaxChunks of them; it can run when there
/// are no more, and otherwise the caller merges in rounds.
Result<MergeCall> check_merge(const MergeArguments& arguments);

struct GradMergeArguments {
  const TensorView& grad_output;
  const TensorView* grad_lse = nullptr;
  const TensorView& output;
  const TensorView& lse;
  std::span<const TensorView> attn;
  std::span<const TensorView> attn_lse;
  std::span<const MutableTensorView> grad_attn;
  std::span<const MutableTensorView> grad_attn_lse;
  void* stream = nullptr;
  bool with_gradients = true;  // false: only what is read is checked
};

Result<GradMergeCall> check_grad_merge(const GradMergeArguments& arguments);

}  // namespace attune::runtime
