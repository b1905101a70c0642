// Every refusal of a backward call's arguments, as text; the reduction of a good call, and what it launches.
#include "attune/attune.h"
#include "attune/backward.h"
#include "runtime/check.h"

#include <doctest/doctest.h>

#include <cstring>
#include <limits>
#include <string>
#include <vector>

using namespace attune;
using kernel::Operation;
using runtime::BackwardPlan;

namespace {

/// A good call on small CPU tensors: five queries, seven keys, two batch entries, three heads; each test
/// spoils one thing.
struct Fixture {
  alignas(256) float memory[12][1024] = {};
  TensorView query{memory[0], DType::f32, {2, 5, 3, 8}};
  TensorView key{memory[1], DType::f32, {2, 7, 3, 8}};
  TensorView value{memory[2], DType::f32, {2, 7, 3, 4}};
  TensorView output{memory[3], DType::f32, {2, 5, 3, 4}};
  TensorView grad_output{memory[4], DType::f32, {2, 5, 3, 4}};
  TensorView lse{memory[5], DType::f32, {2, 3, 5}};
  MutableTensorView grad_query{memory[6], DType::f32, {2, 5, 3, 8}};
  MutableTensorView grad_key{memory[7], DType::f32, {2, 7, 3, 8}};
  MutableTensorView grad_value{memory[8], DType::f32, {2, 7, 3, 4}};
  MutableTensorView grad_bias{memory[9], DType::f32, {2, 5, 7}};
  TensorView bias_tensor{memory[10], DType::f32, {2, 5, 7}};
  TensorView grad_lse{memory[11], DType::f32, {2, 3, 5}};
  GradientViews gradients{&grad_query, &grad_key, &grad_value, nullptr};
  AttentionBias bias;
  AttentionOptions options;
  BackwardOptions backward;

  Result<runtime::BackwardCall> run() const {
    return runtime::check_backward({grad_output, output, lse, query, key, value, gradients, bias, options,
                                    backward,
                                    /*runs=*/true});
  }
  std::string message() const {
    const auto call = run();
    return call.ok() ? "accepted" : call.failure().message;
  }
  ErrorKind kind() const { return run().failure().kind; }
  BackwardPlan plan(const char* arch = "x86-64-v4") const {
    const auto call = run();
    REQUIRE_MESSAGE(call.ok(), call.failure().message);
    BackwardPlan made;
    REQUIRE(plan_of(*call, *codegen::arch_from_name(arch), made).ok());
    return made;
  }
  std::vector<Operation> operations(const char* arch = "x86-64-v4") const {
    std::vector<Operation> result;
    for (const auto& step : plan(arch)) result.push_back(step.problem.operation);
    return result;
  }

  void use_bias(TensorView tensor) {
    bias_tensor = tensor;
    bias = AttentionBias(bias_tensor);
    grad_bias = {};
    grad_bias.data = memory[9];
    grad_bias.dtype = tensor.dtype;
    grad_bias.rank = tensor.rank;
    grad_bias.shape = tensor.shape;
    grad_bias.strides = tensor.strides;
    gradients.bias = &grad_bias;
  }
  /// Two sequences of 2 and 3 queries, of 3 and 4 keys.
  void use_sequences() {
    query = {memory[0], DType::f32, {1, 5, 3, 8}};
    key = {memory[1], DType::f32, {1, 7, 3, 8}};
    value = {memory[2], DType::f32, {1, 7, 3, 4}};
    output = {memory[3], DType::f32, {1, 5, 3, 4}};
    grad_output = {memory[4], DType::f32, {1, 5, 3, 4}};
    lse = {memory[5], DType::f32, {1, 3, 5}};
    grad_query = {memory[6], DType::f32, {1, 5, 3, 8}};
    grad_key = {memory[7], DType::f32, {1, 7, 3, 8}};
    grad_value = {memory[8], DType::f32, {1, 7, 3, 4}};
    bias = BlockDiagonalMask::from_seqlens({2, 3}, {3, 4});
  }
};

}  // namespace

// ---- Reduction ----

