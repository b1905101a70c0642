// The presets: well formed, with a source for every fact, and each line what real calls reduce to.
#include "tools/presets.h"

#include "codegen/names.h"
#include "runtime/check.h"
#include "tests/support/random.h"
#include "tools/problem_list.h"
#include "tools/verify/mask_classes.h"

#include <doctest/doctest.h>
#include <fmt/format.h>

#include <algorithm>
#include <set>

using namespace attune;
using attune::test::Random;
using attune::test::test_seed;
using tools::Preset;

namespace {

alignas(64) std::byte memory[64];  // never read: only addresses and shapes matter

std::vector<Preset> known_presets() {
  auto presets = tools::presets();
  REQUIRE_MESSAGE(presets.ok(), presets.failure().message);
  return std::move(*presets);
}

std::set<std::string> lines_of(const Preset& preset) {
  const auto lines = tools::problem_lines(tools::problem_list_of(preset), preset.name);
  REQUIRE(lines.ok());
  std::set<std::string> set(lines->begin(), lines->end());
  CHECK(set.size() == lines->size());  // none twice
  return set;
}

DType dtype_of(const std::string& name) {
  kernel::DType dtype{};
  REQUIRE(codegen::parse_text(name, dtype));
  return static_cast<DType>(dtype);
}

/// No tensor without rows, and no bias of one row or one key: strides along those are not looked at.
verify::MaskPlan plan_with_rows(const verify::MaskClass& mask) {
  static Random random(test_seed());
  for (;;) {
    verify::MaskPlan plan = verify::random_plan(random, mask, 4096, verify::kBoxGranule);
    if (plan.len_q > 1 && plan.len_k > 1) return plan;
  }
}

/// A bias tensor whose rows begin at multiples of 16 bytes or, where it is ragged, elsewhere.
TensorView bias_tensor(DType dtype, const verify::MaskPlan& plan, bool ragged) {
  TensorView tensor(memory, dtype, {plan.len_q, plan.len_k});
  tensor.strides[0] = (plan.len_k + 7) / 8 * 8 + (ragged ? 1 : 0);
  return tensor;
}

/// The problem of a call with a bias of this class on contiguous tensors, key and value with fewer heads.
codegen::Problem problem_of_call(const std::string& mask_name, DType dtype, std::pair<int, int> head_dims,
                                 bool with_lse, const AttentionOptions& options, bool ragged,
                                 codegen::Extent extent) {
  const auto classes = verify::mask_classes();
  const auto mask = std::ranges::find(classes, mask_name, &verify::MaskClass::name);
  REQUIRE(mask != classes.end());
  verify::MaskPlan plan = plan_with_rows(*mask);
  const bool whole = mask->keys == verify::Addressing::whole;
  if (whole && extent == codegen::Extent::large) plan.len_q += codegen::kFewQueries;
  const verify::HostTables host = verify::tables_of(plan);
  const verify::MaskTables tables{host.q_starts, host.k_starts, host.k_lens, host.pages};
  AttentionBias bias = verify::make_mask(*mask, verify::Route::lists, plan, tables);
  if (mask->tensor == verify::WithTensor::always) {
    bias = bias.add_bias(bias_tensor(dtype, plan, ragged));
  }
  const std::int64_t batch = bias.sequences != nullptr ? 1 : extent == codegen::Extent::few_tiles ? 2 : 64;
  const TensorView query(memory, dtype, {batch, plan.len_q, 8, head_dims.first});
  const TensorView key(memory, dtype, {batch, plan.len_k, 2, head_dims.first});
  const TensorView value(memory, dtype, {batch, plan.len_k, 2, head_dims.second});
  const auto call = runtime::check({query, key, value, nullptr, nullptr, with_lse, bias, options});
  REQUIRE_MESSAGE(call.ok(), call.failure().message);
  return call->problem;
}

std::string merge_line(int head_dim_v, DType output_dtype) {
  const TensorView chunk(memory, DType::f32, {2, 5, 8, head_dim_v});
  const TensorView lse(memory, DType::f32, {2, 8, 5});
  const MutableTensorView output(memory, output_dtype, {2, 5, 8, head_dim_v});
  const MutableTensorView lse_out(memory, DType::f32, {2, 8, 5});
  const auto call = runtime::check_merge({std::span(&chunk, 1), std::span(&lse, 1)});
  REQUIRE_MESSAGE(call.ok(), call.failure().message);
  codegen::Problem problem = call->problem;
  problem.output_dtype = static_cast<kernel::DType>(output_dtype);
  problem.lse = kernel::Lse::write;
  return codegen::to_string(problem);
}

/// Both ways in which a bias tensor may lie, and each extent.
class Lines {
 public:
  Lines(DType dtype, std::pair<int, int> head_dims) : dtype_(dtype), head_dims_(head_dims) {}

