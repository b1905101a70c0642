#include "runtime/check.h"

#include "attune/philox.h"
#include "runtime/boxes.h"
#include "runtime/check_bias.h"
#include "runtime/check_tensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace attune::runtime {
namespace {

using kernel::i32;

static_assert(static_cast<int>(DType::f32) == static_cast<int>(kernel::DType::f32) &&
              static_cast<int>(DType::f16) == static_cast<int>(kernel::DType::f16) &&
              static_cast<int>(DType::bf16) == static_cast<int>(kernel::DType::bf16));
static_assert(static_cast<int>(Family::cpu) - 1 == static_cast<int>(kernel::Family::cpu) &&
              static_cast<int>(Family::simt) - 1 == static_cast<int>(kernel::Family::simt) &&
              static_cast<int>(Family::mma) - 1 == static_cast<int>(kernel::Family::mma) &&
              static_cast<int>(Family::sm90) - 1 == static_cast<int>(kernel::Family::sm90));

// ---- Tensors ----

Result<void> check_same_dtype(const TensorView& query, const char* name, const TensorView& other) {
  if (other.dtype == query.dtype) return done();
  return invalid_argument(fmt::format("query is {} but {} is {}: all should have the same dtype",
                                      text_of(query.dtype), name, text_of(other.dtype)));
}

/// May key or value heads serve the query's? In 4-D they may be fewer, each for several neighbours; in 5-D an
/// extent of 1 serves all.
bool heads_fit(int rank, const Axes& query, const Axes& other) {
  if (rank == 5) {
    return (other.groups == query.groups || other.groups == 1) &&
           (other.heads == query.heads || other.heads == 1);
  }
  return other.groups == query.groups || (other.groups > 0 && query.groups % other.groups == 0);
}

const char* expected_shapes(int rank) {
  switch (rank) {
    case 3: return "[B, Mq, K], [B, Mkv, K], [B, Mkv, Kv]";
    case 4: return "[B, Mq, H, K], [B, Mkv, Hkv, K], [B, Mkv, Hkv, Kv], where Hkv divides H";
    default: return "[B, Mq, G, H, K], [B, Mkv, G or 1, H or 1, K], [B, Mkv, G or 1, H or 1, Kv]";
  }
}

Result<void> check_shapes(const Arguments& a, const Axes& query, const Axes& key, const Axes& value) {
  const int rank = a.query.rank;
  const bool fit = key.batch == query.batch && value.batch == query.batch && key.dim == query.dim &&
                   value.len == key.len && heads_fit(rank, query, key) && heads_fit(rank, query, value) &&
                   (rank == 5 || value.groups == key.groups);
  if (!fit) {
    return invalid_argument(fmt::format(
        "incompatible shapes: query {}, key {}, value {}; expected {}. To broadcast a batch, pass a view "
        "with stride 0",
        shape_text(a.query), shape_text(a.key), shape_text(a.value), expected_shapes(rank)));
  }
  if (query.dim == 0 || value.dim == 0) {
    return invalid_argument("head_dim and head_dim_v must be at least 1");
  }
  return done();
}

Result<void> check_output_shape(const Arguments& a, const TensorView& output) {
  TensorView expected = a.query;
  expected.shape[expected.rank - 1] = a.value.shape[a.value.rank - 1];
  if (std::equal(output.shape.begin(), output.shape.begin() + output.rank, expected.shape.begin())) {
    return done();
  }
  return invalid_argument(
      fmt::format("output: shape {}, expected {}: that of query {} with the last axis of "
                  "value {}",
                  shape_text(output), shape_text(expected), shape_text(a.query), shape_text(a.value)));
}

/// The output that Attune would allocate: contiguous, at an address that is as aligned as any.
TensorView allocated_output(const Arguments& a, kernel::DType dtype) {
  TensorView output = a.query;
  output.data = nullptr;
  output.dtype = static_cast<DType>(dtype);
  output.shape[output.rank - 1] = a.value.shape[a.value.rank - 1];
  std::int64_t stride = 1;
  for (int axis = output.rank - 1; axis >= 0; --axis) {
    output.strides[axis] = stride;
    if (__builtin_mul_overflow(stride, std::max<std::int64_t>(output.shape[axis], 1), &stride)) stride = 0;
  }
  return output;
}

// ---- Options ----

Result<float> scale_of(const AttentionOptions& options, std::int64_t head_dim) {
  const double scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
  if (!std::isfinite(scale) || std::abs(scale) > std::numeric_limits<float>::max()) {
    return invalid_argument(fmt::format("scale is {}, expected a finite float32", scale));
  }
  return static_cast<float>(scale);
}

Result<kernel::DropoutParams> dropout_of(const AttentionOptions& options) {
  if (!(options.p >= 0.0 && options.p <= 1.0)) {
    return invalid_argument(fmt::format("Invalid dropout probability: p={}, expected 0 to 1", options.p));
  }
  if (options.p == 0.0) return kernel::DropoutParams{};
  return kernel::make_dropout(options.p, options.dropout.seed, options.dropout.offset);
}

Result<codegen::Families> families_of(const AttentionOptions& options) {
  if (options.families.empty()) return codegen::Families::any;
  auto families = codegen::Families{0};
  for (const Family family : options.families) {
    if (family == Family::automatic) return codegen::Families::any;
    if (static_cast<unsigned>(family) > static_cast<unsigned>(Family::sm90)) {
      return invalid_argument(fmt::format("options: unknown family {}", static_cast<int>(family)));
    }
    families = families | codegen::only(static_cast<kernel::Family>(static_cast<int>(family) - 1));
  }
  return families;
}

Result<kernel::DType> output_dtype_of(const Arguments& a) {
  const DType dtype = a.output != nullptr   ? a.output->dtype
                      : a.output_like_query ? a.query.dtype
                                            : a.options.output_dtype.value_or(a.query.dtype);
  if (static_cast<unsigned>(dtype) > static_cast<unsigned>(DType::bf16)) {
    return invalid_argument(fmt::format("output_dtype is {}, expected f32, f16 or bf16", text_of(dtype)));
  }
  return static_cast<kernel::DType>(dtype);
}

}  // namespace

