#include "runtime/backward.h"

#include "attune/backward.h"
#include "codegen/choose.h"
#include "runtime/boxes.h"
#include "runtime/check_tensors.h"

#include <fmt/format.h>

#include <cstdint>

namespace attune::runtime {
namespace {

using codegen::Problem;
using kernel::BackwardParams;
using kernel::i64;
using kernel::Operation;
using kernel::QueryGradient;

/// Hands out aligned pieces of the workspace, from the first on.
class Pieces {
 public:
  explicit Pieces(void* workspace) : begin_(static_cast<std::byte*>(workspace)) {}

  /// Null without a workspace.
  template <typename T>
  T* take(i64 count, i64 element_bytes) {
    T* piece = begin_ == nullptr ? nullptr : reinterpret_cast<T*>(begin_ + bytes_);
    i64 bytes = 0;
    overflow_ = overflow_ || __builtin_mul_overflow(count, element_bytes, &bytes) ||
                __builtin_add_overflow(bytes_, bytes, &bytes_) ||
                __builtin_add_overflow(bytes_, i64{kWorkspaceAlignment} - 1, &bytes_);
    bytes_ -= bytes_ % i64{kWorkspaceAlignment};
    return piece;
  }
  bool overflow() const { return overflow_; }
  i64 bytes() const { return bytes_; }

 private:
  std::byte* begin_;
  i64 bytes_ = 0;
  bool overflow_ = false;
};

/// Row-major [batch, len_q, groups, heads, columns].
kernel::Strides contiguous_rows(const kernel::ForwardParams& p, i64 columns) {
  const i64 group = p.heads * columns;
  const i64 row = p.groups * group;
  return {.batch = p.len_q * row, .seq = row, .group = group, .head = columns};
}

/// The launch of one operation on the call's parameters.
class Planner {
 public:
  Planner(const BackwardCall& call, const BackwardParams& params, bool stores_bias_gradient,
          BackwardPlan& plan)
      : call_(call), params_(params), stores_bias_gradient_(stores_bias_gradient), plan_(plan) {}

  BackwardPlan::Step& add(Operation operation) {
    BackwardPlan::Step& step = plan_.steps[plan_.count++];
    step.problem = problem_of(call_.problem, operation);
    step.params = params_;
    return step;
  }

  /// Gradients of key and value, which are computed together where the same query heads share both. Else the
  /// first of two launches adds up the query's gradient.
  void add_key_value(QueryGradient query_gradient) {
    plan_.main = plan_.count;
    const bool together = call_.key_heads == call_.value_heads;
    bool adds = query_gradient != QueryGradient::apart;
    if (params_.grad_key != nullptr || (together && params_.grad_value != nullptr)) {
      BackwardPlan::Step& step = add_key_value(call_.key_heads, query_gradient);
      if (!together) step.params.grad_value = nullptr;
      adds = false;
    }
    if (!together && params_.grad_value != nullptr) {
      BackwardPlan::Step& step = add_key_value(call_.value_heads, query_gradient);
      step.params.grad_key = nullptr;
      if (!adds) step.params.query_sums = nullptr;
    }
  }

 private:
  BackwardPlan::Step& add_key_value(HeadExtents heads, QueryGradient query_gradient) {
    BackwardPlan::Step& step = add(Operation::grad_key_value);
    step.problem.query_gradient = query_gradient;
    step.params.key_groups = heads.groups;
    step.params.key_heads = heads.heads;
    if (!stores_bias_gradient_) step.params.grad_bias = nullptr;
    return step;
  }