TEST_CASE_FIXTURE(Fixture, "a good backward call keeps the forward's parameters and adds its own") {
  backward.grad_lse = &grad_lse;
  options.scale = 0.5;
  const auto call = run();
  REQUIRE(call.ok());
  const kernel::BackwardParams& p = call->params;
  CHECK(p.forward.scale == 0.5f);
  CHECK(p.forward.len_q == 5);
  CHECK(p.forward.output == memory[3]);
  CHECK(p.forward.output_strides.seq == 12);
  CHECK(p.grad_output == memory[4]);
  CHECK(p.grad_output_column == 1);
  CHECK(p.lse.data == memory[5]);
  CHECK(p.lse.strides.batch == 15);
  CHECK(p.lse.strides.group == 5);
  CHECK(p.lse.strides.seq == 1);
  CHECK(p.lse.length == 5);
  CHECK(p.grad_lse.data == memory[11]);
  CHECK(p.grad_key == memory[7]);
  CHECK(p.grad_key_strides.seq == 24);
  CHECK(call->key_heads == runtime::HeadExtents{3, 1});
  CHECK_FALSE(call->copies_grad_output);
}

TEST_CASE_FIXTURE(Fixture, "a gradient of any strides is copied by delta where the others cannot read it") {
  const auto copies = [&] { return run()->copies_grad_output; };
  grad_output.strides = {0, 0, 0, 0};  // an expanded scalar
  CHECK(copies());
  CHECK(run()->params.grad_output_column == 0);
  grad_output.strides = {60, 12, 1, 3};  // heads last in memory
  CHECK(copies());
  grad_output.strides = {60, 12, 4, 1};
  CHECK_FALSE(copies());
  grad_output.data = memory[4] + 1;  // less aligned than the others
  CHECK(copies());
  query.dtype = key.dtype = value.dtype = grad_query.dtype = grad_key.dtype = grad_value.dtype = DType::bf16;
  grad_output.data = memory[4];
  CHECK(copies());  // another type
  CHECK(run()->problem.dtype == kernel::DType::bf16);
  CHECK(run()->problem.output_dtype == kernel::DType::f32);
}

TEST_CASE_FIXTURE(Fixture, "an lse may be longer than the queries, and padded where there are sequences") {
  lse = {memory[5], DType::f32, {2, 3, 32}};
  CHECK(run()->params.lse.strides.batch == 96);
  CHECK(run()->params.lse.length == 32);
  use_sequences();
  CHECK(run()->params.lse.per_sequence == 0);
  lse = {memory[5], DType::f32, {1, 3, 8}};
  CHECK(run()->params.lse.per_sequence == 0);
  lse = {memory[5], DType::f32, {2, 3, 3}};
  CHECK(run()->params.lse.per_sequence == 1);
  lse = {memory[5], DType::f32, {2, 3, 32}};
  CHECK(run()->params.lse.per_sequence == 1);
}

TEST_CASE_FIXTURE(Fixture, "an lse's heads are grouped as the query's are") {
  query = {memory[0], DType::f32, {2, 5, 6, 8}};
  output = {memory[3], DType::f32, {2, 5, 6, 4}};
  grad_output = {memory[4], DType::f32, {2, 5, 6, 4}};
  grad_query = {memory[6], DType::f32, {2, 5, 6, 8}};
  lse = {memory[5], DType::f32, {2, 6, 5}};
  const kernel::BackwardParams p = run()->params;
  CHECK(p.forward.heads == 2);
  CHECK(p.lse.strides.group == 10);
  CHECK(p.lse.strides.head == 5);
  CHECK(p.grad_query_strides.group == 16);
  CHECK(p.grad_query_strides.head == 8);
  CHECK(p.grad_key_strides.group == 8);
}

