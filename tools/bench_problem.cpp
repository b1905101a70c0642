#include "tools/bench_problem.h"

#include "runtime/check.h"
#include "runtime/check_tensors.h"
#include "runtime/cuda/cuda_backend.h"
#include "tools/reference/element.h"
#include "tools/verify/random.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>

namespace attune::tools {
namespace {

using Shape = std::vector<std::int64_t>;

constexpr std::int64_t kPageSize = 64;
constexpr std::size_t kDifferentNumbers =
    1u << 20;  // then they come again: numbers cost more than to run on them

BenchExtents typical_extents(const codegen::Problem& problem, Device device) {
  if (device.type == DeviceType::cpu) return {1, 4, 4, 512, 512};
  switch (problem.extent) {
    case codegen::Extent::few_tiles: return {1, 8, 8, 512, 512};
    case codegen::Extent::few_queries: return {32, 16, 16, 512, 512};
    case codegen::Extent::large: break;
  }
  return {2, 16, 16, 4096, 4096};
}

BenchExtents or_typical(const BenchExtents& wanted, const BenchExtents& typical) {
  const auto either = [](std::int64_t said, std::int64_t otherwise) { return said > 0 ? said : otherwise; };
  BenchExtents extents{.batch = either(wanted.batch, typical.batch),
                       .heads = either(wanted.heads, typical.heads)};
  extents.key_heads = either(wanted.key_heads, extents.heads);
  extents.queries = either(wanted.queries, typical.queries);
  extents.keys = either(wanted.keys, wanted.queries > 0 ? wanted.queries : typical.keys);
  return extents;
}

// ---- Tensors ----

std::size_t bytes_of(const MutableTensorView& view) {
  return std::accumulate(
      view.shape.begin(), view.shape.begin() + view.rank, static_cast<std::size_t>(item_bytes(view.dtype)),
      [](std::size_t bytes, std::int64_t size) { return bytes * static_cast<std::size_t>(size); });
}

Result<void> write(const Tensor& tensor, const std::vector<std::byte>& bytes) {
  const MutableTensorView& view = tensor.view();
  if (view.device.type == DeviceType::cuda)
    return runtime::cuda_copy_to_device(view.device.index, view.data, bytes.data(), bytes.size());
  std::memcpy(view.data, bytes.data(), bytes.size());
  return done();
}

/// A tensor of normal numbers; a boolean one is mostly true.
Result<Tensor> random_tensor(verify::Random& random, DType dtype, Device device, const Shape& shape) {
  Tensor tensor(dtype, device, shape);
  std::vector<std::byte> bytes(bytes_of(tensor.view()));
  const auto item = static_cast<std::size_t>(item_bytes(dtype));
  const std::size_t drawn = std::min(bytes.size(), kDifferentNumbers * item);
  for (std::size_t at = 0; at < drawn; at += item) {
    const double number = dtype == DType::boolean ? random.chance(0.9) : random.normal();
    reference::store(dtype, &bytes[at], static_cast<float>(number));
  }
  for (std::size_t at = drawn; at < bytes.size(); ++at) bytes[at] = bytes[at - drawn];
  ATTUNE_TRY(write(tensor, bytes));
  return tensor;
}

// ---- The bias ----

DType dtype_of(kernel::Bias bias) {
  switch (bias) {
    case kernel::Bias::f16: return DType::f16;
    case kernel::Bias::bf16: return DType::bf16;
    case kernel::Bias::boolean: return DType::boolean;
    case kernel::Bias::f32:
    case kernel::Bias::none: break;
  }
  return DType::f32;
}

/// Causal where the right is bounded, and a quarter of the keys where the left is.
Window window_of(const codegen::Problem& problem, const BenchExtents& e) {
  const bool left = problem.window_left == kernel::Edge::bounded;
  const bool right = problem.window_right == kernel::Edge::bounded;
  return {Window::Anchor::bottom_right, left ? e.keys / 4 : -1, right ? 0 : -1};
}

std::vector<std::int32_t> starts_of(std::int64_t count, std::int64_t step) {
  std::vector<std::int32_t> starts;
  for (std::int64_t i = 0; i <= count; ++i) starts.push_back(static_cast<std::int32_t>(i * step));
  return starts;
}

/// Equal sequences, one behind the other, or each in pages of its own.
std::shared_ptr<const Sequences> sequences_of(const codegen::Problem& problem, const BenchExtents& e) {
  auto sequences = std::make_shared<Sequences>(Sequences{
      .count = e.batch, .q_starts = starts_of(e.batch, e.queries), .k_starts = starts_of(e.batch, e.keys)});
  if (problem.keys != kernel::Keys::paged) return sequences;
  const std::int64_t pages = e.keys / kPageSize;
  std::vector<std::int32_t> table(static_cast<std::size_t>(e.batch * pages));
  std::iota(table.begin(), table.end(), 0);
  sequences->k_starts = std::vector<std::int32_t>(static_cast<std::size_t>(e.batch));
  sequences->k_lens =
      std::vector<std::int32_t>(static_cast<std::size_t>(e.batch), static_cast<std::int32_t>(e.keys));
  sequences->block_tables = std::move(table);
  sequences->table_width = pages;
  sequences->page_size = kPageSize;
  return sequences;
}

}  // namespace

Result<BenchProblem> BenchProblem::make(const codegen::Problem& problem, const BenchExtents& wanted,
                                        Device device) {
  if (problem.operation != kernel::Operation::forward) {
    return unsupported(fmt::format("{}: only forward problems are measured", codegen::to_string(problem)));
  }
  BenchProblem made;
  made.problem_ = problem;
  BenchExtents& e = made.extents_ = or_typical(wanted, typical_extents(problem, device));
  const bool packed = problem.blocks == kernel::Blocks::varlen;
  if (problem.keys == kernel::Keys::paged) e.keys = std::max(e.keys / kPageSize, std::int64_t{1}) * kPageSize;
  const auto shape = [&](std::int64_t length, std::int64_t heads, int dim) {
    return packed ? Shape{1, e.batch * length, heads, dim} : Shape{e.batch, length, heads, dim};
  };
  const auto dtype = static_cast<DType>(problem.dtype);
  verify::Random random(0);
  ATTUNE_ASSIGN(query, random_tensor(random, dtype, device, shape(e.queries, e.heads, problem.head_dim)));
  ATTUNE_ASSIGN(key, random_tensor(random, dtype, device, shape(e.keys, e.key_heads, problem.head_dim)));
  ATTUNE_ASSIGN(value, random_tensor(random, dtype, device, shape(e.keys, e.key_heads, problem.head_dim_v)));
  AttentionBias& bias = made.bias_;
  bias.name = "bench";
  bias.window = window_of(problem, e);
  if (packed) bias.sequences = sequences_of(problem, e);
  if (problem.bias != kernel::Bias::none) {
    const Shape rows_and_keys{query.view().shape[1], key.view().shape[1]};
    ATTUNE_ASSIGN(tensor, random_tensor(random, dtype_of(problem.bias), device, rows_and_keys));
    made.bias_tensor_ = std::move(tensor);
    bias.tensor = made.bias_tensor_.view();
  }
  made.output_ =
      Tensor(static_cast<DType>(problem.output_dtype), device, shape(e.queries, e.heads, problem.head_dim_v));
  const bool with_lse = problem.lse == kernel::Lse::write;
  if (with_lse) {
    const TensorView like = runtime::lse_like(query.view());
    made.lse_ = Tensor(DType::f32, device, {like.shape.begin(), like.shape.begin() + like.rank});
  }
  AttentionOptions options;
  options.p = problem.dropout == kernel::Dropout::on ? 0.1 : 0;
  const MutableTensorView output = made.output_.view(), lse = made.lse_.view();
  ATTUNE_ASSIGN(call, runtime::check({query.view(), key.view(), value.view(), &output,
                                      with_lse ? &lse : nullptr, with_lse, bias, options}));
  if (problem.boxes != 0) made.problem_.extent = call.problem.extent;
  call.problem = made.problem_;  // less may be known of its alignment than is true of these tensors
  made.call_ = call;
  made.query_ = std::move(query);
  made.key_ = std::move(key);
  made.value_ = std::move(value);
  return made;
}

std::string BenchProblem::text() const {
  const BenchExtents& e = extents_;
  const std::string heads = e.heads == e.key_heads ? fmt::format("heads {}", e.heads)
                                                   : fmt::format("heads {} and {}", e.heads, e.key_heads);
  const char* batch = problem_.blocks == kernel::Blocks::varlen ? "sequences" : "batch";
  return fmt::format("{} {}, {}, {} queries, {} keys", batch, e.batch, heads, e.queries, e.keys);
}

Result<std::vector<float>> BenchProblem::output() const {
  const MutableTensorView& view = output_.view();
  if (view.device.type == DeviceType::cpu) return reference::dense(view);
  const Tensor host(view.dtype, {}, {view.shape.begin(), view.shape.begin() + view.rank});
  ATTUNE_TRY(runtime::cuda_copy_to_host(view.device.index, host.data(), view.data, bytes_of(view)));
  return reference::dense(host.view());
}

Result<void> BenchProblem::poison_output() {
  return write(output_, std::vector<std::byte>(bytes_of(output_.view()), std::byte{0xff}));
}

bool agree(const std::vector<float>& output, const std::vector<float>& other, kernel::DType dtype) {
  float largest = 0;
  for (const float x : output) largest = std::max(largest, std::abs(x));
  // What rounding the weights, the sum and the result costs; a wrong kernel is wrong by the numbers
  // themselves.
  const float roundings = 4 * (dtype == kernel::DType::bf16  ? 0x1p-8f
                               : dtype == kernel::DType::f16 ? 0x1p-11f
                                                             : 0x1p-16f);
  return std::ranges::equal(output, other,
                            [&](float a, float b) { return std::abs(a - b) <= roundings * largest; });
}

}  // namespace attune::tools
