// attune attend: attention over the tensors of a file, timed and, on request, checked.
#include "attune/attune.h"
#include "codegen/names.h"
#include "runtime/check.h"
#include "runtime/check_tensors.h"
#include "runtime/cuda/cuda_backend.h"
#include "tools/command.h"
#include "tools/console.h"
#include "tools/device_option.h"
#include "tools/reference/element.h"
#include "tools/reference/judge.h"
#include "tools/safetensors.h"
#include "tools/table.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace attune::tools {
namespace {

using nlohmann::json;

struct AttendOptions {
  std::string input;
  std::string output;
  std::string bias = "none";
  std::optional<std::int64_t> window_size;
  std::optional<std::int64_t> window_left;
  std::optional<std::int64_t> window_right;
  std::optional<double> scale;
  double p = 0;
  DropoutState dropout;
  std::string output_dtype;
  std::string device = "auto";
  std::string family = "automatic";
  int repeat = 5;
  bool check = false;
};

// ---- Options to the library's terms ----

/// Every bias with the window options that it takes; each is required there and refused elsewhere.
Result<AttentionBias> mask_of(const AttendOptions& options) {
  const auto& [size, left, right] = std::tie(options.window_size, options.window_left, options.window_right);
  const auto takes = [&](bool wants_size, bool wants_reach) -> Result<void> {
    if (size.has_value() != wants_size) {
      return invalid_argument(
          fmt::format("--bias {} {} --window-size N", options.bias, wants_size ? "needs" : "takes no"));
    }
    if (left.has_value() != wants_reach || right.has_value() != wants_reach) {
      return invalid_argument(fmt::format("--bias {} {} --window-left N and --window-right N", options.bias,
                                          wants_reach ? "needs" : "takes no"));
    }
    return done();
  };
  if (options.bias == "lower_triangular_from_bottom_right_local") {
    ATTUNE_TRY(takes(true, false));
    return AttentionBias(LowerTriangularFromBottomRightLocalAttentionMask{*size});
  }
  if (options.bias == "local_from_bottom_right") {
    ATTUNE_TRY(takes(false, true));
    return AttentionBias(LocalAttentionFromBottomRightMask{*left, *right});
  }
  ATTUNE_TRY(takes(false, false));
  if (options.bias == "lower_triangular") return AttentionBias(LowerTriangularMask{});
  if (options.bias == "lower_triangular_from_bottom_right") {
    return AttentionBias(LowerTriangularFromBottomRightMask{});
  }
  return AttentionBias();
}

/// Any family, or the one that is forced.
std::vector<Family> families_of(const std::string& name) {
  if (name == "cpu") return {Family::cpu};
  if (name == "simt") return {Family::simt};
  if (name == "mma") return {Family::mma};
  if (name == "sm90") return {Family::sm90};
  return {};
}

/// The names of safetensors.
constexpr std::pair<DType, std::string_view> kStoredDTypes[] = {
    {DType::f32, "F32"}, {DType::f16, "F16"}, {DType::bf16, "BF16"}, {DType::boolean, "BOOL"}};

Result<DType> dtype_of(const StoredTensor& tensor, bool is_bias) {
  for (const auto& [dtype, name] : kStoredDTypes) {
    if (tensor.dtype == name && (is_bias || dtype != DType::boolean)) return dtype;
  }
  return invalid_argument(fmt::format("{}: dtype {}, expected F32, F16{} BF16{}", tensor.name, tensor.dtype,
                                      is_bias ? "," : " or", is_bias ? " or BOOL" : ""));
}

std::string stored_dtype(DType dtype) {
  return std::string(
      std::ranges::find(kStoredDTypes, dtype, &std::pair<DType, std::string_view>::first)->second);
}

std::optional<DType> output_dtype_of(const std::string& name) {
  kernel::DType dtype{};
  if (!codegen::parse_text(name, dtype)) return std::nullopt;
  return static_cast<DType>(dtype);
}

AttentionOptions attention_of(const AttendOptions& options) {
  return {.scale = options.scale,
          .families = families_of(options.family),
          .p = options.p,
          .dropout = options.dropout,
          .output_dtype = output_dtype_of(options.output_dtype)};
}

// ---- Tensors ----

std::size_t count_of(const MutableTensorView& view) {
  std::size_t count = 1;
  for (int axis = 0; axis < view.rank; ++axis) count *= static_cast<std::size_t>(view.shape[axis]);
  return count;
}

std::size_t bytes_of(const MutableTensorView& view) {
  return count_of(view) * static_cast<std::size_t>(item_bytes(view.dtype));
}

std::vector<std::int64_t> shape_of(const TensorView& view) {
  return {view.shape.begin(), view.shape.begin() + view.rank};
}

/// An empty array may have a null pointer, which memcpy must not see.
void copy_bytes(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

/// A tensor of the file in aligned memory: in the file it begins anywhere.
Result<Tensor> host_tensor(const StoredTensor& stored, bool is_bias) {
  if (stored.shape.size() > kMaxRank) {
    return invalid_argument(
        fmt::format("{}: rank {}, expected at most {}", stored.name, stored.shape.size(), kMaxRank));
  }
  ATTUNE_ASSIGN(dtype, dtype_of(stored, is_bias));
  Tensor tensor(dtype, {}, stored.shape);
  copy_bytes(tensor.data(), stored.bytes.data(), stored.bytes.size());
  return tensor;
}

Result<Tensor> input_tensor(const SafetensorsFile& file, const std::string& path, const char* name) {
  if (const StoredTensor* stored = file.find(name)) return host_tensor(*stored, /*is_bias=*/false);
  std::string present;
  for (const StoredTensor& tensor : file.tensors()) present += " " + json(tensor.name).dump();
  return invalid_argument(fmt::format("{}: no tensor \"{}\"; it should hold query, key and value, and has:{}",
                                      path, name, present.empty() ? " none" : present));
}

Result<Tensor> to_device(const Tensor& host, Device device) {
  const MutableTensorView& view = host.view();
  Tensor tensor(view.dtype, device, shape_of(view));
  const std::size_t bytes = bytes_of(view);
  if (device.type == DeviceType::cpu) {
    copy_bytes(tensor.data(), host.data(), bytes);
  } else if (bytes > 0) {
    ATTUNE_TRY(runtime::cuda_copy_to_device(device.index, tensor.data(), host.data(), bytes));
  }
  return tensor;
}

Result<Tensor> to_host(Tensor tensor) {
  const MutableTensorView view = tensor.view();
  if (view.device.type == DeviceType::cpu) return tensor;
  Tensor host(view.dtype, {}, shape_of(view));
  if (const std::size_t bytes = bytes_of(view); bytes > 0) {
    ATTUNE_TRY(runtime::cuda_copy_to_host(view.device.index, host.data(), view.data, bytes));
  }
  return host;
}

// ---- The run ----

struct Inputs {
  Tensor query, key, value;
  std::optional<Tensor> attn_bias;

  /// The mask, with the tensor on top where there is one.
  AttentionBias with(const AttentionBias& mask) const {
    return attn_bias ? mask.add_bias(attn_bias->view()) : mask;
  }
};

Result<Inputs> read_inputs(const std::string& path) {
  ATTUNE_ASSIGN(file, SafetensorsFile::read(path));
  ATTUNE_ASSIGN(query, input_tensor(file, path, "query"));
  ATTUNE_ASSIGN(key, input_tensor(file, path, "key"));
  ATTUNE_ASSIGN(value, input_tensor(file, path, "value"));
  Inputs inputs{std::move(query), std::move(key), std::move(value), std::nullopt};
  if (const StoredTensor* stored = file.find("attn_bias")) {
    ATTUNE_ASSIGN(attn_bias, host_tensor(*stored, /*is_bias=*/true));
    inputs.attn_bias = std::move(attn_bias);
  }
  return inputs;
}

Result<Inputs> to_device(const Inputs& host, Device device) {
  ATTUNE_ASSIGN(query, to_device(host.query, device));
  ATTUNE_ASSIGN(key, to_device(host.key, device));
  ATTUNE_ASSIGN(value, to_device(host.value, device));
  Inputs inputs{std::move(query), std::move(key), std::move(value), std::nullopt};
  if (host.attn_bias) {
    ATTUNE_ASSIGN(attn_bias, to_device(*host.attn_bias, device));
    inputs.attn_bias = std::move(attn_bias);
  }
  return inputs;
}

struct Run {
  Tensor output, lse;  // in host memory
  std::string kernel;  // empty when there was nothing to compute
  double first_call_ms = 0;
  double hot_call_ms = 0;
  Counters counters;
};

double milliseconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
}

Result<Run> attend_on(const Inputs& host, Device device, const AttentionBias& mask,
                      const AttentionOptions& attention, int repeat) {
  ATTUNE_ASSIGN(inputs, to_device(host, device));
  const AttentionBias bias = inputs.with(mask);
  const MutableTensorView query = inputs.query.view();
  std::vector<std::int64_t> shape = shape_of(query);
  shape.back() = shape_of(inputs.value.view()).back();
  Tensor output(attention.output_dtype.value_or(query.dtype), device, shape);
  Tensor lse(DType::f32, device, shape_of(runtime::lse_like(query)));
  const MutableTensorView lse_view = lse.view();

  const auto timed_call = [&]() -> Result<double> {
    const auto begin = std::chrono::steady_clock::now();
    memory_efficient_attention_forward(query, inputs.key.view(), inputs.value.view(), output.view(),
                                       &lse_view, bias, attention);
    if (device.type == DeviceType::cuda) ATTUNE_TRY(runtime::cuda_synchronize(device.index));
    return milliseconds_since(begin);
  };
  Run run;
  ATTUNE_ASSIGN(first_call_ms, timed_call());
  run.first_call_ms = first_call_ms;
  run.kernel = last_kernel();
  run.counters = counters();
  std::vector<double> hot_calls;
  for (int i = 0; i < repeat; ++i) {
    ATTUNE_ASSIGN(call_ms, timed_call());
    hot_calls.push_back(call_ms);
  }
  const auto middle = hot_calls.begin() + static_cast<std::ptrdiff_t>(hot_calls.size() / 2);
  std::ranges::nth_element(hot_calls, middle);
  run.hot_call_ms = *middle;
  ATTUNE_ASSIGN(host_output, to_host(std::move(output)));
  ATTUNE_ASSIGN(host_lse, to_host(std::move(lse)));
  run.output = std::move(host_output);
  run.lse = std::move(host_lse);
  return run;
}

Result<void> write_result(const AttendOptions& options, const Run& run) {
  const auto stored = [](const char* name, const Tensor& tensor) {
    const MutableTensorView view = tensor.view();
    return StoredTensor{name,
                        stored_dtype(view.dtype),
                        shape_of(view),
                        {static_cast<const std::byte*>(view.data), bytes_of(view)}};
  };
  return write_safetensors(
      options.output, std::vector{stored("output", run.output), stored("lse", run.lse)},
      {{"made_by", "attune attend " ATTUNE_VERSION}, {"bias", options.bias}, {"kernel", run.kernel}});
}

// ---- The check ----

std::vector<double> values_of(const Tensor& tensor) {
  const std::vector<float> elements = reference::dense(tensor.view());
  return {elements.begin(), elements.end()};
}

reference::Judgement judge(const Inputs& host, const AttentionBias& mask, const AttentionOptions& attention,
                           const Run& run) {
  const reference::Inputs inputs{.query = host.query.view(),
                                 .key = host.key.view(),
                                 .value = host.value.view(),
                                 .bias = host.with(mask),
                                 .scale = attention.scale,
                                 .p = attention.p,
                                 .dropout = attention.dropout,
                                 .output_dtype = attention.output_dtype};
  return reference::judge(inputs, reference::reference_attention(inputs), values_of(run.output),
                          values_of(run.lse));
}

bool good(const reference::Judgement& judged) {
  return judged.output.ok && judged.lse.ok;
}

// ---- The report ----

/// Where the first call found its kernel, by what the process's counters say after it.
const char* source_of(const Run& run) {
  if (run.kernel.empty()) return "none";
  if (run.counters.compiles > 0) return "compiler";
  return run.counters.cache_hits > 0 ? "disk" : "memory";
}

std::string family_name(const std::string& kernel) {
  for (const codegen::Candidate& candidate : codegen::candidates()) {
    if (kernel == candidate.name) return std::string(codegen::name_of(candidate.family));
  }
  return "none";
}

json report_json(const Run& run, const std::optional<reference::Judgement>& judged, Device device) {
  const auto error = [&](reference::Comparison reference::Judgement::*tensor,
                         double reference::Comparison::*field) {
    return judged ? json((*judged).*tensor.*field) : json(nullptr);
  };
  using reference::Comparison;
  using reference::Judgement;
  return {{"kernel", run.kernel},
          {"family", family_name(run.kernel)},
          {"source", source_of(run)},
          {"device", to_text(device)},
          {"first_call_ms", run.first_call_ms},
          {"hot_call_ms", run.hot_call_ms},
          {"compiles", run.counters.compiles},
          {"cache_hits", run.counters.cache_hits},
          {"cache_defects", run.counters.cache_defects},
          {"max_abs_error", error(&Judgement::output, &Comparison::worst)},
          {"plain_max_abs_error", error(&Judgement::output, &Comparison::worst_plain)},
          {"lse_max_abs_error", error(&Judgement::lse, &Comparison::worst)},
          {"plain_lse_max_abs_error", error(&Judgement::lse, &Comparison::worst_plain)},
          {"correct", judged ? json(good(*judged)) : json(nullptr)}};
}

std::string report_text(const Run& run, const std::optional<reference::Judgement>& judged, Device device,
                        const AttendOptions& options) {
  Table table;
  table.row({"kernel", run.kernel.empty() ? "none: the output is empty"
                                          : fmt::format("{} (from {})", run.kernel, source_of(run))});
  table.row({"device", to_text(device)});
  table.row({"first call", fmt::format("{:.2f} ms", run.first_call_ms)});
  table.row({"hot call", fmt::format("{:.3f} ms (median of {})", run.hot_call_ms, options.repeat)});
  if (judged) {
    const auto text = [](const reference::Comparison& one) {
      return fmt::format("{:.2e} (a plain implementation: {:.2e})", one.worst, one.worst_plain);
    };
    table.row({"error", text(judged->output)});
    table.row({"lse error", text(judged->lse)});
    table.row({"check", good(*judged) ? paint("ok", Colour::green, Stream::out)
                                      : paint("WRONG", Colour::red, Stream::out)});
  }
  table.row({"written", options.output});
  return table.text();
}

Result<int> attend(const AttendOptions& options, bool as_json) {
  ATTUNE_ASSIGN(mask, mask_of(options));
  ATTUNE_ASSIGN(host, read_inputs(options.input));
  const AttentionOptions attention = attention_of(options);
  // The shapes are checked before a device is looked for.
  const TensorView views[] = {host.query.view(), host.key.view(), host.value.view()};
  ATTUNE_TRY(runtime::check(
      {views[0], views[1], views[2], nullptr, nullptr, /*with_lse=*/true, host.with(mask), attention}));
  ATTUNE_ASSIGN(device, parse_device(options.device));
  ATTUNE_ASSIGN(run, attend_on(host, device, mask, attention, options.repeat));
  ATTUNE_TRY(write_result(options, run));
  std::optional<reference::Judgement> judged;
  if (options.check) judged = judge(host, mask, attention, run);
  ATTUNE_TRY(as_json ? print_json(report_json(run, judged, device))
                     : print(report_text(run, judged, device, options)));
  return judged && !good(*judged) ? kWrongResult : kOk;
}

}  // namespace