TEST_CASE_FIXTURE(Fixture, "heads that key or value serve are those that their gradients sum over") {
  query = {memory[0], DType::f32, {1, 5, 3, 2, 8}};
  key = {memory[1], DType::f32, {1, 7, 3, 1, 8}};
  value = {memory[2], DType::f32, {1, 7, 1, 2, 4}};
  output = {memory[3], DType::f32, {1, 5, 3, 2, 4}};
  grad_output = {memory[4], DType::f32, {1, 5, 3, 2, 4}};
  lse = {memory[5], DType::f32, {1, 3, 2, 5}};
  grad_query = {memory[6], DType::f32, {1, 5, 3, 2, 8}};
  grad_key = {memory[7], DType::f32, {1, 7, 3, 1, 8}};
  grad_value = {memory[8], DType::f32, {1, 7, 1, 2, 4}};
  const auto call = run();
  REQUIRE(call.ok());
  CHECK(call->key_heads == runtime::HeadExtents{3, 1});
  CHECK(call->value_heads == runtime::HeadExtents{1, 2});
  const BackwardPlan steps = plan();
  REQUIRE(steps.count == 4);  // key and value apart
  CHECK(steps.steps[1].params.grad_key == memory[7]);
  CHECK(steps.steps[1].params.grad_value == nullptr);
  CHECK(steps.steps[1].params.key_groups == 3);
  CHECK(steps.steps[2].params.grad_key == nullptr);
  CHECK(steps.steps[2].params.grad_value == memory[8]);
  CHECK(steps.steps[2].params.key_heads == 2);
}

TEST_CASE_FIXTURE(Fixture, "of two launches for key and value one adds up the query's gradient") {
  query = {memory[0], DType::bf16, {1, 5, 3, 2, 8}};
  key = {memory[1], DType::bf16, {1, 7, 3, 1, 8}};
  value = {memory[2], DType::bf16, {1, 7, 1, 2, 8}};
  output = {memory[3], DType::bf16, {1, 5, 3, 2, 8}};
  grad_output = {memory[4], DType::bf16, {1, 5, 3, 2, 8}};
  lse = {memory[5], DType::f32, {1, 3, 2, 5}};
  grad_query = {memory[6], DType::bf16, {1, 5, 3, 2, 8}};
  grad_key = {memory[7], DType::bf16, {1, 7, 3, 1, 8}};
  grad_value = {memory[8], DType::bf16, {1, 7, 1, 2, 8}};
  backward.workspace = memory[9];
  CHECK(operations("sm_90a") == std::vector{Operation::delta, Operation::grad_key_value,
                                            Operation::grad_key_value, Operation::round_query});
  const BackwardPlan steps = plan("sm_90a");
  CHECK(steps.steps[1].problem == steps.steps[2].problem);  // one kernel
  CHECK(steps.steps[1].problem.boxes == 0);
  CHECK(steps.steps[1].params.query_sums != nullptr);
  CHECK(steps.steps[2].params.query_sums == nullptr);
  gradients.key = nullptr;
  CHECK(plan("sm_90a").steps[1].params.query_sums != nullptr);
}

TEST_CASE_FIXTURE(
    Fixture,
    "in deterministic mode tiles of keys take turns where the family can, and owners compute elsewhere") {
  query = {memory[0], DType::bf16, {1, 5, 3, 8}};
  key = {memory[1], DType::bf16, {1, 7, 3, 8}};
  value = {memory[2], DType::bf16, {1, 7, 3, 8}};
  output = {memory[3], DType::bf16, {1, 5, 3, 8}};
  grad_output = {memory[4], DType::bf16, {1, 5, 3, 8}};
  lse = {memory[5], DType::f32, {1, 3, 5}};
  grad_query = {memory[6], DType::bf16, {1, 5, 3, 8}};
  grad_key = {memory[7], DType::bf16, {1, 7, 3, 8}};
  grad_value = {memory[8], DType::bf16, {1, 7, 3, 8}};
  backward.workspace = memory[9];
  CHECK(plan("sm_90a").steps[1].params.turns == nullptr);
  backward.deterministic = true;
  for (const char* arch : {"sm_90a", "sm_80"}) {
    const bool turns = std::strcmp(arch, "sm_90a") == 0;
    const BackwardPlan steps = plan(arch);
    CHECK(steps.steps[1].problem.query_gradient ==
          (turns ? kernel::QueryGradient::ordered : kernel::QueryGradient::apart));
    CHECK((steps.steps[0].params.turns != nullptr) == turns);  // delta clears them
    CHECK(steps.steps[1].params.turns == steps.steps[0].params.turns);
    CHECK(steps.steps[2].problem.operation == (turns ? Operation::round_query : Operation::grad_query));
  }
}

