// Every refusal of a merge's backward, as text, and the reduction of a good call.
#include "attune/attune.h"
#include "runtime/check.h"

#include <doctest/doctest.h>

#include <string>
#include <vector>

using namespace attune;

namespace {

constexpr int kChunks = 3;

/// Three chunks of [2, 5, 3, 8] and what they were merged to; each test spoils one thing.
struct Merge {
  alignas(64) float memory[2 * kChunks + 2][256] = {};
  alignas(64) float lse_memory[2 * kChunks + 2][64] = {};
  TensorView output{memory[0], DType::f32, {2, 5, 3, 8}};
  TensorView grad_output{memory[1], DType::f32, {2, 5, 3, 8}};
  TensorView lse{lse_memory[0], DType::f32, {2, 3, 5}};
  TensorView grad_lse{lse_memory[1], DType::f32, {2, 3, 5}};
  std::vector<TensorView> attn, attn_lse;
  std::vector<MutableTensorView> grad_attn, grad_attn_lse;

  Merge() {
    for (int i = 0; i < kChunks; ++i) {
      attn.emplace_back(TensorView(memory[2 + i], DType::f32, {2, 5, 3, 8}));
      attn_lse.emplace_back(TensorView(lse_memory[2 + i], DType::f32, {2, 3, 5}));
      grad_attn.emplace_back(MutableTensorView(memory[2 + kChunks + i], DType::f32, {2, 5, 3, 8}));
      grad_attn_lse.emplace_back(MutableTensorView(lse_memory[2 + kChunks + i], DType::f32, {2, 3, 5}));
    }
  }
  Result<runtime::GradMergeCall> run() const {
    return runtime::check_grad_merge(
        {grad_output, &grad_lse, output, lse, attn, attn_lse, grad_attn, grad_attn_lse});
  }
  std::string message() const {
    const auto call = run();
    return call.ok() ? "accepted" : call.failure().message;
  }
};

}  // namespace

TEST_CASE_FIXTURE(Merge, "the backward of a merge is reduced to its problem and parameters") {
  attn[1].strides = {8, 48, 16, 1};
  attn_lse[1] = {lse_memory[3], DType::f32, {2, 3, 7}};  // padded
  lse.strides = {1, 10, 2};
  const auto call = run();
  REQUIRE(call.ok());
  CHECK(call->problem == codegen::Problem{.operation = kernel::Operation::grad_merge, .head_dim_v = 8});
  const kernel::GradMergeParams& p = call->params;
  CHECK(p.batch == 2);
  CHECK(p.groups == 3);
  CHECK(p.heads == 1);
  CHECK(p.len == 5);
  CHECK(p.output == memory[0]);
  CHECK(p.grad_output == memory[1]);
  CHECK(p.grad_output_column == 1);
  CHECK(p.lse == lse_memory[0]);
  CHECK(p.lse_strides.group == 10);
  CHECK(p.lse_strides.seq == 2);
  CHECK(p.grad_lse == lse_memory[1]);
  REQUIRE(call->chunks.size() == kChunks);
  const kernel::GradChunk& chunk = call->chunks[1];
  CHECK(chunk.chunk.output == memory[3]);
  CHECK(chunk.chunk.output_strides.seq == 48);
  CHECK(chunk.chunk.lse_strides.batch == 21);
  CHECK(chunk.grad_output == memory[6]);
  CHECK(chunk.grad_output_strides.seq == 24);
  CHECK(chunk.grad_lse == lse_memory[6]);
}

TEST_CASE_FIXTURE(Merge,
                  "a gradient may have any strides, and its alignment counts where its columns touch") {
  grad_output.strides = {0, 0, 0, 0};
  REQUIRE(message() == "accepted");
  CHECK(run()->params.grad_output_column == 0);
  CHECK(run()->problem.align_bytes == 16);
  grad_output.strides = {1, 2, 10, 30};
  REQUIRE(message() == "accepted");
  CHECK(run()->params.grad_output_column == 30);
  CHECK(run()->problem.align_bytes == 16);
  grad_output = {memory[1] + 1, DType::f32, {2, 5, 3, 8}};
  CHECK(run()->problem.align_bytes == 4);
}

TEST_CASE_FIXTURE(Merge, "chunks of another type than what they were merged to") {
  for (auto& one : attn) one.dtype = DType::f16;
  for (auto& one : grad_attn) one.dtype = DType::f16;
  REQUIRE(message() == "accepted");
  CHECK(run()->problem.dtype == kernel::DType::f16);
  CHECK(run()->problem.output_dtype == kernel::DType::f32);
  grad_attn[1].dtype = DType::f32;
  CHECK(message() == "attn[0] is f16 but grad_attn[1] is f32: all should have the same dtype");
}

