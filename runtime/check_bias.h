// The part of check() that a bias asks for: its window, its tensor, and its packed sequences.
#pragma once

#include "runtime/check.h"
#include "runtime/check_tensors.h"

namespace attune::runtime {

/// Adds the window and the bias tensor to a call whose batch, heads and lengths are known. Returns the
/// tensor's memory, which must not be written; empty without one.
Result<Memory> add_bias(const Arguments& arguments, Call& call);

/// Adds the gradient of a call's bias tensor to a backward call whose forward parameters are known. The
/// caller checks the gradient's memory.
Result<void> add_bias_gradient(const TensorView& query, const TensorView& bias,
                               const MutableTensorView& gradient, kernel::BackwardParams& params);

/// Adds the packed sequences, whatever of them the host knows being checked. Their tables are brought to the
/// device when the call has an output.
Result<void> add_sequences(const Arguments& arguments, Call& call);

}  // namespace attune::runtime