TEST_CASE_FIXTURE(Fixture, "a bias's gradient is summed over the axes where its extent is 1") {
  use_bias({memory[10], DType::f16, {2, 3, 5, 7}});
  kernel::BackwardParams p = run()->params;
  CHECK(p.bias_batch == 2);
  CHECK(p.bias_groups == 3);
  CHECK(p.bias_heads == 1);
  CHECK(p.bias_rows == 5);
  CHECK(p.grad_bias_strides.group == 35);
  use_bias({memory[10], DType::f32, {1, 1, 7}});
  p = run()->params;
  CHECK(p.bias_batch == 1);
  CHECK(p.bias_groups == 1);
  CHECK(p.bias_rows == 1);
}

// ---- Launches ----

TEST_CASE_FIXTURE(Fixture, "only wanted gradients are computed") {
  CHECK(operations() == std::vector{Operation::delta, Operation::grad_key_value, Operation::grad_query});
  gradients.query = nullptr;
  CHECK(operations() == std::vector{Operation::delta, Operation::grad_key_value});
  gradients.key = nullptr;
  CHECK(operations() == std::vector{Operation::delta, Operation::grad_key_value});
  gradients.value = nullptr;
  CHECK(operations() == std::vector{Operation::delta});
  use_bias({memory[10], DType::f32, {2, 5, 7}});
  CHECK(operations() == std::vector{Operation::delta, Operation::grad_bias});
  gradients.query = &grad_query;
  CHECK(operations() == std::vector{Operation::delta, Operation::grad_query, Operation::grad_bias});
}

TEST_CASE_FIXTURE(Fixture, "a workspace holds two numbers of each query, and a copied gradient") {
  BackwardPlan steps = plan();
  CHECK(steps.workspace_bytes == 2 * 256);  // 2 * 3 * 5 floats each, rounded up
  CHECK(steps.steps[0].params.lse2 == nullptr);
  backward.workspace = memory[9];
  steps = plan();
  for (const auto& step : steps) {
    CHECK(step.params.lse2 == memory[9]);
    CHECK(step.params.delta == memory[9] + 64);
    CHECK(step.params.grad_output == memory[4]);
  }
  grad_output.strides = {0, 0, 0, 0};
  steps = plan();
  CHECK(steps.workspace_bytes == 2 * 256 + 512);  // 120 floats
  CHECK(steps.steps[0].params.grad_output == memory[4]);
  CHECK(steps.steps[0].params.grad_output_copy == memory[9] + 128);
  CHECK(steps.steps[1].params.grad_output == memory[9] + 128);
  CHECK(steps.steps[1].params.grad_output_strides.seq == 12);
}

TEST_CASE_FIXTURE(Fixture, "what forward alone looks at is not in a gradient kernel's problem") {
  use_bias({memory[10], DType::f32, {2, 5, 7}});
  bias.window.right = 0;
  options.p = 0.5;
  const BackwardPlan steps = plan();
  const codegen::Problem& delta = steps.steps[0].problem;
  CHECK(delta.bias == kernel::Bias::none);
  CHECK(delta.dropout == kernel::Dropout::off);
  CHECK(delta.window_right == kernel::Edge::open);
  for (std::size_t i = 1; i < steps.count; ++i) {
    CHECK(steps.steps[i].problem.bias == kernel::Bias::f32);
    CHECK(steps.steps[i].problem.dropout == kernel::Dropout::on);
    CHECK(steps.steps[i].problem.window_right == kernel::Edge::bounded);
    CHECK(steps.steps[i].problem.lse == kernel::Lse::skip);
  }
}