  const BackwardCall& call_;
  const BackwardParams& params_;
  const bool stores_bias_gradient_;
  BackwardPlan& plan_;
};

}  // namespace

kernel::Strides read_grad_output_strides(const BackwardCall& call) {
  if (!call.copies_grad_output) return call.params.grad_output_strides;
  return contiguous_rows(call.params.forward, call.problem.head_dim_v);
}

Problem problem_of(const Problem& forward, Operation operation) {
  Problem problem = forward;
  problem.operation = operation;
  problem.lse = kernel::Lse::skip;
  if (operation != Operation::grad_key_value && operation != Operation::grad_bias) problem.boxes = 0;
  problem.extent = codegen::Extent::large;
  if (operation == Operation::delta || operation == Operation::round_query) {
    return {.operation = operation,
            .dtype = problem.dtype,
            .output_dtype = operation == Operation::delta ? problem.output_dtype : problem.dtype,
            .head_dim = problem.head_dim,
            .head_dim_v = operation == Operation::delta ? problem.head_dim_v : problem.head_dim,
            .blocks = problem.blocks,
            .align_bytes = problem.align_bytes};
  }
  problem.output_dtype = problem.dtype;
  return problem;
}

std::vector<Problem> problems_of_pass(const Problem& forward, const codegen::Arch& arch, bool deterministic) {
  Problem keys = problem_of(forward, Operation::grad_key_value);
  keys.query_gradient = codegen::query_gradient_of(keys, arch, deterministic);
  const bool sums = keys.query_gradient != QueryGradient::apart;
  std::vector<Problem> problems{problem_of(forward, Operation::delta), keys,
                                problem_of(forward, sums ? Operation::round_query : Operation::grad_query)};
  if (forward.bias != kernel::Bias::none && forward.bias != kernel::Bias::boolean) {
    problems.push_back(problem_of(forward, Operation::grad_bias));
  }
  return problems;
}

Result<void> plan_of(const BackwardCall& call, const codegen::Arch& arch, BackwardPlan& plan) {
  BackwardParams params = call.params;
  const kernel::ForwardParams& forward = params.forward;
  const bool wants_key_value = params.grad_key != nullptr || params.grad_value != nullptr;
  QueryGradient query_gradient = QueryGradient::apart;
  bool stores_bias_gradient = false;
  if (params.grad_query != nullptr && wants_key_value) {
    const Problem keys = problem_of(call.problem, Operation::grad_key_value);
    if (const auto spec = codegen::key_value_spec(keys, arch, call.deterministic)) {
      query_gradient = spec->query_gradient;
      params.sum_fragments = leaves_fragments(*spec) ? 1 : 0;
      stores_bias_gradient = params.grad_bias != nullptr && kernel::stores_bias_gradient(*spec) &&
                             bias_gradient_boxes_fit(params);
    }
  }
  const bool sums = query_gradient != QueryGradient::apart;

  Pieces pieces(call.workspace);
  i64 heads = 0, rows = 0, sum_rows = 0;
  const bool overflow =
      __builtin_mul_overflow(i64{forward.groups} * forward.heads, i64{forward.batch}, &heads) ||
      __builtin_mul_overflow(heads, i64{forward.len_q}, &rows) ||
      kernel::sum_rows(params) > INT32_MAX ||  // kernels count the rows of one head
      __builtin_mul_overflow(heads, kernel::sum_rows(params), &sum_rows);
  params.lse2 = pieces.take<float>(rows, sizeof(float));
  params.delta = pieces.take<float>(rows, sizeof(float));
  if (call.copies_grad_output) {
    params.grad_output_copy =
        pieces.take<void>(rows, i64{call.problem.head_dim_v} * size_of(call.problem.dtype));
  }
  if (sums) params.query_sums = pieces.take<float>(sum_rows, i64{call.problem.head_dim} * i64{sizeof(float)});
  if (query_gradient == QueryGradient::ordered && !overflow) {
    params.turns = pieces.take<kernel::u32>(query_turns(forward), sizeof(kernel::u32));
  }
  if (overflow || pieces.overflow()) {
    return invalid_argument(
        "memory_efficient_attention_backward: the workspace would be larger than any memory");
  }

  Planner planner(call, params, stores_bias_gradient, plan);
  BackwardPlan::Step& delta = planner.add(Operation::delta);
  const bool leaves_tiles_out =
      call.problem.window_left == kernel::Edge::bounded || call.problem.window_right == kernel::Edge::bounded;
  if (!stores_bias_gradient || !leaves_tiles_out) delta.params.grad_bias = nullptr;
  if (call.copies_grad_output) {
    params.grad_output = params.grad_output_copy;
    params.grad_output_strides = read_grad_output_strides(call);
    params.grad_output_column = 1;
  }
  planner.add_key_value(query_gradient);
  if (params.grad_query != nullptr) planner.add(sums ? Operation::round_query : Operation::grad_query);
  if (params.grad_bias != nullptr && !stores_bias_gradient) planner.add(Operation::grad_bias);
  if (plan.main == plan.count) plan.main = plan.count - 1;
  plan.workspace_bytes = static_cast<std::size_t>(pieces.bytes());
  return done();
}

}  // namespace attune::runtime
