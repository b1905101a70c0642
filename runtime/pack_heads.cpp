#include "runtime/pack_heads.h"

#include <algorithm>
#include <cstddef>

namespace attune::runtime {

using kernel::Edge;
using kernel::ForwardParams;
using kernel::i32;
using kernel::KernelSpec;

namespace {

const void* row_of(const void* tensor, i32 row, const kernel::Strides& strides, kernel::DType dtype) {
  return static_cast<const std::byte*>(tensor) + row * strides.seq * size_of(dtype);
}

}  // namespace

std::optional<ForwardParams> packed_heads(const KernelSpec& spec, const ForwardParams& params) {
  if (!packs_heads(spec, params)) return std::nullopt;
  // The keys that the one query sees; no window hides any of them from its neighbours then.
  const i32 begin = spec.window_left == Edge::bounded ? std::max(params.window.lower, 0) : 0;
  const i32 end =
      spec.window_right == Edge::bounded ? std::min(params.window.upper + 1, params.len_k) : params.len_k;
  if (begin >= end) return std::nullopt;
  ForwardParams packed = params;
  packed.key = row_of(params.key, begin, params.key_strides, spec.dtype);
  packed.value = row_of(params.value, begin, params.value_strides, spec.dtype);
  packed.len_k = end - begin;
  packed.len_q = params.heads;
  packed.heads = 1;
  packed.window = {-packed.len_q, packed.len_k};
  packed.query_strides.seq = params.query_strides.head;
  packed.output_strides.seq = params.output_strides.head;
  return packed;
}

}  // namespace attune::runtime