TEST_CASE_FIXTURE(Fixture, "Hopper's copy engine feeds grad_key_value wherever the tensors suit it") {
  query = {memory[0], DType::bf16, {2, 5, 3, 8}};
  key = {memory[1], DType::bf16, {2, 7, 3, 8}};
  value = {memory[2], DType::bf16, {2, 7, 3, 8}};
  output = {memory[3], DType::bf16, {2, 5, 3, 8}};
  grad_output = {memory[4], DType::bf16, {2, 5, 3, 8}};
  grad_query = {memory[6], DType::bf16, {2, 5, 3, 8}};
  grad_key = {memory[7], DType::bf16, {2, 7, 3, 8}};
  grad_value = {memory[8], DType::bf16, {2, 7, 3, 8}};
  const auto boxes = [&] {
    const BackwardPlan steps = plan("sm_90a");
    for (const auto& step : steps) {
      const bool may_have = step.problem.operation == Operation::grad_key_value ||
                            step.problem.operation == Operation::grad_bias;
      CHECK((may_have || step.problem.boxes == 0));
    }
    return steps.steps[1].problem.boxes;
  };
  CHECK(boxes() == 1);
  CHECK(operations("sm_90a").back() == Operation::round_query);
  grad_output.strides = {0, 0, 0, 0};  // copied
  CHECK(boxes() == 1);
  grad_output = {memory[4], DType::bf16, {2, 5, 3, 8}};
  grad_output.strides[2] = 0;  // read where it lies
  CHECK(boxes() == 0);
}

// ---- Refusals ----

TEST_CASE_FIXTURE(Fixture, "the forward's refusals are the backward's") {
  options.p = 1.5;
  CHECK(message() == "Invalid dropout probability: p=1.5, expected 0 to 1");
  options.p = 0;
  key.shape[3] = 7;
  CHECK(message().find("incompatible shapes: query [2, 5, 3, 8], key [2, 7, 3, 7]") == 0);
}

TEST_CASE_FIXTURE(Fixture, "an output that is not of these inputs") {
  output.shape[1] = 4;
  CHECK(message() ==
        "output: shape [2, 4, 3, 4], expected [2, 5, 3, 4], which attention of query [2, 5, 3, 8] and value "
        "[2, "
        "7, 3, 4] has: pass what forward returned");
  CHECK(kind() == ErrorKind::invalid_argument);
  output.shape[1] = 5;
  output.rank = 3;
  CHECK(message() == "query and output differ in rank (4 and 3): all should be BMHK, all BMK or all BMGHK");
}

TEST_CASE_FIXTURE(Fixture, "a gradient of another shape or type than the output") {
  grad_output.shape[3] = 3;
  CHECK(message() == "grad_output: shape [2, 5, 3, 3], expected [2, 5, 3, 4] as output");
  grad_output.shape[3] = 4;
  grad_output.dtype = DType::f16;
  CHECK(message() == "grad_output: is f16, expected f32 as output");
  grad_output.dtype = DType::boolean;
  CHECK(message() == "grad_output: dtype boolean, expected f32, f16 or bf16");
  grad_output.dtype = DType::f32;
  grad_output.data = nullptr;
  CHECK(message() == "grad_output: null data pointer");
}

TEST_CASE_FIXTURE(Fixture, "an lse of the wrong length, layout or type") {
  lse.shape[2] = 4;
  CHECK(message() == "lse: f32 [2, 3, 4], expected float32 [2, 3, at least 5]");
  lse = {memory[5], DType::f32, {2, 5, 3}};
  CHECK(message() == "lse: f32 [2, 5, 3], expected float32 [2, 3, at least 5]");
  lse = {memory[5], DType::f16, {2, 3, 5}};
  CHECK(message() == "lse: f16 [2, 3, 5], expected float32 [2, 3, at least 5]");
  lse = {memory[5], DType::f32, {2, 3, 5}, {DeviceType::cuda, 0}};
  CHECK(message() == "lse: is on cuda:0, expected cpu, the device of the inputs");
  lse = {memory[5], DType::f32, {6, 5}};
  CHECK(message() == "lse: f32 [6, 5], expected float32 [2, 3, at least 5]");
  lse.rank = 9;
  CHECK(message() == "lse: f32 of rank 9, expected float32 [2, 3, at least 5]");
  use_sequences();
  lse = {memory[5], DType::f32, {2, 3, 2}};
  CHECK(message() ==
        "lse: f32 [2, 3, 2], expected float32 [1, 3, at least 5] or, padded, [2, 3, at least 3]");
  use_sequences();
  backward.grad_lse = &grad_lse;
  grad_lse.shape[2] = 2;
  CHECK(message() ==
        "grad_lse: f32 [2, 3, 2], expected float32 [1, 3, at least 5] or, padded, [2, 3, at least 3]");
}

