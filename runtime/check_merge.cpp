#include "runtime/check.h"
#include "runtime/check_tensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>

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

Result<void> check_rank(const char* name, const TensorView& attn) {
  if (attn.rank >= 3 && attn.rank <= 5) return done();
  return invalid_argument(
      fmt::format("{}: rank {}, expected [B, M, H, K], [B, M, K] or [B, M, G, H, K]", name, attn.rank));
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

Result<Memory> check_output(const TensorView& output, const TensorView& first) {
  ATTUNE_TRY(check_kind("output", output));
  ATTUNE_TRY(check_rank("output", output));
  if (!same_shape(output, first)) {
    return invalid_argument(
        fmt::format("output: shape {}, expected {}, that of attn", shape_text(output), shape_text(first)));
  }
  ATTUNE_TRY(check_device("output", output, first));
  ATTUNE_ASSIGN(memory, check_memory("output", output));
  ATTUNE_TRY(check_distinct(memory));
  return memory;
}

/// "attn[3]", for messages; lives as long as the object.
struct Name {
  Name(const char* list, std::size_t index) {
    *fmt::format_to_n(text, sizeof text - 1, "{}[{}]", list, index).out = '\0';
  }
  char text[32];
};

}  // namespace

Result<MergeCall> check_merge(const MergeArguments& a) {
  if (a.attn.empty() || a.attn.size() != a.lse.size()) {
    return invalid_argument(
        fmt::format("merge_attentions: {} attention chunks and {} lse chunks, expected "
                    "equally many, at least one",
                    a.attn.size(), a.lse.size()));
  }
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
    ATTUNE_ASSIGN(memory, check_output(output, first));
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

}  // namespace attune::runtime
