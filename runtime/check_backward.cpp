// The checks of a backward call: those of its forward call, and of everything that only backward has.
#include "attune/semantics.h"
#include "runtime/boxes.h"
#include "runtime/check.h"
#include "runtime/check_bias.h"
#include "runtime/check_tensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>
#include <span>

namespace attune::runtime {
namespace {

using kernel::i32;

constexpr std::size_t kMaxTensors =
    13;  // query, key, value, bias, output, grad_output, two lse, four gradients

/// Of pages: sm90 counts entries, a warp's at a time, in 32 bits.
constexpr kernel::i64 kMostTableEntries = (kernel::i64{1} << 31) - 32;

/// The memory of everything that the call has been found to read or write so far.
class Known {
 public:
  void add(const Memory& memory) { memories_[size_++] = memory; }

  /// Adds what is written, unless its elements, or those of anything before it, share memory.
  Result<void> add_written(const Memory& memory) {
    ATTUNE_TRY(check_distinct(memory));
    std::array<const Memory*, kMaxTensors> others{};
    for (std::size_t i = 0; i < size_; ++i) others[i] = &memories_[i];
    ATTUNE_TRY(check_apart(memory, std::span<const Memory* const>(others.data(), size_)));
    add(memory);
    return done();
  }

 private:
  std::array<Memory, kMaxTensors> memories_;
  std::size_t size_ = 0;
};

bool same_shape(const TensorView& a, const TensorView& b) {
  return a.rank == b.rank && std::equal(a.shape.begin(), a.shape.begin() + a.rank, b.shape.begin());
}

/// A tensor that is like another one of the call: of its shape and type.
Result<void> check_twin(const TensorView& query, const char* name, const TensorView& twin, const char* of,
                        const TensorView& tensor) {
  ATTUNE_TRY(check_like(query, name, twin));
  if (!same_shape(twin, tensor)) {
    return invalid_argument(
        fmt::format("{}: shape {}, expected {} as {}", name, shape_text(twin), shape_text(tensor), of));
  }
  if (twin.dtype != tensor.dtype) {
    return invalid_argument(
        fmt::format("{}: is {}, expected {} as {}", name, text_of(twin.dtype), text_of(tensor.dtype), of));
  }
  return done();
}

Result<void> check_output(const BackwardArguments& a) {
  ATTUNE_TRY(check_like(a.query, "output", a.output));
  TensorView expected = a.query;
  expected.shape[expected.rank - 1] = a.value.shape[a.value.rank - 1];
  if (same_shape(a.output, expected)) return done();
  return invalid_argument(
      fmt::format("output: shape {}, expected {}, which attention of query {} and value {} has: pass what "
                  "forward returned",
                  shape_text(a.output), shape_text(expected), shape_text(a.query), shape_text(a.value)));
}

// ---- Numbers of every query ----

/// The longest sequence of queries; nothing where only a device knows it.
std::optional<std::int64_t> longest_queries(const Sequences& s) {
  if (!s.q_starts.on_host()) return std::nullopt;
  const auto& starts = s.q_starts.host();
  std::int64_t longest = 0;
  for (std::size_t b = 0; b + 1 < starts.size(); ++b) {
    longest = std::max<std::int64_t>(longest, std::int64_t{starts[b + 1]} - starts[b]);
  }
  return longest;
}

/// "[2, 8, at least 5]"
std::string lse_shape_text(std::int64_t batch, const TensorView& heads, std::string_view length) {
  std::string text = fmt::format("[{}", batch);
  for (int axis = 1; axis < heads.rank - 1; ++axis) text += fmt::format(", {}", heads.shape[axis]);
  return text + fmt::format(", at least {}]", length);
}

/// An lse that is read, or its gradient: one number of each query, packed or padded.
/// `heads` are those of a group.
Result<Memory> add_numbers(const BackwardArguments& a, const char* name, const TensorView& t, i32 heads,
                           kernel::QueryNumbers& numbers) {
  const TensorView expected = lse_like(a.query);
  const Sequences* sequences = a.bias.sequences.get();
  const auto longest = sequences != nullptr ? longest_queries(*sequences) : std::nullopt;
  const std::int64_t len_q = expected.shape[expected.rank - 1];
  const auto fits = [&](std::int64_t batch, std::int64_t length) {
    return t.rank == expected.rank && t.shape[0] == batch && t.shape[t.rank - 1] >= length &&
           std::equal(t.shape.begin() + 1, t.shape.begin() + t.rank - 1, expected.shape.begin() + 1);
  };
  const bool packed = fits(expected.shape[0], len_q);
  const bool padded = !packed && sequences != nullptr && fits(sequences->count, longest.value_or(0));
  if (t.dtype != DType::f32 || (!packed && !padded)) {
    std::string shapes = lse_shape_text(expected.shape[0], expected, std::to_string(len_q));
    if (sequences != nullptr) {
      shapes += " or, padded, " + lse_shape_text(sequences->count, expected,
                                                 longest ? std::to_string(*longest) : "the longest sequence");
    }
    const bool printable = t.rank >= 0 && t.rank <= kMaxRank;
    return invalid_argument(fmt::format("{}: {} {}, expected float32 {}", name, text_of(t.dtype),
                                        printable ? shape_text(t) : fmt::format("of rank {}", t.rank),
                                        shapes));
  }
  if (!(t.device == a.query.device)) {
    return invalid_argument(fmt::format("{}: is on {}, expected {}, the device of the inputs", name,
                                        text_of(t.device), text_of(a.query.device)));
  }
  ATTUNE_ASSIGN(memory, check_memory(name, t, LastStride::any));
  numbers.data = static_cast<const float*>(t.data);
  numbers.length = static_cast<i32>(t.shape[t.rank - 1]);
  numbers.per_sequence = padded ? 1 : 0;
  numbers.strides = {.batch = stride_of(t, 0), .seq = stride_of(t, t.rank - 1)};
  numbers.strides.head = stride_of(t, t.rank - 2);
  numbers.strides.group = t.rank == 4 ? stride_of(t, 1) : numbers.strides.head * heads;
  return memory;
}

// ---- Gradients ----

/// A result of a tensor's shape and type.
Result<void> add_gradient(const BackwardArguments& a, const char* name, const MutableTensorView* gradient,
                          const char* of, const TensorView& tensor, Known& known, Alignment& alignment) {
  if (gradient == nullptr) return done();
  const TensorView view = *gradient;
  ATTUNE_TRY(check_twin(a.query, name, view, of, tensor));
  ATTUNE_ASSIGN(memory, check_memory(name, view));
  ATTUNE_TRY(known.add_written(memory));
  alignment.include(view);
  return done();
}

/// Heads of key or value on the axes [groups, heads] that the query has been given.
HeadExtents head_extents(const Axes& axes, int rank, const kernel::ForwardParams& p) {
  if (rank == 5) return {static_cast<i32>(axes.groups), static_cast<i32>(axes.heads)};
  return {p.groups, std::min(p.heads, 1)};
}

void* data_of(const MutableTensorView* view) {
  return view == nullptr ? nullptr : view->data;
}
kernel::Strides strides_of(const MutableTensorView* view, std::int64_t groups) {
  return view == nullptr ? kernel::Strides() : regrouped(axes_of(*view), groups).strides;
}

}  // namespace

Result<BackwardCall> check_backward(const BackwardArguments& a) {
  BackwardCall call;
  ATTUNE_TRY(check_backward(a, call));
  return call;
}

Result<void> check_backward(const BackwardArguments& a, BackwardCall& call) {
  Call forward;
  ATTUNE_TRY(check({.query = a.query,
                    .key = a.key,
                    .value = a.value,
                    .bias = a.bias,
                    .options = a.options,
                    .places_tables = a.runs,
                    .output_like_query = true},
                   forward));
  call.problem = forward.problem;
  call.device = forward.device;
  call.stream = forward.stream;
  call.deterministic = a.backward.deterministic;
  call.workspace = a.backward.workspace;
  kernel::BackwardParams& p = call.params;
  p.forward = forward.params;

  ATTUNE_TRY(check_output(a));
  ATTUNE_TRY(check_twin(a.query, "grad_output", a.grad_output, "output", a.output));
  Known known;
  for (const auto& [name, tensor] : {std::pair{"query", &a.query}, {"key", &a.key}, {"value", &a.value}}) {
    ATTUNE_ASSIGN(memory, check_memory(name, *tensor));
    known.add(memory);
  }
  if (a.bias.tensor) {
    ATTUNE_ASSIGN(bias_memory, check_memory("attn_bias", *a.bias.tensor, LastStride::any));
    known.add(bias_memory);
  }
  ATTUNE_ASSIGN(output_memory, check_memory("output", a.output));
  known.add(output_memory);
  ATTUNE_ASSIGN(grad_output_memory, check_memory("grad_output", a.grad_output, LastStride::any));
  known.add(grad_output_memory);
  ATTUNE_ASSIGN(lse_memory, add_numbers(a, "lse", a.lse, p.forward.heads, p.lse));
  known.add(lse_memory);
  if (a.backward.grad_lse != nullptr) {
    ATTUNE_ASSIGN(grad_lse_memory,
                  add_numbers(a, "grad_lse", *a.backward.grad_lse, p.forward.heads, p.grad_lse));
    known.add(grad_lse_memory);
  }

  Alignment alignment;
  for (const TensorView* tensor : {&a.query, &a.key, &a.value, &a.output}) alignment.include(*tensor);
  const GradientViews& gradients = a.gradients;
  ATTUNE_TRY(add_gradient(a, "grad_query", gradients.query, "query", a.query, known, alignment));
  ATTUNE_TRY(add_gradient(a, "grad_key", gradients.key, "key", a.key, known, alignment));
  ATTUNE_TRY(add_gradient(a, "grad_value", gradients.value, "value", a.value, known, alignment));
  if (gradients.bias != nullptr) {
    if (!a.bias.tensor) {
      return invalid_argument(
          "grad_bias: the bias has no tensor whose gradient it could be; leave grad_bias out");
    }
    ATTUNE_TRY(add_bias_gradient(a.query, *a.bias.tensor, *gradients.bias, p));
    const TensorView view = *gradients.bias;
    ATTUNE_ASSIGN(memory, check_memory("grad_bias", view, LastStride::any));
    ATTUNE_TRY(known.add_written(memory));
  }
  ATTUNE_TRY(check_workspace(a.backward.workspace));

  const std::int64_t groups = p.forward.groups;
  p.grad_query = data_of(gradients.query);
  p.grad_key = data_of(gradients.key);
  p.grad_value = data_of(gradients.value);
  p.grad_query_strides = strides_of(gradients.query, groups);
  p.grad_key_strides = strides_of(gradients.key, axes_of(a.key).groups);
  p.grad_value_strides = strides_of(gradients.value, axes_of(a.value).groups);
  call.key_heads = head_extents(axes_of(a.key), a.query.rank, p.forward);
  call.value_heads = head_extents(axes_of(a.value), a.query.rank, p.forward);

  p.forward.output = const_cast<void*>(a.output.data);  // which backward only reads
  p.forward.output_strides = regrouped(axes_of(a.output), groups).strides;
  call.problem.output_dtype = static_cast<kernel::DType>(a.output.dtype);
  p.grad_output = a.grad_output.data;
  p.grad_output_strides = regrouped(axes_of(a.grad_output), groups).strides;
  p.grad_output_column = stride_of(a.grad_output, a.grad_output.rank - 1);
  if (a.grad_output.shape[a.grad_output.rank - 1] <= 1) p.grad_output_column = 1;

  // What the other kernels cannot read where it lies, or only by narrow accesses, delta copies.
  Alignment with_grad_output = alignment;
  with_grad_output.include(a.grad_output);
  call.copies_grad_output = a.grad_output.dtype != a.query.dtype || p.grad_output_column != 1 ||
                            with_grad_output.bytes() < alignment.bytes();
  call.problem.align_bytes = alignment.bytes();
  const bool aligned = a.query.dtype != DType::f32 && call.problem.align_bytes == 16;
  const bool shared_alike = call.key_heads == call.value_heads;  // by the same heads of the query
  const bool bias_fits =
      call.problem.bias == kernel::Bias::none || bias_boxes_fit(p.forward, call.problem.bias);
  const kernel::Sequences& sequences = p.forward.sequences;
  const bool table_fits = kernel::i64{sequences.count} * sequences.table_width < kMostTableEntries;
  const bool boxes_suit = shared_alike && aligned && bias_fits && table_fits && boxes_fit(p.forward) &&
                          output_boxes_fit(p.forward, read_grad_output_strides(call));
  call.problem.boxes = boxes_suit ? 1 : 0;
  return done();
}

}  // namespace attune::runtime