TEST_CASE_FIXTURE(Fixture, "a result that does not fit its tensor") {
  grad_query.shape[1] = 4;
  CHECK(message() == "grad_query: shape [2, 4, 3, 8], expected [2, 5, 3, 8] as query");
  grad_query.shape[1] = 5;
  grad_key.dtype = DType::bf16;
  CHECK(message() == "grad_key: is bf16, expected f32 as key");
  grad_key.dtype = DType::f32;
  grad_value.strides[1] = 0;
  CHECK(message() == "grad_value: stride 0 on axis 1: its elements would share memory");
  grad_value.strides[1] = 12;
  grad_value.strides[3] = 2;
  CHECK(message() ==
        "grad_value: the last axis has stride 2, expected 1; make a contiguous copy of the tensor");
  grad_value.strides[3] = 1;
  grad_value.device = {DeviceType::cuda, 0};
  CHECK(message() == "query is on cpu but grad_value is on cuda:0: all should be on the same device");
}

TEST_CASE_FIXTURE(Fixture, "results share memory with nothing") {
  const struct {
    MutableTensorView& written;
    const char* name;
  } results[] = {{grad_query, "grad_query"}, {grad_key, "grad_key"}, {grad_value, "grad_value"}};
  for (const auto& [written, name] : results) {
    void* const own = written.data;
    for (const TensorView* read : {&query, &key, &value, &output, &grad_output, &lse}) {
      written.data = const_cast<void*>(read->data);
      CHECK(message().find(std::string(name) + ": shares memory with ") == 0);
    }
    written.data = own;
  }
  grad_key.data = grad_query.data;
  CHECK(message() == "grad_key: shares memory with grad_query; give it memory of its own");
}

TEST_CASE_FIXTURE(Fixture, "a bias gradient needs an additive tensor of its shape and type") {
  gradients.bias = &grad_bias;
  CHECK(message() == "grad_bias: the bias has no tensor whose gradient it could be; leave grad_bias out");
  use_bias({memory[10], DType::f32, {2, 5, 7}});
  CHECK(message() == "accepted");
  grad_bias.shape[0] = 1;
  CHECK(message() == "grad_bias: shape [1, 5, 7], expected [2, 5, 7] as attn_bias");
  grad_bias.shape[0] = 3;
  grad_bias.dtype = DType::f16;
  CHECK(message() == "grad_bias: is f16 on cpu, expected f32 on cpu as attn_bias");
  use_bias({memory[10], DType::boolean, {2, 5, 7}});
  CHECK(message() == "grad_bias: attn_bias is boolean, which has no gradient; leave grad_bias out");
  use_bias({memory[10], DType::f32, {2, 5, 7}});
  grad_bias.strides[0] = 0;
  CHECK(message() == "grad_bias: stride 0 on axis 0: its elements would share memory");
}

TEST_CASE_FIXTURE(Fixture, "a workspace is aligned") {
  backward.workspace = memory[9] + 1;
  CHECK(message() == "workspace: its address should be a multiple of 256");
}

TEST_CASE_FIXTURE(Fixture, "a workspace that no memory could hold") {
  const auto huge = std::int64_t{1} << 29;
  for (TensorView* tensor : {&query, &output, &grad_output}) {
    tensor->shape[0] = tensor->shape[1] = tensor->shape[2] = huge;
    tensor->strides = {0, 0, 0, 1};
  }
  for (TensorView* tensor : {&key, &value}) {
    tensor->shape[0] = tensor->shape[2] = huge;
    tensor->strides = {0, 0, 0, 1};
  }
  lse.shape = {huge, huge, huge};
  lse.strides = {0, 0, 0};
  gradients = {};
  const auto call = run();
  REQUIRE_MESSAGE(call.ok(), call.failure().message);
  BackwardPlan none;
  const auto planned = plan_of(*call, *codegen::arch_from_name("x86-64-v4"), none);
  REQUIRE_FALSE(planned.ok());
  CHECK(planned.failure().message ==
        "memory_efficient_attention_backward: the workspace would be larger than any memory");
}
