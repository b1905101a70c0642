#include "runtime/check.h"

#include "attune/semantics.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace attune::runtime {
namespace {

using kernel::Anchor;
using kernel::Edge;

static_assert(static_cast<int>(DType::f32) == static_cast<int>(kernel::DType::f32) &&
              static_cast<int>(DType::f16) == static_cast<int>(kernel::DType::f16) &&
              static_cast<int>(DType::bf16) == static_cast<int>(kernel::DType::bf16));
static_assert(static_cast<int>(Family::cpu) - 1 == static_cast<int>(codegen::Force::cpu) &&
              static_cast<int>(Family::simt) - 1 == static_cast<int>(codegen::Force::simt) &&
              static_cast<int>(Family::mma) - 1 == static_cast<int>(codegen::Force::mma) &&
              static_cast<int>(Family::automatic) - 1 == static_cast<int>(codegen::Force::automatic));

constexpr const char* kDTypeNames[] = {"f32", "f16", "bf16"};

std::int64_t item_bytes(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

std::string text_of(Device device) {
  return device.type == DeviceType::cpu ? "cpu" : fmt::format("cuda:{}", device.index);
}

/// "[2, 3, 4]": the first `rank` entries.
std::string shape_text(const TensorView& tensor) {
  return fmt::format("[{}]", fmt::join(tensor.shape.begin(), tensor.shape.begin() + tensor.rank, ", "));
}

/// A tensor with its four axes named; BMK becomes BMHK with one head.
struct Axes {
  std::int64_t batch, len, heads, dim;
  kernel::Strides strides;
};

/// What kind of tensor it is: dtype, device and rank are values that exist.
Result<void> check_kind(const char* name, const TensorView& t) {
  if (static_cast<unsigned>(t.dtype) > static_cast<unsigned>(DType::bf16)) {
    return invalid_argument(fmt::format("{}: unknown dtype {}", name, static_cast<int>(t.dtype)));
  }
  if (static_cast<unsigned>(t.device.type) > static_cast<unsigned>(DeviceType::cuda) || t.device.index < 0) {
    return invalid_argument(fmt::format("{}: unknown device (type {}, index {})", name,
                                        static_cast<int>(t.device.type), t.device.index));
  }
  if (t.rank == 5) {
    return unsupported(fmt::format(
        "{}: 5-D [B, M, G, H, K] tensors are not supported yet; reshape to [B, M, G * H, K]", name));
  }
  if (t.rank != 3 && t.rank != 4) {
    return invalid_argument(fmt::format("{}: rank {}, expected [B, M, H, K] or [B, M, K]", name, t.rank));
  }
  return done();
}

/// What the memory is: extents, strides and pointer.
Result<Axes> check_memory(const char* name, const TensorView& t) {
  std::int64_t reach = 0;  // bytes between the first and the last element
  bool empty = false;
  for (int axis = 0; axis < t.rank; ++axis) {
    const std::int64_t size = t.shape[axis];
    if (size < 0) {
      return invalid_argument(fmt::format("{}: axis {} of shape {} is negative", name, axis, shape_text(t)));
    }
    if (size > kernel::kMaxLength) {
      return unsupported(fmt::format("{}: axis {} has extent {}, the limit is 2^29", name, axis, size));
    }
    empty = empty || size == 0;
    if (size <= 1) continue;
    std::int64_t step = 0;
    std::int64_t span = 0;
    if (t.strides[axis] == std::numeric_limits<std::int64_t>::min() ||
        __builtin_mul_overflow(std::abs(t.strides[axis]), item_bytes(t.dtype), &step) ||
        __builtin_mul_overflow(step, size - 1, &span) || __builtin_add_overflow(reach, span, &reach)) {
      return invalid_argument(
          fmt::format("{}: shape {} with stride {} on axis {} overflows the address space", name,
                      shape_text(t), t.strides[axis], axis));
    }
  }
  if (t.shape[t.rank - 1] > 1 && t.strides[t.rank - 1] != 1) {
    return invalid_argument(
        fmt::format("{}: the last axis has stride {}, expected 1; make a contiguous copy of the tensor", name,
                    t.strides[t.rank - 1]));
  }
  if (!empty) {
    if (t.data == nullptr) return invalid_argument(fmt::format("{}: null data pointer", name));
    if (reinterpret_cast<std::uintptr_t>(t.data) % static_cast<std::uintptr_t>(item_bytes(t.dtype)) != 0) {
      return invalid_argument(fmt::format("{}: the data pointer is not aligned to its element size", name));
    }
  }
  const auto stride = [&](int axis) { return t.shape[axis] > 1 ? t.strides[axis] : 0; };
  const bool has_heads = t.rank == 4;
  return Axes{.batch = t.shape[0],
              .len = t.shape[1],
              .heads = has_heads ? t.shape[2] : 1,
              .dim = t.shape[t.rank - 1],
              .strides = {.batch = stride(0), .seq = stride(1), .head = has_heads ? stride(2) : 0}};
}

Result<void> check_same_kind(const TensorView& query, const char* name, const TensorView& other) {
  if (other.rank != query.rank) {
    return invalid_argument(
        fmt::format("query and {} differ in rank ({} and {}): all should be BMHK or all BMK", name,
                    query.rank, other.rank));
  }
  if (other.dtype != query.dtype) {
    return invalid_argument(fmt::format("query is {} but {} is {}: all should have the same dtype",
                                        kDTypeNames[static_cast<int>(query.dtype)], name,
                                        kDTypeNames[static_cast<int>(other.dtype)]));
  }
  if (!(other.device == query.device)) {
    return invalid_argument(fmt::format("query is on {} but {} is on {}: all should be on the same device",
                                        text_of(query.device), name, text_of(other.device)));
  }
  return done();
}

Result<void> check_shapes(const Arguments& a, const Axes& query, const Axes& key, const Axes& value) {
  const bool fit = key.batch == query.batch && key.heads == query.heads && key.dim == query.dim &&
                   value.batch == query.batch && value.heads == query.heads && value.len == key.len;
  if (!fit) {
    return invalid_argument(
        fmt::format("incompatible shapes: query {}, key {}, value {}; expected [B, Mq, H, K], [B, Mkv, H, "
                    "K], [B, Mkv, H, Kv]. "
                    "To broadcast heads or batch, pass a view with stride 0",
                    shape_text(a.query), shape_text(a.key), shape_text(a.value)));
  }
  if (query.dim == 0 || value.dim == 0) {
    return invalid_argument("head_dim and head_dim_v must be at least 1");
  }
  return done();
}

Result<Axes> check_output(const Arguments& a, const Axes& query, const Axes& value) {
  const MutableTensorView& output = *a.output;
  ATTUNE_TRY(check_kind("output", output));
  ATTUNE_TRY(check_same_kind(a.query, "output", output));
  ATTUNE_ASSIGN(axes, check_memory("output", output));
  if (axes.batch != query.batch || axes.len != query.len || axes.heads != query.heads ||
      axes.dim != value.dim) {
    return invalid_argument(fmt::format("output: shape {} does not fit query {} and value {}",
                                        shape_text(output), shape_text(a.query), shape_text(a.value)));
  }
  for (int axis = 0; axis < output.rank - 1; ++axis) {
    if (output.shape[axis] > 1 && output.strides[axis] == 0) {
      return invalid_argument(
          fmt::format("output: stride 0 on axis {}: its elements would share memory", axis));
    }
  }
  if (output.data != nullptr &&
      (output.data == a.query.data || output.data == a.key.data || output.data == a.value.data)) {
    return invalid_argument("output: shares its memory with an input");
  }
  return axes;
}

Result<void> check_lse(const Arguments& a, const Axes& query) {
  const MutableTensorView& lse = *a.lse;
  const bool fits = lse.rank == 3 && lse.shape[0] == query.batch && lse.shape[1] == query.heads &&
                    lse.shape[2] == query.len;
  if (lse.dtype != DType::f32 || !fits) {
    return invalid_argument(
        fmt::format("lse: expected float32 [{}, {}, {}]", query.batch, query.heads, query.len));
  }
  if (!(lse.device == a.query.device)) return invalid_argument("lse: must be on the query's device");
  const bool empty = query.batch == 0 || query.heads == 0 || query.len == 0;
  if (empty) return done();  // no element: neither memory nor strides matter
  const auto dense = [&](int axis, std::int64_t stride) {
    return lse.shape[axis] <= 1 || lse.strides[axis] == stride;
  };
  if (!dense(2, 1) || !dense(1, query.len) || !dense(0, query.heads * query.len)) {
    return invalid_argument("lse: must be contiguous");
  }
  if (lse.data == nullptr || reinterpret_cast<std::uintptr_t>(lse.data) % sizeof(float) != 0) {
    return invalid_argument("lse: null or misaligned data pointer");
  }
  return done();
}

/// A window in the terms of semantics.h; a negative reach is no bound.
struct Reach {
  Anchor anchor = Anchor::top_left;
  std::int64_t left = -1;
  std::int64_t right = -1;
};

Result<Reach> reach_of(const AttentionBias& bias) {
  if (std::holds_alternative<LowerTriangularMask>(bias)) return Reach{.right = 0};
  if (std::holds_alternative<LowerTriangularFromBottomRightMask>(bias)) {
    return Reach{.anchor = Anchor::bottom_right, .right = 0};
  }
  if (const auto* local = std::get_if<LowerTriangularFromBottomRightLocalAttentionMask>(&bias)) {
    if (local->window_size < 1) {
      return invalid_argument(fmt::format(
          "LowerTriangularFromBottomRightLocalAttentionMask: window_size {}, expected `window_size > 0`",
          local->window_size));
    }
    return Reach{.anchor = Anchor::bottom_right, .left = local->window_size - 1, .right = 0};
  }
  if (const auto* local = std::get_if<LocalAttentionFromBottomRightMask>(&bias)) {
    if (local->window_left < 0 || local->window_right < 0) {
      return invalid_argument(fmt::format(
          "LocalAttentionFromBottomRightMask: window_left {} and window_right {}, expected both >= 0",
          local->window_left, local->window_right));
    }
    return Reach{.anchor = Anchor::bottom_right, .left = local->window_left, .right = local->window_right};
  }
  return Reach{};
}

Result<float> scale_of(const AttentionOptions& options, std::int64_t head_dim) {
  const double scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
  if (!std::isfinite(scale) || std::abs(scale) > std::numeric_limits<float>::max()) {
    return invalid_argument(fmt::format("scale is {}, expected a finite float32", scale));
  }
  return static_cast<float>(scale);
}

/// The largest power of two up to 16 that divides every address and every step in bytes of the tensor's rows.
void collect_alignment(const TensorView& tensor, const Axes& axes, std::uint64_t& bits) {
  const auto item = static_cast<std::uint64_t>(item_bytes(tensor.dtype));
  bits |= reinterpret_cast<std::uintptr_t>(tensor.data);
  for (const kernel::i64 step :
       {axes.strides.batch, axes.strides.seq, axes.strides.head, kernel::i64{axes.dim}}) {
    bits |= static_cast<std::uint64_t>(step) * item;
  }
}

}  // namespace

Result<Call> check(const Arguments& a) {
  ATTUNE_TRY(check_kind("query", a.query));
  ATTUNE_TRY(check_kind("key", a.key));
  ATTUNE_TRY(check_kind("value", a.value));
  ATTUNE_TRY(check_same_kind(a.query, "key", a.key));
  ATTUNE_TRY(check_same_kind(a.query, "value", a.value));
  ATTUNE_ASSIGN(query, check_memory("query", a.query));
  ATTUNE_ASSIGN(key, check_memory("key", a.key));
  ATTUNE_ASSIGN(value, check_memory("value", a.value));
  ATTUNE_TRY(check_shapes(a, query, key, value));
  ATTUNE_ASSIGN(reach, reach_of(a.bias));
  ATTUNE_ASSIGN(scale, scale_of(a.options, query.dim));
  if (static_cast<unsigned>(a.options.family) > static_cast<unsigned>(Family::mma)) {
    return invalid_argument(fmt::format("options: unknown family {}", static_cast<int>(a.options.family)));
  }

  Call call;
  call.device = a.query.device;
  call.stream = a.options.stream;

  kernel::ForwardParams& params = call.params;
  std::uint64_t alignment = 16;
  collect_alignment(a.query, query, alignment);
  collect_alignment(a.key, key, alignment);
  collect_alignment(a.value, value, alignment);
  if (a.output != nullptr) {
    ATTUNE_ASSIGN(output, check_output(a, query, value));
    collect_alignment(*a.output, output, alignment);
    params.output = a.output->data;
    params.output_strides = output.strides;
  }
  if (a.lse != nullptr) {
    ATTUNE_TRY(check_lse(a, query));
    params.lse = static_cast<float*>(a.lse->data);
  }
  params.query = a.query.data;
  params.key = a.key.data;
  params.value = a.value.data;
  params.query_strides = query.strides;
  params.key_strides = key.strides;
  params.value_strides = value.strides;
  params.batch = static_cast<kernel::i32>(query.batch);
  params.heads = static_cast<kernel::i32>(query.heads);
  params.len_q = static_cast<kernel::i32>(query.len);
  params.len_k = static_cast<kernel::i32>(key.len);
  params.window = kernel::make_window(reach.anchor, reach.left, reach.right, params.len_q, params.len_k);
  params.scale = scale;

  call.problem = {.operation = kernel::Operation::forward,
                  .dtype = static_cast<kernel::DType>(a.query.dtype),
                  .head_dim = static_cast<int>(query.dim),
                  .head_dim_v = static_cast<int>(value.dim),
                  .window_left = reach.left < 0 ? Edge::open : Edge::bounded,
                  .window_right = reach.right < 0 ? Edge::open : Edge::bounded,
                  .lse = a.lse != nullptr || a.with_lse ? kernel::Lse::write : kernel::Lse::skip,
                  .align_bytes = 1 << std::countr_zero(alignment),
                  .force = static_cast<codegen::Force>(static_cast<int>(a.options.family) - 1)};
  return call;
}

}  // namespace attune::runtime