Result<Call> check(const Arguments& a) {
  Call call;
  ATTUNE_TRY(check(a, call));
  return call;
}

Result<void> check(const Arguments& a, Call& call) {
  ATTUNE_TRY(check_kind("query", a.query));
  ATTUNE_TRY(check_rank("query", a.query));
  ATTUNE_TRY(check_like(a.query, "key", a.key));
  ATTUNE_TRY(check_like(a.query, "value", a.value));
  ATTUNE_TRY(check_same_dtype(a.query, "key", a.key));
  ATTUNE_TRY(check_same_dtype(a.query, "value", a.value));
  ATTUNE_ASSIGN(query_memory, check_memory("query", a.query));
  ATTUNE_ASSIGN(key_memory, check_memory("key", a.key));
  ATTUNE_ASSIGN(value_memory, check_memory("value", a.value));
  Axes query = axes_of(a.query);
  const Axes key = axes_of(a.key);
  const Axes value = axes_of(a.value);
  ATTUNE_TRY(check_shapes(a, query, key, value));
  const std::int64_t groups = a.query.rank == 5 ? query.groups : key.groups;
  query = regrouped(query, groups);

  ATTUNE_ASSIGN(scale, scale_of(a.options, query.dim));
  ATTUNE_ASSIGN(dropout, dropout_of(a.options));
  ATTUNE_ASSIGN(families, families_of(a.options));
  ATTUNE_ASSIGN(output_dtype, output_dtype_of(a));
  ATTUNE_TRY(check_workspace(a.options.workspace));

  call.device = a.query.device;
  call.stream = a.options.stream;
  kernel::ForwardParams& params = call.params;
  params.query = a.query.data;
  params.key = a.key.data;
  params.value = a.value.data;
  params.query_strides = query.strides;
  params.key_strides = key.strides;
  params.value_strides = value.strides;
  params.batch = static_cast<i32>(query.batch);
  params.groups = static_cast<i32>(query.groups);
  params.heads = static_cast<i32>(query.heads);
  params.len_q = static_cast<i32>(query.len);
  params.len_k = static_cast<i32>(key.len);
  params.scale = scale;
  params.dropout = dropout;

  Alignment alignment;
  alignment.include(a.query);
  alignment.include(a.key);
  alignment.include(a.value);
  call.problem = {.dtype = static_cast<kernel::DType>(a.query.dtype),
                  .output_dtype = output_dtype,
                  .head_dim = static_cast<int>(query.dim),
                  .head_dim_v = static_cast<int>(value.dim),
                  .dropout = dropout.threshold > 0 ? kernel::Dropout::on : kernel::Dropout::off,
                  .lse = a.lse != nullptr || a.with_lse ? kernel::Lse::write : kernel::Lse::skip,
                  .families = families};

  ATTUNE_ASSIGN(bias_memory, add_bias(a, call));
  if (a.output != nullptr) {
    const TensorView output = *a.output;
    ATTUNE_TRY(check_like(a.query, "output", output));
    ATTUNE_TRY(check_output_shape(a, output));
    ATTUNE_ASSIGN(output_memory, check_memory("output", output));
    ATTUNE_TRY(check_distinct(output_memory));
    ATTUNE_TRY(check_apart(output_memory, {&query_memory, &key_memory, &value_memory, &bias_memory}));
    params.output = a.output->data;
    params.output_strides = regrouped(axes_of(output), groups).strides;
    alignment.include(output);
    if (a.lse != nullptr) {
      const TensorView lse = *a.lse;
      ATTUNE_ASSIGN(lse_memory, check_lse("lse", lse, lse_like(a.query)));
      ATTUNE_TRY(
          check_apart(lse_memory, {&query_memory, &key_memory, &value_memory, &bias_memory, &output_memory}));
      params.lse = static_cast<float*>(a.lse->data);
    }
  } else {
    const TensorView output = allocated_output(a, output_dtype);
    params.output_strides = regrouped(axes_of(output), groups).strides;
    alignment.include(output);
  }
  call.problem.align_bytes = alignment.bytes();
  ATTUNE_TRY(add_sequences(a, call));
  const bool bias_fits = call.problem.bias == kernel::Bias::none || bias_boxes_fit(params, call.problem.bias);
  const bool output_fits =  // float32 is not stored in boxes
      output_dtype == kernel::DType::f32 || output_boxes_fit(params, params.output_strides);
  const bool boxes_suit = a.query.dtype != DType::f32 && call.problem.align_bytes == 16 && bias_fits &&
                          output_fits && pages_fit(params.sequences) && boxes_fit(params);
  call.problem.boxes = boxes_suit ? 1 : 0;
  const bool dense = call.problem.blocks == kernel::Blocks::dense;
  if (boxes_suit && dense) {
    call.problem.extent = codegen::extent_of(query.batch * query.groups * query.heads, query.len);
  }
  return done();
}

}  // namespace attune::runtime
