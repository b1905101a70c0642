#include "runtime/check.h"
#include "runtime/check_tensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <deque>
#include <utility>
#include <vector>

namespace attune::runtime {
namespace {

using kernel::i32;

/// [B, H, M], or [B, G, H, M] where attn has groups: `len` may exceed M.
bool lse_fits(const TensorView& lse, const TensorView& attn) {
  const Axes axes = axes_of(attn);
  if (attn.rank == 5) {
    return lse.rank == 4 && lse.shape[0] == axes.batch && lse.shape[1] == axes.groups &&
           lse.shape[2] == axes.heads && lse.shape[3] >= axes.len;
  }
  return lse.rank == 3 && lse.shape[0] == axes.batch && lse.shape[1] == axes.groups &&
         lse.shape[2] >= axes.len;
}

kernel::Strides lse_strides(const TensorView& lse) {
  return {.batch = stride_of(lse, 0),
          .seq = stride_of(lse, lse.rank - 1),
          .group = stride_of(lse, 1),
          .head = lse.rank == 4 ? stride_of(lse, 2) : 0};
}

bool same_shape(const TensorView& a, const TensorView& b) {
  return a.rank == b.rank && std::equal(a.shape.begin(), a.shape.begin() + a.rank, b.shape.begin());
}

Result<void> check_device(const char* name, const TensorView& tensor, const TensorView& first) {
  if (tensor.device == first.device) return done();
  return invalid_argument(fmt::format("attn[0] is on {} but {} is on {}: all should be on the same device",
                                      text_of(first.device), name, text_of(tensor.device)));
}

Result<Memory> check_attn(const char* name, const TensorView& attn, const TensorView& first) {
  ATTUNE_TRY(check_kind(name, attn));
  ATTUNE_TRY(check_rank(name, attn));
  if (!same_shape(attn, first)) {
    return invalid_argument(fmt::format("attn[0] has shape {} but {} has {}: all should have the same shape",
                                        shape_text(first), name, shape_text(attn)));
  }
  if (attn.dtype != first.dtype) {
    return invalid_argument(fmt::format("attn[0] is {} but {} is {}: all should have the same dtype",
                                        text_of(first.dtype), name, text_of(attn.dtype)));
  }
  ATTUNE_TRY(check_device(name, attn, first));
  return check_memory(name, attn);
}

Result<Memory> check_chunk_lse(const char* name, const TensorView& lse, const TensorView& attn) {
  if (lse.dtype != DType::f32) {
    return invalid_argument(fmt::format("{} is {}, expected f32", name, text_of(lse.dtype)));
  }
  if (!lse_fits(lse, attn)) {
    return invalid_argument(fmt::format(
        "{}: {}, expected {} for attn {}; the last extent may be larger", name,
        lse.rank >= 0 && lse.rank <= kMaxRank ? "shape " + shape_text(lse) : fmt::format("rank {}", lse.rank),
        shape_text(lse_like(attn)), shape_text(attn)));
  }
  ATTUNE_TRY(check_device(name, lse, attn));
  return check_memory(name, lse, LastStride::any);
}

/// What chunks are merged to, or its gradient; of any type.
Result<Memory> check_merged(const char* name, const TensorView& merged, const TensorView& first,
                            LastStride last = LastStride::one) {
  ATTUNE_TRY(check_kind(name, merged));
  ATTUNE_TRY(check_rank(name, merged));
  if (!same_shape(merged, first)) {
    return invalid_argument(
        fmt::format("{}: shape {}, expected {}, that of attn", name, shape_text(merged), shape_text(first)));
  }
  ATTUNE_TRY(check_device(name, merged, first));
  return check_memory(name, merged, last);
}

/// "attn[3]", for messages; lives as long as the object.
struct Name {
  Name(const char* list, std::size_t index) {
    *fmt::format_to_n(text, sizeof text - 1, "{}[{}]", list, index).out = '\0';
  }
  char text[32];
};

Result<void> check_counts(const char* function, std::size_t attn, std::size_t lse) {
  if (attn > 0 && attn == lse) return done();
  return invalid_argument(fmt::format(
      "{}: {} attention chunks and {} lse chunks, expected equally many, at least one", function, attn, lse));
}

// ---- Gradients ----

/// Everything that a call reads and writes. There may be thousands of chunks, so tensors are compared with
/// those alone that begin before they end.
class Touched {
 public:
  void add_read(const Memory& memory) { all_.push_back({memory, false}); }
  void add_written(const Memory& memory) { all_.push_back({memory, true}); }

