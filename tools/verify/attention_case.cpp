#include "runtime/engine.h"
#include "runtime/raise.h"
#include "runtime/split_keys.h"
#include "tools/verify/case.h"
#include "tools/verify/verdict.h"

#include <fmt/format.h>

#include <string_view>

namespace attune::verify {

using namespace reference;  // NOLINT: cases speak of references and plain values all the time

constexpr int kMostParts = 40;  // more than any case has tiles of keys

AttentionCase::AttentionCase(Random& random, const KernelClass& kernel_class, const MaskClass& mask)
    : problem(random, kernel_class, mask) {
  if (writes_lse()) {
    function_ = random.pick({Function::into, Function::requires_grad, Function::partial});
    if (function_ == Function::partial && problem.p() != 0) function_ = Function::requires_grad;
  } else {
    function_ = random.pick({Function::into, Function::allocate});
  }
  const DType output_dtype = problem.output_dtype();
  output = GuardedTensor(output_dtype, problem.output_shape(),
                         problem.layout(random, output_dtype, Access::write));
  lse = GuardedTensor(DType::f32, problem.lse_shape(problem.batch(), problem.plan().len_q), Layout{});
  if (is_split()) parts_of_keys_ = random.integer(2, kMostParts);
  if (is_disguised()) function_ = Function::into;
  describe();
}

bool AttentionCase::is_disguised() const {
  const codegen::Problem& p = problem.traits();
  const bool other_extent =
      p.boxes != 0 && p.blocks == kernel::Blocks::dense && p.extent != codegen::Extent::few_tiles;
  return other_extent || codegen::may_split_keys(p);
}

codegen::Problem AttentionCase::last(const codegen::Arch&) const {
  return is_split() ? runtime::problem_of_parts(problem.traits()) : problem.traits();
}

void AttentionCase::run_disguised(const runtime::Arguments& arguments) const {
  runtime::Call call = runtime::take(runtime::check(arguments));
  call.problem.extent = problem.traits().extent;
  call.params.splits = parts_of_keys_;
  const auto floats = static_cast<std::int64_t>(runtime::workspace_bytes(call) / sizeof(float));
  const Tensor workspace(DType::f32, call.device, {floats}, call.stream);
  call.workspace = workspace.view().data;
  runtime::take(runtime::take(runtime::Engine::global())->run(call));
}

void AttentionCase::describe() {
  constexpr std::string_view kFunctions[] = {
      "memory_efficient_attention_forward", "memory_efficient_attention",
      "memory_efficient_attention_forward_requires_grad", "memory_efficient_attention_partial"};
  const std::string function(kFunctions[static_cast<int>(function_)]);
  bias = problem.mask_name();
  aspects = problem.aspects();
  aspects.emplace_back("function", function);
  const std::string parts = is_split() ? fmt::format(" in {} parts", parts_of_keys_) : "";
  aspects.emplace_back("keys", is_split() ? "split" : "whole");
  name = fmt::format("{} {}{}{}", problem.text(), function, writes_lse() ? " with lse" : "", parts);
}

int AttentionCase::launches() const {
  if (problem.batch() == 0 || problem.plan().len_q == 0) return 0;
  return is_split() ? 2 : 1;
}

std::vector<Part> AttentionCase::parts() const {
  std::vector<Part> all = problem.parts();
  all.push_back({"output", &output, Access::write});
  all.push_back({"lse", &lse, writes_lse() ? Access::write : Access::read});
  return all;
}

void AttentionCase::run(Arena& arena) {
  arena.begin(parts());
  auto [query, key, value, mask, options] = problem.on(arena);
  const DType usual = function_ == Function::partial ? DType::f32 : query.dtype;
  if (output.view().dtype != usual) options.output_dtype = output.view().dtype;
  const auto take = [&](const Attention& result) {
    arena.take(result.output, output);
    arena.take(result.lse, lse);
  };
  switch (function_) {
    case Function::into: {
      const MutableTensorView out = arena.put(output), lse_out = arena.put(lse);
      const MutableTensorView* lse_or_none = writes_lse() ? &lse_out : nullptr;
      if (is_disguised()) {
        run_disguised({query, key, value, &out, lse_or_none, writes_lse(), mask, options});
      } else {
        memory_efficient_attention_forward(query, key, value, out, lse_or_none, mask, options);
      }
      return arena.finish();
    }
    case Function::allocate:
      arena.take(memory_efficient_attention(query, key, value, mask, options), output);
      break;
    case Function::requires_grad:
      take(memory_efficient_attention_forward_requires_grad(query, key, value, mask, options));
      break;
    case Function::partial: take(memory_efficient_attention_partial(query, key, value, mask, options)); break;
  }
  arena.finish();
}

std::string AttentionCase::verdict() const {
  if (std::string damage = damage_of(parts()); !damage.empty()) return damage;
  const Inputs inputs = problem.inputs();
  const Values right = reference_attention(inputs);
  const std::vector<double> values = output.values();
  const std::vector<double> lse_values = writes_lse() ? lse.values() : std::vector<double>();
  return text_of(judge(inputs, right, values, lse_values), extents_of(inputs), right, values);
}

}  // namespace attune::verify
