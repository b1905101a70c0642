// Maps of tensors for Hopper's copy engine.
#pragma once

#include "attune/params.h"
#include "attune/spec.h"
#include "base/result.h"
#include "runtime/boxes.h"
#include "runtime/cuda/driver.h"

namespace attune::runtime {

/// The map of a 16-bit tensor whose boxes are a panel of `rows` rows of one head. Fails with internal when
/// the driver refuses it.
Result<void> encode_panels(const Driver& driver, kernel::DType dtype, const void* data, int head_dim,
                           const BoxAxes& axes, int rows, kernel::TensorMap& map);

/// The map of a bias tensor [query, key], whose boxes are `rows` rows of `row_bytes`: 128, 64 or 32.
Result<void> encode_bias(const Driver& driver, kernel::Bias type, const void* data, int len_k,
                         const BoxAxes& axes, int row_bytes, int rows, kernel::TensorMap& map);

}  // namespace attune::runtime
