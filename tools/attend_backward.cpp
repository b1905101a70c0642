#include "runtime/check_tensors.h"
#include "tools/attend.h"
#include "tools/command.h"
#include "tools/reference/judge.h"
#include "tools/reference/plain.h"
#include "tools/table.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>

namespace attune::tools {
namespace {

using nlohmann::json;
using reference::Comparison;

/// Of query, key, value and an additive bias tensor.
constexpr std::array kNames{"grad_query", "grad_key", "grad_value", "grad_attn_bias"};

struct Backward {
  Attention forward;              // everything in host memory
  std::vector<Tensor> gradients;  // in the order of kNames
  std::vector<std::string> kernels;
  Calls calls;
};

/// A 1 in host memory: with strides of 0, the gradient of the sum of all elements.
Tensor one_of(DType dtype) {
  Tensor one(dtype, {}, {1});
  const float wide = 1;
  const std::uint16_t narrow = dtype == DType::f16 ? 0x3c00 : 0x3f80;
  if (dtype == DType::f32) {
    std::memcpy(one.data(), &wide, sizeof wide);
  } else {
    std::memcpy(one.data(), &narrow, sizeof narrow);
  }
  return one;
}

TensorView expanded(const Tensor& one, TensorView like) {
  like.data = one.data();
  like.device = one.view().device;
  like.strides = {};
  return like;
}

Result<Backward> run(const Attend& attend) {
  ATTUNE_ASSIGN(inputs, to_device(attend.host, attend.device));
  const AttentionBias bias = inputs.with(attend.mask);
  const TensorView query = inputs.query.view(), key = inputs.key.view(), value = inputs.value.view();
  Attention forward =
      memory_efficient_attention_forward_requires_grad(query, key, value, bias, attend.attention);
  const TensorView output = forward.output.view(), lse = forward.lse.view();
  ATTUNE_ASSIGN(one, to_device(one_of(output.dtype), attend.device));
  const TensorView grad_output = inputs.grad_output ? inputs.grad_output->view() : expanded(one, output);

  std::vector<Tensor> gradients;
  std::vector<MutableTensorView> views;
  const auto add_gradient = [&](const TensorView& tensor) {
    views.push_back(gradients.emplace_back(tensor.dtype, attend.device, shape_of(tensor)).view());
  };
  for (const TensorView& tensor : {query, key, value}) add_gradient(tensor);
  if (bias.tensor && bias.tensor->dtype != DType::boolean) add_gradient(*bias.tensor);
  const GradientViews wanted{&views[0], &views[1], &views[2], views.size() > 3 ? &views[3] : nullptr};
  BackwardOptions options;
  options.deterministic = attend.options.deterministic;
  TensorView grad_lse;
  if (inputs.grad_lse) {
    grad_lse = inputs.grad_lse->view();
    options.grad_lse = &grad_lse;
  }

  Backward backward;
  ATTUNE_ASSIGN(calls, time_calls(attend.options, attend.device, [&] {
                  memory_efficient_attention_backward(grad_output, output, lse, query, key, value, wanted,
                                                      bias, attend.attention, options);
                }));
  backward.calls = std::move(calls);
  const json explained = json::parse(
      explain_backward(grad_output, output, lse, query, key, value, wanted, bias, attend.attention, options));
  for (const json& kernel : explained.at("kernels")) backward.kernels.push_back(kernel.at("candidate"));
  ATTUNE_ASSIGN(host_output, to_host(std::move(forward.output)));
  ATTUNE_ASSIGN(host_lse, to_host(std::move(forward.lse)));
  backward.forward = {std::move(host_output), std::move(host_lse)};
  for (Tensor& gradient : gradients) {
    ATTUNE_ASSIGN(host, to_host(std::move(gradient)));
    backward.gradients.push_back(std::move(host));
  }
  return backward;
}

/// One comparison for each gradient.
std::vector<Comparison> judge(const Attend& attend, const Backward& backward) {
  const TensorView output = backward.forward.output.view();
  const Tensor one = one_of(output.dtype);
  const auto& [grad_output, grad_lse] = std::tie(attend.host.grad_output, attend.host.grad_lse);
  const reference::BackwardInputs inputs{
      .forward = reference_inputs(attend),
      .grad_output = values_of(grad_output ? grad_output->view() : expanded(one, output)),
      .grad_lse = grad_lse ? values_of(grad_lse->view()) : std::vector<double>(),
      .output = values_of(output)};
  const reference::GradientValues right = reference::reference_backward(inputs);
  const reference::GradientValues plain = reference::plain_backward(inputs);
  using reference::GradientValues;
  constexpr std::array kTensors{&GradientValues::query, &GradientValues::key, &GradientValues::value,
                                &GradientValues::bias};
  std::vector<Comparison> judged;
  for (std::size_t i = 0; i < backward.gradients.size(); ++i) {
    judged.push_back(
        reference::judge(plain.*kTensors[i], right.*kTensors[i], values_of(backward.gradients[i].view())));
  }
  return judged;
}

bool good(const std::vector<Comparison>& judged) {
  return std::ranges::all_of(judged, &Comparison::ok);
}

json to_json(const Attend& attend, const Backward& backward, const std::vector<Comparison>& judged) {
  json report = report_json(attend, backward.calls);
  report["kernels"] = backward.kernels;
  report["errors"] = json::object();
  for (std::size_t i = 0; i < judged.size(); ++i) {
    report["errors"][kNames[i]] = {{"max_abs_error", judged[i].worst},
                                   {"plain_max_abs_error", judged[i].worst_plain}};
  }
  report["correct"] = attend.options.check ? json(good(judged)) : json(nullptr);
  return report;
}

std::string to_text(const Attend& attend, const Backward& backward, const std::vector<Comparison>& judged) {
  Table table;
  add_calls(table, attend, backward.calls);
  table.row({"launches", fmt::format("{}", fmt::join(backward.kernels, ", "))});
  for (std::size_t i = 0; i < judged.size(); ++i) {
    add_error(table, fmt::format("{} error", kNames[i]), judged[i]);
  }
  if (attend.options.check) add_verdict(table, good(judged));
  table.row({"written", attend.options.output});
  return table.text();
}

}  // namespace

Result<int> attend_backward(const Attend& attend) {
  ATTUNE_ASSIGN(backward, run(attend));
  std::vector<std::pair<std::string, const Tensor*>> written{{"output", &backward.forward.output},
                                                             {"lse", &backward.forward.lse}};
  for (std::size_t i = 0; i < backward.gradients.size(); ++i) {
    written.emplace_back(kNames[i], &backward.gradients[i]);
  }
  ATTUNE_TRY(write_tensors(attend.options, backward.calls.kernel, written));
  std::vector<Comparison> judged;
  if (attend.options.check) judged = judge(attend, backward);
  ATTUNE_TRY(attend.as_json ? print_json(to_json(attend, backward, judged))
                            : print(to_text(attend, backward, judged)));
  return good(judged) ? kOk : kWrongResult;
}

}  // namespace attune::tools
