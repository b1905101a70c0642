#include "runtime/check_tensors.h"
#include "tools/attend.h"
#include "tools/command.h"
#include "tools/reference/judge.h"
#include "tools/table.h"

#include <nlohmann/json.hpp>

namespace attune::tools {
namespace {

using nlohmann::json;
using reference::Comparison;
using reference::Judgement;

struct Forward {
  Tensor output, lse;  // in host memory
  Calls calls;
};

Result<Forward> run(const Attend& attend) {
  ATTUNE_ASSIGN(inputs, to_device(attend.host, attend.device));
  const AttentionBias bias = inputs.with(attend.mask);
  const MutableTensorView query = inputs.query.view();
  std::vector<std::int64_t> shape = shape_of(query);
  shape.back() = shape_of(inputs.value.view()).back();
  Tensor output(attend.attention.output_dtype.value_or(query.dtype), attend.device, shape);
  Tensor lse(DType::f32, attend.device, shape_of(runtime::lse_like(query)));
  const MutableTensorView lse_view = lse.view();
  ATTUNE_ASSIGN(calls, time_calls(attend.options, attend.device, [&] {
                  memory_efficient_attention_forward(query, inputs.key.view(), inputs.value.view(),
                                                     output.view(), &lse_view, bias, attend.attention);
                }));
  ATTUNE_ASSIGN(host_output, to_host(std::move(output)));
  ATTUNE_ASSIGN(host_lse, to_host(std::move(lse)));
  return Forward{std::move(host_output), std::move(host_lse), std::move(calls)};
}

Judgement judge(const Attend& attend, const Forward& forward) {
  const reference::Inputs inputs = reference_inputs(attend);
  return reference::judge(inputs, reference::reference_attention(inputs), values_of(forward.output.view()),
                          values_of(forward.lse.view()));
}

bool good(const Judgement& judged) {
  return judged.output.ok && judged.lse.ok;
}

json to_json(const Attend& attend, const Calls& calls, const std::optional<Judgement>& judged) {
  const auto error = [&](Comparison Judgement::*tensor, double Comparison::*field) {
    return judged ? json((*judged).*tensor.*field) : json(nullptr);
  };
  json report = report_json(attend, calls);
  report["max_abs_error"] = error(&Judgement::output, &Comparison::worst);
  report["plain_max_abs_error"] = error(&Judgement::output, &Comparison::worst_plain);
  report["lse_max_abs_error"] = error(&Judgement::lse, &Comparison::worst);
  report["plain_lse_max_abs_error"] = error(&Judgement::lse, &Comparison::worst_plain);
  report["correct"] = judged ? json(good(*judged)) : json(nullptr);
  return report;
}

std::string to_text(const Attend& attend, const Calls& calls, const std::optional<Judgement>& judged) {
  Table table;
  add_calls(table, attend, calls);
  if (judged) {
    add_error(table, "error", judged->output);
    add_error(table, "lse error", judged->lse);
    add_verdict(table, good(*judged));
  }
  table.row({"written", attend.options.output});
  return table.text();
}

}  // namespace

Result<int> attend_forward(const Attend& attend) {
  ATTUNE_ASSIGN(forward, run(attend));
  ATTUNE_TRY(write_tensors(attend.options, forward.calls.kernel,
                           {{"output", &forward.output}, {"lse", &forward.lse}}));
  std::optional<Judgement> judged;
  if (attend.options.check) judged = judge(attend, forward);
  ATTUNE_TRY(attend.as_json ? print_json(to_json(attend, forward.calls, judged))
                            : print(to_text(attend, forward.calls, judged)));
  return judged && !good(*judged) ? kWrongResult : kOk;
}

}  // namespace attune::tools
