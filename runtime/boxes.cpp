#include "runtime/boxes.h"

namespace attune::runtime {
namespace {

using kernel::ForwardParams;
using kernel::i64;
using kernel::Strides;

constexpr i64 kElementBytes = 2;
constexpr i64 kAnyStride = 16 / kElementBytes;
constexpr i64 kMaxStride = (i64{1} << 40) / kElementBytes - 1;

/// Can the groups and their heads be walked with one stride?
bool one_axis(const ForwardParams& p, const Strides& strides) {
  return p.groups == 1 || p.heads == 1 || strides.group == p.heads * strides.head;
}

bool shared_in_group(const ForwardParams& p, const Strides& strides) {
  return p.heads > 1 && strides.head == 0;
}

bool fits(i64 extent, i64 stride) {
  return extent > 0 && stride > 0 && stride <= kMaxStride && stride * kElementBytes % 16 == 0;
}

bool fits(const BoxAxes& axes) {
  return fits(axes.rows, axes.row_stride) && fits(axes.heads, axes.head_stride) &&
         fits(axes.batch, axes.batch_stride);
}

BoxAxes axes_of(const ForwardParams& p, const Strides& strides, i64 rows, i64 heads, i64 head_stride) {
  // The stride of an axis of extent 1 is never used, but must be one that the engine takes.
  const auto usable = [](i64 extent, i64 stride) { return extent == 1 ? kAnyStride : stride; };
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

bool boxes_fit(const ForwardParams& p, const Strides& output) {
  const bool same_sharing = shared_in_group(p, p.key_strides) == shared_in_group(p, p.value_strides);
  return same_sharing && one_axis(p, p.query_strides) && one_axis(p, output) &&
         (shared_in_group(p, p.key_strides) || one_axis(p, p.key_strides)) &&
         (shared_in_group(p, p.value_strides) || one_axis(p, p.value_strides)) &&
         fits(query_axes(p, p.query_strides)) && fits(query_axes(p, output)) &&
         fits(key_axes(p, p.key_strides)) && fits(key_axes(p, p.value_strides));
}

}  // namespace attune::runtime