  void call(const std::string& mask, bool with_lse, const AttentionOptions& options = {},
            const std::string& operation = "") {
    using codegen::Extent;
    for (const bool ragged : {false, true}) {
      for (const Extent extent : {Extent::large, Extent::few_queries, Extent::few_tiles}) {
        codegen::Problem problem =
            problem_of_call(mask, dtype_, head_dims_, with_lse, options, ragged, extent);
        if (!operation.empty()) problem.extent = Extent::large;  // no gradient's kernel differs
        lines.insert(operation + codegen::to_string(problem));
        problem.extent = Extent::large;
        if (operation.empty() && codegen::may_split_keys(problem))
          lines.insert("operation=split " + codegen::to_string(problem));
      }
    }
  }

  std::set<std::string> lines;

 private:
  DType dtype_;
  std::pair<int, int> head_dims_;
};

std::set<std::string> lines_of_calls(const Preset& preset) {
  std::set<std::string> all;
  for (const std::string& dtype_name : preset.dtypes) {
    const DType dtype = dtype_of(dtype_name);
    for (const auto& head_dims : preset.head_dims) {
      Lines made(dtype, head_dims);
      for (const std::string& mask : preset.inference) made.call(mask, false);
      for (const std::string& mask : preset.training) {
        for (const double p : preset.dropout ? std::vector{0.0, 0.1} : std::vector{0.0}) {
          made.call(mask, true, {.p = p});
          made.call(mask, false, {.p = p}, "operation=backward ");
        }
      }
      for (const std::string& mask : preset.partial) {
        made.call(mask, true, {.output_dtype = DType::f32});
        made.lines.insert(merge_line(head_dims.second, DType::f32));
        made.lines.insert(merge_line(head_dims.second, dtype));
      }
      all.merge(made.lines);
    }
  }
  return all;
}

void check_refused(const std::string& row, const std::string& message) {
  const auto presets = tools::parse_presets("[" + row + "]");
  REQUIRE_FALSE(presets.ok());
  CHECK(presets.failure().kind == ErrorKind::internal);
  CHECK_MESSAGE(presets.failure().message.find(message) != std::string::npos, presets.failure().message);
}

}  // namespace

TEST_CASE("names are words, and none is there twice") {
  std::set<std::string> names;
  for (const Preset& preset : known_presets()) {
    CHECK(names.insert(preset.name).second);
    CHECK(preset.name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789-") == std::string::npos);
    CHECK_FALSE(preset.models.empty());
    for (const auto& [fact, source] : preset.sources) CHECK_FALSE(source.empty());
  }
  CHECK(names.size() >= 10);
}

TEST_CASE("a preset is what calls of such a model reduce to, nothing less and nothing more") {
  for (const Preset& preset : known_presets()) {
    CAPTURE(preset.name);
    const auto listed = lines_of(preset);
    const auto called = lines_of_calls(preset);
    for (const std::string& line : called) CHECK_MESSAGE(listed.contains(line), "lacks " << line);
    for (const std::string& line : listed) CHECK_MESSAGE(called.contains(line), "nothing calls " << line);
  }
}

TEST_CASE("every line has kernels on every kind of device") {
  for (const char* name : {"sm_60", "sm_80", "sm_90a", "x86-64-v3", "x86-64-v4"}) {
    const auto arch = codegen::arch_from_name(name);
    REQUIRE(arch.ok());
    for (const Preset& preset : known_presets()) {
      const auto problems = tools::parse_problem_list(tools::problem_list_of(preset), preset.name, *arch);
      REQUIRE_MESSAGE(problems.ok(), problems.failure().message);
      for (const codegen::Problem& problem : *problems) {
        const auto choice = codegen::choose(problem, *arch);
        CHECK_MESSAGE(choice.ok(), name << " " << codegen::to_string(problem));
      }
    }
  }
}

TEST_CASE("a row that is not a preset is refused with its name and what is wrong") {
  const std::string good =
      R"("name": "a", "models": "A", "head_dims": [64], "sources": {"head_dims": "x", "dtypes": "x", "masks": "x"})";
  REQUIRE(tools::parse_presets("[{" + good + R"(, "dtypes": ["f16"]}])").ok());
  check_refused("{" + good + R"(, "dtypes": ["f64"]})", "preset a: unknown type f64");
  check_refused("{" + good + R"(, "dtypes": ["f16"], "inference": ["CausalMask"]})",
                "preset a: unknown class CausalMask");
  check_refused("{" + good + R"(, "dtypes": ["f16"], "dropout": true})", "preset a: no source for dropout");
  check_refused(R"({"name": "a"})", "preset 0: ");
  check_refused(R"({"name": "a", "models": )", "preset 0: ");
}
