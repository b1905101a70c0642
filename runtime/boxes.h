// Can a tensor copy engine (Hopper's TMA) take a call's tensors, and as which axes? The engine wants at most
// five axes of which the innermost is contiguous, and strides of 16 bytes' multiples, positive and below 2^40
// bytes.
#pragma once

#include "attune/params.h"
#include "attune/spec.h"

namespace attune::runtime {

/// The axes [rows, heads, batch] of a tensor, strides in elements; the innermost axis is the head dim.
struct BoxAxes {
  kernel::i64 rows = 0, row_stride = 0;
  kernel::i64 heads = 0, head_stride = 0;
  kernel::i64 batch = 0, batch_stride = 0;
  bool operator==(const BoxAxes&) const = default;
};

/// Groups and heads as one axis.
BoxAxes query_axes(const kernel::ForwardParams& params, const kernel::Strides& strides);
/// Likewise, or one head for each group where the group shares it.
BoxAxes key_axes(const kernel::ForwardParams& params, const kernel::Strides& strides);

/// Of a bias tensor, whose rows are queries and whose innermost axis are keys: an axis along which it is
/// broadcast has extent 1, and heads are those of the query, one of each group, or one.
BoxAxes bias_axes(const kernel::ForwardParams& params);

/// Of the gradient of a bias tensor that is broadcast along no axis.
BoxAxes bias_gradient_axes(const kernel::BackwardParams& params);

/// Do query, key and value, 16-bit and with rows aligned to 16 bytes, suit the engine?
bool boxes_fit(const kernel::ForwardParams& params);
/// Does the output, or its gradient, likewise, with these strides?
bool output_boxes_fit(const kernel::ForwardParams& params, const kernel::Strides& output);
/// Do pages, if there are any, suit it? Boxes begin at multiples of 8 rows of a tile, so from such a multiple
/// of a sequence's keys on 8 must be neighbours in memory.
bool pages_fit(const kernel::Sequences& sequences);
/// Does a bias of this type suit it?
bool bias_boxes_fit(const kernel::ForwardParams& params, kernel::Bias bias);
/// Does the 16-bit gradient of one, and has it an element for every pair?
bool bias_gradient_boxes_fit(const kernel::BackwardParams& params);

}  // namespace attune::runtime