TEST_CASE_FIXTURE(Merge, "counts of chunks and of their gradients") {
  grad_attn.pop_back();
  CHECK(message() == "merge_attentions_backward: 2 gradients of attention and 3 of lse, expected 3 each");
  attn_lse.pop_back();
  CHECK(
      message() ==
      "merge_attentions_backward: 3 attention chunks and 2 lse chunks, expected equally many, at least one");
  attn.clear();
  attn_lse.clear();
  CHECK(
      message() ==
      "merge_attentions_backward: 0 attention chunks and 0 lse chunks, expected equally many, at least one");
}

TEST_CASE_FIXTURE(Merge, "what the chunks were merged to") {
  output.shape[1] = 4;
  CHECK(message() == "output: shape [2, 4, 3, 8], expected [2, 5, 3, 8], that of attn");
  output.shape[1] = 5;
  grad_output.shape[3] = 7;
  CHECK(message() == "grad_output: shape [2, 5, 3, 7], expected [2, 5, 3, 8], that of attn");
  grad_output.shape[3] = 8;
  grad_output.dtype = DType::bf16;
  CHECK(message() == "output is f32 but grad_output is bf16: both should have the same dtype");
  grad_output.dtype = DType::f32;
  grad_output.device = {DeviceType::cuda, 1};
  CHECK(message() == "attn[0] is on cpu but grad_output is on cuda:1: all should be on the same device");
  grad_output.device = {};
  lse.shape[2] = 4;
  CHECK(message() ==
        "lse: shape [2, 3, 4], expected [2, 3, 5] for attn [2, 5, 3, 8]; the last extent may be larger");
  lse.shape[2] = 5;
  grad_lse.dtype = DType::f16;
  CHECK(message() == "grad_lse is f16, expected f32");
}

TEST_CASE_FIXTURE(Merge, "chunks that differ") {
  attn[2].shape[1] = 4;
  CHECK(message() ==
        "attn[0] has shape [2, 5, 3, 8] but attn[2] has [2, 4, 3, 8]: all should have the same shape");
  attn[2].shape[1] = 5;
  attn_lse[1].dtype = DType::f16;
  CHECK(message() == "attn_lse[1] is f16, expected f32");
  attn_lse[1].dtype = DType::f32;
  for (auto& one : attn) one.shape[3] = 0;
  CHECK(message() == "merge_attentions_backward: head_dim_v must be at least 1");
}

TEST_CASE_FIXTURE(Merge, "where gradients go") {
  grad_attn[1].shape[1] = 4;
  CHECK(message() ==
        "attn[0] has shape [2, 5, 3, 8] but grad_attn[1] has [2, 4, 3, 8]: all should have the same shape");
  grad_attn[1].shape[1] = 5;
  grad_attn[1].strides[1] = 0;
  CHECK(message() == "grad_attn[1]: stride 0 on axis 1: its elements would share memory");
  grad_attn[1].strides[1] = 24;
  grad_attn_lse[2].shape[2] = 6;
  CHECK(message() == "grad_attn_lse[2]: expected float32 [2, 3, 5]");
  grad_attn_lse[2].shape[2] = 5;
  grad_attn_lse[2].strides[2] = 2;
  CHECK(message() == "grad_attn_lse[2]: must be contiguous");
}

TEST_CASE_FIXTURE(Merge, "gradients share memory with nothing") {
  void* const own = grad_attn[1].data;
  grad_attn[1].data = memory[0];
  CHECK(message() == "grad_attn[1]: shares memory with output; give it memory of its own");
  grad_attn[1].data = memory[1] + 3;
  CHECK(message() == "grad_attn[1]: shares memory with grad_output; give it memory of its own");
  grad_attn[1].data = memory[4];
  CHECK(message() == "grad_attn[1]: shares memory with attn[2]; give it memory of its own");
  grad_attn[1].data = grad_attn[2].data;
  CHECK(message() == "grad_attn[2]: shares memory with grad_attn[1]; give it memory of its own");
  grad_attn[1].data = own;
  grad_attn_lse[0].data = lse_memory[0];
  CHECK(message() == "grad_attn_lse[0]: shares memory with lse; give it memory of its own");
  grad_attn_lse[0].data = lse_memory[1];
  CHECK(message() == "grad_attn_lse[0]: shares memory with grad_lse; give it memory of its own");
  grad_attn_lse[0].data = lse_memory[3];
  CHECK(message() == "grad_attn_lse[0]: shares memory with attn_lse[1]; give it memory of its own");
}

TEST_CASE_FIXTURE(Merge, "interleaved gradients of one allocation share nothing") {
  std::vector<float> rows(std::size_t{kChunks} * 240);
  for (int i = 0; i < kChunks; ++i) {
    grad_attn[i].data = rows.data() + i * 8;
    grad_attn[i].strides = {360, 72, 24, 1};  // [2, 5, 3, chunks, 8]
  }
  CHECK(message() == "accepted");
  grad_attn[1].data = rows.data() + 7;
  CHECK(message() == "grad_attn[1]: shares memory with grad_attn[0]; give it memory of its own");
}