void add_attend(CLI::App& app, Session& session) {
  auto options = std::make_shared<AttendOptions>();
  CLI::App* command =
      app.add_subcommand("attend", "Attention over the tensors query, key and value of a .safetensors file");
  command
      ->add_option(
          "FILE", options->input,
          "[B, M, H, K], [B, M, K] or [B, M, G, H, K], F32, F16 or BF16; key and value may have fewer "
          "heads. A tensor attn_bias, [B or 1, H or 1, Mq or 1, Mkv], is added to the scores; a BOOL "
          "one hides keys where it is false")
      ->required();
  command->add_option("-o,--output", options->output, "Where output and lse go")->required();
  command->add_option("--bias", options->bias, "Which keys a query sees")
      ->check(CLI::IsMember({"none", "lower_triangular", "lower_triangular_from_bottom_right",
                             "lower_triangular_from_bottom_right_local", "local_from_bottom_right"}))
      ->capture_default_str();
  command->add_option("--window-size", options->window_size, "Of lower_triangular_from_bottom_right_local");
  command->add_option("--window-left", options->window_left, "Of local_from_bottom_right");
  command->add_option("--window-right", options->window_right, "Of local_from_bottom_right");
  command->add_option("--scale", options->scale, "Factor of query * key; default K ** -0.5");
  command->add_option("--p", options->p, "Dropout probability")->capture_default_str();
  command->add_option("--seed", options->dropout.seed, "Of the dropout")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("--offset", options->dropout.offset, "Calls that have drawn from the seed before")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("--output-dtype", options->output_dtype, "Of the output; default the query's")
      ->check(CLI::IsMember({"f32", "f16", "bf16"}));
  command->add_option("--device", options->device, "auto, cpu, cuda or cuda:N")->capture_default_str();
  command->add_option("--family", options->family, "Kernel family to force")
      ->check(CLI::IsMember({"automatic", "cpu", "simt", "mma", "sm90"}))
      ->capture_default_str();
  command->add_option("--repeat", options->repeat, "Hot calls to time")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  command->add_flag("--check", options->check, "Compare with a float64 reference; exit 1 when wrong");
  command->callback([options, &session] {
    session.action = [options, &session] { return attend(*options, session.json); };
  });
}

}  // namespace attune::tools
