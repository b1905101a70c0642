// Every check of a call's arguments, made before anything is launched, and the reduction of a checked call to
// a Problem and its launch parameters.
#pragma once

#include "attune/attune.h"
#include "base/result.h"
#include "runtime/engine.h"

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
};

/// Fails with invalid_argument or unsupported; the message says what, where and what to try.
Result<Call> check(const Arguments& arguments);

}  // namespace attune::runtime
