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

/// What a backward kernel of the sm90 family is told of the tensors that it multiplies: their maps.
template <typename Params>
Result<void> add_tiles(const Driver& driver, const kernel::KernelSpec& spec,
                       const kernel::BackwardParams& backward, Params& p) {
  const kernel::ForwardParams& forward = backward.forward;
  const auto panels = [&](const void* data, int head_dim, const BoxAxes& axes, int rows,
                          kernel::TensorMap& map) {
    return encode_panels(driver, spec.dtype, data, head_dim, axes, rows, map);
  };
  const BoxAxes query = query_axes(forward, forward.query_strides);
  const BoxAxes key = key_axes(forward, forward.key_strides);
  const BoxAxes value = key_axes(forward, forward.value_strides);
  const BoxAxes grad_output = query_axes(forward, backward.grad_output_strides);
  ATTUNE_TRY(panels(forward.query, spec.head_dim, query, spec.block_m, p.query));
  ATTUNE_TRY(panels(forward.key, spec.head_dim, key, spec.block_n, p.key));
  ATTUNE_TRY(panels(forward.value, spec.head_dim_v, value, spec.block_n, p.value));
  return panels(backward.grad_output, spec.head_dim_v, grad_output, spec.block_m, p.grad_output);
}

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