  /// Refuses what is written where something else is.
  Result<void> check_all_apart() {
    std::ranges::stable_sort(all_, {}, [](const One& one) { return one.memory.begin; });
    for (auto one = all_.begin(); one != all_.end(); ++one) {
      for (auto next = one + 1; next != all_.end() && next->memory.begin < one->memory.end; ++next) {
        if (next->written) {
          ATTUNE_TRY(check_apart(next->memory, {&one->memory}));
        } else if (one->written) {
          ATTUNE_TRY(check_apart(one->memory, {&next->memory}));
        }
      }
    }
    return done();
  }

 private:
  struct One {
    Memory memory;
    bool written;
  };
  std::vector<One> all_;
};

class GradMergeCheck {
 public:
  explicit GradMergeCheck(const GradMergeArguments& arguments)
      : a_(arguments),
        first_(arguments.attn[0]),
        grad_attn_(arguments.grad_attn.begin(), arguments.grad_attn.end()),
        grad_attn_lse_(arguments.grad_attn_lse.begin(), arguments.grad_attn_lse.end()) {}

  Result<GradMergeCall> run() {
    ATTUNE_TRY(check_attn("attn[0]", first_, first_));
    ATTUNE_TRY(add_merged());
    call_.chunks.resize(a_.attn.size());
    for (std::size_t i = 0; i < a_.attn.size(); ++i) {
      ATTUNE_TRY(add_chunk(i));
      if (a_.with_gradients) ATTUNE_TRY(add_gradient(i));
    }
    ATTUNE_TRY(touched_.check_all_apart());
    call_.problem = {.operation = kernel::Operation::grad_merge,
                     .dtype = static_cast<kernel::DType>(first_.dtype),
                     .output_dtype = static_cast<kernel::DType>(a_.output.dtype),
                     .head_dim_v = static_cast<int>(axes_of(first_).dim),
                     .align_bytes = alignment_.bytes()};
    call_.device = first_.device;
    call_.stream = a_.stream;
    return std::move(call_);
  }

 private:
  Result<void> add_merged() {
    const Axes axes = axes_of(first_);
    if (axes.dim == 0) return invalid_argument("merge_attentions_backward: head_dim_v must be at least 1");
    kernel::GradMergeParams& p = call_.params;
    p.batch = static_cast<i32>(axes.batch);
    p.groups = static_cast<i32>(axes.groups);
    p.heads = static_cast<i32>(axes.heads);
    p.len = static_cast<i32>(axes.len);

    ATTUNE_ASSIGN(output, check_merged("output", a_.output, first_));
    touched_.add_read(output);
    alignment_.include(a_.output);
    p.output = a_.output.data;
    p.output_strides = axes_of(a_.output).strides;

    ATTUNE_ASSIGN(grad_output, check_merged("grad_output", a_.grad_output, first_, LastStride::any));
    if (a_.grad_output.dtype != a_.output.dtype) {
      return invalid_argument(
          fmt::format("output is {} but grad_output is {}: both should have the same dtype",
                      text_of(a_.output.dtype), text_of(a_.grad_output.dtype)));
    }
    touched_.add_read(grad_output);
    p.grad_output = a_.grad_output.data;
    p.grad_output_strides = axes_of(a_.grad_output).strides;
    if (axes.dim > 1) p.grad_output_column = stride_of(a_.grad_output, a_.grad_output.rank - 1);
    if (p.grad_output_column == 1) alignment_.include(a_.grad_output);  // else it is read one by one

    ATTUNE_TRY(add_lse("lse", a_.lse, p.lse, p.lse_strides));
    if (a_.grad_lse != nullptr) {
      ATTUNE_TRY(add_lse("grad_lse", *a_.grad_lse, p.grad_lse, p.grad_lse_strides));
    }
    return done();
  }

  Result<void> add_lse(const char* name, const TensorView& lse, const float*& data,
                       kernel::Strides& strides) {
    ATTUNE_ASSIGN(memory, check_chunk_lse(name, lse, first_));
    touched_.add_read(memory);
    data = static_cast<const float*>(lse.data);
    strides = lse_strides(lse);
    return done();
  }

  Result<void> add_chunk(std::size_t i) {
    kernel::Chunk& chunk = call_.chunks[i].chunk;
    ATTUNE_ASSIGN(attn, check_attn(name("attn", i), a_.attn[i], first_));
    touched_.add_read(attn);
    alignment_.include(a_.attn[i]);
    chunk.output = a_.attn[i].data;
    chunk.output_strides = axes_of(a_.attn[i]).strides;
    return add_lse(name("attn_lse", i), a_.attn_lse[i], chunk.lse, chunk.lse_strides);
  }

