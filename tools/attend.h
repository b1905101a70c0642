// `attune attend` in its parts: what it is asked for, the tensors of its files, the calls that it times, and
// its two passes.
#pragma once

#include "attune/attune.h"
#include "base/result.h"
#include "tools/reference/reference.h"
#include "tools/reference/tolerance.h"
#include "tools/table.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace attune::tools {

// ---- attend_options.cpp ----

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
  bool backward = false;
  bool deterministic = false;
};

void add_options(CLI::App& command, AttendOptions& options);

/// Every bias with the window options that it takes; each is required there and refused elsewhere.
Result<AttentionBias> mask_of(const AttendOptions& options);

AttentionOptions attention_of(const AttendOptions& options);

// ---- attend_tensors.cpp ----

struct AttendTensors {
  Tensor query, key, value;
  std::optional<Tensor> attn_bias;
  std::optional<Tensor> grad_output, grad_lse;  // for backward alone

  /// The mask, with the tensor on top where there is one.
  AttentionBias with(const AttentionBias& mask) const {
    return attn_bias ? mask.add_bias(attn_bias->view()) : mask;
  }
};

std::vector<std::int64_t> shape_of(const TensorView& view);

/// Into host memory.
Result<AttendTensors> read_tensors(const AttendOptions& options);
Result<Tensor> to_device(const Tensor& host, Device device);
Result<AttendTensors> to_device(const AttendTensors& host, Device device);
Result<Tensor> to_host(Tensor tensor);
/// Row-major; of a tensor in host memory.
std::vector<double> values_of(const TensorView& tensor);

/// Writes tensors of host memory to the file of the options.
Result<void> write_tensors(const AttendOptions& options, const std::string& kernel,
                           const std::vector<std::pair<std::string, const Tensor*>>& tensors);

// ---- attend_calls.cpp ----

struct Calls {
  std::string kernel;  // empty when there was nothing to compute
  double first_call_ms = 0;
  double hot_call_ms = 0;
  std::uint64_t compiles = 0, cache_hits = 0, cache_defects = 0;  // of the first call

  /// Where it found its kernels.
  const char* source() const;
  /// Of the kernel.
  std::string family() const;
};

/// Makes the call once, and then as often as the options say; throws what it throws.
Result<Calls> time_calls(const AttendOptions& options, Device device, const std::function<void()>& call);

// ---- The passes ----

struct Attend {
  const AttendOptions& options;
  const AttendTensors& host;
  const AttentionBias& mask;
  const AttentionOptions& attention;
  Device device;
  bool as_json = false;
};

/// Each prints its report and returns the exit code.
Result<int> attend_forward(const Attend& attend);
Result<int> attend_backward(const Attend& attend);

// ---- attend_report.cpp: what both report ----

/// The forward problem as the reference takes it.
reference::Inputs reference_inputs(const Attend& attend);

nlohmann::json report_json(const Attend& attend, const Calls& calls);
/// Rows of the report above and below those about errors.
void add_calls(Table& table, const Attend& attend, const Calls& calls);
void add_error(Table& table, const std::string& name, const reference::Comparison& error);
void add_verdict(Table& table, bool good);

}  // namespace attune::tools
