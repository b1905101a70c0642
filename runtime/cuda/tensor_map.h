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

/// What a kernel of the sm90 family is told of a bias tensor for so many heads of the query: its map, and
/// which of its axes are broadcast.
template <typename Params>
Result<void> add_bias(const Driver& driver, const kernel::KernelSpec& spec,
                      const kernel::ForwardParams& forward, int heads, int row_bytes, Params& p) {
  const BoxAxes axes = bias_axes(forward);
  p.bias_rows = axes.rows == 1 ? 1 : spec.block_m;
  p.bias_batches = axes.batch == 1 ? 0 : 1;
  p.heads_per_bias_head = static_cast<int>(heads / axes.heads);
  return encode_bias(driver, spec.bias, forward.bias, forward.len_k, axes, row_bytes, p.bias_rows, p.bias);
}

}  // namespace attune::runtime