  Result<void> add_gradient(std::size_t i) {
    kernel::GradChunk& chunk = call_.chunks[i];
    ATTUNE_ASSIGN(attn, check_attn(name("grad_attn", i), grad_attn_[i], first_));
    ATTUNE_TRY(check_distinct(attn));
    touched_.add_written(attn);
    alignment_.include(grad_attn_[i]);
    chunk.grad_output = a_.grad_attn[i].data;
    chunk.grad_output_strides = axes_of(grad_attn_[i]).strides;
    ATTUNE_ASSIGN(lse, check_lse(name("grad_attn_lse", i), grad_attn_lse_[i], lse_like(first_)));
    touched_.add_written(lse);
    chunk.grad_lse = static_cast<float*>(a_.grad_attn_lse[i].data);
    return done();
  }

  const char* name(const char* list, std::size_t index) { return names_.emplace_back(list, index).text; }

  const GradMergeArguments& a_;
  const TensorView& first_;
  const std::vector<TensorView> grad_attn_, grad_attn_lse_;
  std::deque<Name> names_;  // what `touched_` calls them
  Touched touched_;
  Alignment alignment_;
  GradMergeCall call_;
};

}  // namespace

Result<MergeCall> check_merge(const MergeArguments& a) {
  ATTUNE_TRY(check_counts("merge_attentions", a.attn.size(), a.lse.size()));
  const TensorView& first = a.attn[0];
  ATTUNE_TRY(check_attn("attn[0]", first, first));
  const Axes axes = axes_of(first);
  if (axes.dim == 0) return invalid_argument("merge_attentions: head_dim_v must be at least 1");

  MergeCall call;
  call.device = first.device;
  call.stream = a.stream;
  kernel::MergeParams& params = call.params;
  params.batch = static_cast<i32>(axes.batch);
  params.groups = static_cast<i32>(axes.groups);
  params.heads = static_cast<i32>(axes.heads);
  params.len = static_cast<i32>(axes.len);
  params.chunks = static_cast<i32>(a.attn.size());

  Alignment alignment;
  TensorView output, lse_out;
  Memory output_memory, lse_out_memory;
  if (a.output != nullptr) {
    output = *a.output;
    ATTUNE_ASSIGN(memory, check_merged("output", output, first));
    ATTUNE_TRY(check_distinct(memory));
    output_memory = memory;
    params.output = a.output->data;
    params.output_strides = axes_of(output).strides;
    alignment.include(output);
  }
  if (a.lse_out != nullptr) {
    lse_out = *a.lse_out;
    ATTUNE_ASSIGN(memory, check_lse("lse_out", lse_out, lse_like(first)));
    lse_out_memory = memory;
    ATTUNE_TRY(check_apart(lse_out_memory, {&output_memory}));
    params.lse = static_cast<float*>(a.lse_out->data);
  }
  for (std::size_t i = 0; i < a.attn.size(); ++i) {
    const Name attn_name("attn", i);
    const Name lse_name("lse", i);
    ATTUNE_ASSIGN(attn, check_attn(attn_name.text, a.attn[i], first));
    ATTUNE_ASSIGN(lse, check_chunk_lse(lse_name.text, a.lse[i], first));
    ATTUNE_TRY(check_apart(output_memory, {&attn, &lse}));
    ATTUNE_TRY(check_apart(lse_out_memory, {&attn, &lse}));
    alignment.include(a.attn[i]);
    if (i >= kernel::kMaxChunks) continue;
    params.chunk[i] = {.output = a.attn[i].data,
                       .lse = static_cast<const float*>(a.lse[i].data),
                       .output_strides = axes_of(a.attn[i]).strides,
                       .lse_strides = lse_strides(a.lse[i])};
  }
  call.problem = {.operation = kernel::Operation::merge,
                  .dtype = static_cast<kernel::DType>(first.dtype),
                  .output_dtype = static_cast<kernel::DType>((a.output != nullptr ? output : first).dtype),
                  .head_dim_v = static_cast<int>(axes.dim),
                  .lse = a.lse_out != nullptr ? kernel::Lse::write : kernel::Lse::skip,
                  .align_bytes = alignment.bytes()};
  return call;
}

Result<GradMergeCall> check_grad_merge(const GradMergeArguments& a) {
  const std::size_t chunks = a.attn.size();
  ATTUNE_TRY(check_counts("merge_attentions_backward", chunks, a.attn_lse.size()));
  if (a.with_gradients && (a.grad_attn.size() != chunks || a.grad_attn_lse.size() != chunks)) {
    return invalid_argument(
        fmt::format("merge_attentions_backward: {} gradients of attention and {} of lse, expected {} each",
                    a.grad_attn.size(), a.grad_attn_lse.size(), chunks));
  }
  return GradMergeCheck(a).run();
}

}  // namespace attune::runtime
