#include "runtime/boxes.h"

#include <cstdint>

namespace attune::runtime {
namespace {

using kernel::Bias;
using kernel::ForwardParams;
using kernel::i64;
using kernel::Strides;

constexpr i64 kAnyStride = 16;  // whatever the element
constexpr i64 kHalfBytes = 2;
constexpr i64 kStrideEnd = i64{1} << 40;

/// Can the groups and their heads be walked with one stride? Strides or BiasStrides.
bool one_axis(const ForwardParams& p, const auto& strides) {
  return p.groups == 1 || p.heads == 1 || strides.group == p.heads * strides.head;
}

bool shared_in_group(const ForwardParams& p, const Strides& strides) {
  return p.heads > 1 && strides.head == 0;
}

bool fits(const BoxAxes& axes, i64 element_bytes) {
  const auto fits = [&](i64 extent, i64 stride) {
    return extent > 0 && stride > 0 && stride < kStrideEnd / element_bytes &&
           stride * element_bytes % 16 == 0;
  };
  return fits(axes.rows, axes.row_stride) && fits(axes.heads, axes.head_stride) &&
         fits(axes.batch, axes.batch_stride);
}

/// The stride of an axis of extent 1 is never used, but must be one that the engine takes.
i64 usable(i64 extent, i64 stride) {
  return extent == 1 ? kAnyStride : stride;
}

BoxAxes axes_of(const ForwardParams& p, const Strides& strides, i64 rows, i64 heads, i64 head_stride) {
  return {.rows = rows,
          .row_stride = usable(rows, strides.seq),
          .heads = heads,
          .head_stride = usable(heads, head_stride),
          .batch = p.batch,
          .batch_stride = usable(p.batch, strides.batch)};
}

}  // namespace

BoxAxes query_axes(const ForwardParams& p, const Strides& strides) {
  return axes_of(p, strides, p.len_q, i64{p.groups} * p.heads, p.heads == 1 ? strides.group : strides.head);
}

BoxAxes key_axes(const ForwardParams& p, const Strides& strides) {
  if (shared_in_group(p, strides)) return axes_of(p, strides, p.len_k, p.groups, strides.group);
  return axes_of(p, strides, p.len_k, i64{p.groups} * p.heads, p.heads == 1 ? strides.group : strides.head);
}

BoxAxes bias_axes(const ForwardParams& p) {
  const kernel::BiasStrides& strides = p.bias_strides;
  const auto extent = [](i64 all, i64 stride) { return stride == 0 ? 1 : all; };
  const bool by_group = p.heads == 1 || strides.head == 0;
  const i64 rows = extent(p.len_q, strides.query);
  const i64 heads = by_group ? extent(p.groups, strides.group) : i64{p.groups} * p.heads;
  const i64 batch = extent(p.batch, strides.batch);
  return {.rows = rows,
          .row_stride = usable(rows, strides.query),
          .heads = heads,
          .head_stride = usable(heads, by_group ? strides.group : strides.head),
          .batch = batch,
          .batch_stride = usable(batch, strides.batch)};
}

BoxAxes bias_gradient_axes(const kernel::BackwardParams& p) {
  ForwardParams gradient = p.forward;
  gradient.bias_strides = p.grad_bias_strides;
  return bias_axes(gradient);
}

bool boxes_fit(const ForwardParams& p) {
  const bool same_sharing = shared_in_group(p, p.key_strides) == shared_in_group(p, p.value_strides);
  return same_sharing && one_axis(p, p.query_strides) &&
         (shared_in_group(p, p.key_strides) || one_axis(p, p.key_strides)) &&
         (shared_in_group(p, p.value_strides) || one_axis(p, p.value_strides)) &&
         fits(query_axes(p, p.query_strides), kHalfBytes) && fits(key_axes(p, p.key_strides), kHalfBytes) &&
         fits(key_axes(p, p.value_strides), kHalfBytes);
}

bool output_boxes_fit(const ForwardParams& p, const Strides& output) {
  return one_axis(p, output) && fits(query_axes(p, output), kHalfBytes);
}

bool pages_fit(const kernel::Sequences& sequences) {
  constexpr int kSwizzledRows = 8;
  return sequences.page_run % kSwizzledRows == 0;
}

bool bias_boxes_fit(const ForwardParams& p, Bias bias) {
  const kernel::BiasStrides& strides = p.bias_strides;
  return strides.key == 1 && reinterpret_cast<std::uintptr_t>(p.bias) % 16 == 0 &&
         (strides.head == 0 || one_axis(p, strides)) && fits(bias_axes(p), size_of(bias));
}

bool bias_gradient_boxes_fit(const kernel::BackwardParams& p) {
  const ForwardParams& f = p.forward;
  const bool whole = p.bias_batch == f.batch && p.bias_groups == f.groups && p.bias_heads == f.heads &&
                     p.bias_rows == f.len_q;
  return whole && p.grad_bias_strides.key == 1 && reinterpret_cast<std::uintptr_t>(p.grad_bias) % 16 == 0 &&
         one_axis(f, p.grad_bias_strides) && fits(bias_gradient_axes(p), kHalfBytes);
}

}  // namespace attune::runtime
