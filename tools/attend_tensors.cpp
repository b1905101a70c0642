#include "runtime/cuda/cuda_backend.h"
#include "tools/attend.h"
#include "tools/reference/element.h"
#include "tools/safetensors.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstring>
#include <string_view>

namespace attune::tools {
namespace {

using nlohmann::json;

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

std::size_t count_of(const MutableTensorView& view) {
  std::size_t count = 1;
  for (int axis = 0; axis < view.rank; ++axis) count *= static_cast<std::size_t>(view.shape[axis]);
  return count;
}

std::size_t bytes_of(const MutableTensorView& view) {
  return count_of(view) * static_cast<std::size_t>(item_bytes(view.dtype));
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

/// Nothing where the file has none, or nobody wants it.
Result<std::optional<Tensor>> optional_tensor(const SafetensorsFile& file, const char* name, bool is_bias) {
  const StoredTensor* stored = file.find(name);
  if (stored == nullptr) return std::optional<Tensor>();
  ATTUNE_ASSIGN(tensor, host_tensor(*stored, is_bias));
  return std::optional<Tensor>(std::move(tensor));
}

Result<std::optional<Tensor>> to_device(const std::optional<Tensor>& host, Device device) {
  if (!host) return std::optional<Tensor>();
  ATTUNE_ASSIGN(tensor, tools::to_device(*host, device));
  return std::optional<Tensor>(std::move(tensor));
}

}  // namespace

std::vector<std::int64_t> shape_of(const TensorView& view) {
  return {view.shape.begin(), view.shape.begin() + view.rank};
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

Result<AttendTensors> read_tensors(const AttendOptions& options) {
  ATTUNE_ASSIGN(file, SafetensorsFile::read(options.input));
  ATTUNE_ASSIGN(query, input_tensor(file, options.input, "query"));
  ATTUNE_ASSIGN(key, input_tensor(file, options.input, "key"));
  ATTUNE_ASSIGN(value, input_tensor(file, options.input, "value"));
  ATTUNE_ASSIGN(attn_bias, optional_tensor(file, "attn_bias", /*is_bias=*/true));
  AttendTensors tensors{std::move(query), std::move(key), std::move(value), std::move(attn_bias), {}, {}};
  if (!options.backward) return tensors;
  ATTUNE_ASSIGN(grad_output, optional_tensor(file, "grad_output", /*is_bias=*/false));
  ATTUNE_ASSIGN(grad_lse, optional_tensor(file, "grad_lse", /*is_bias=*/false));
  tensors.grad_output = std::move(grad_output);
  tensors.grad_lse = std::move(grad_lse);
  return tensors;
}

Result<AttendTensors> to_device(const AttendTensors& host, Device device) {
  ATTUNE_ASSIGN(query, to_device(host.query, device));
  ATTUNE_ASSIGN(key, to_device(host.key, device));
  ATTUNE_ASSIGN(value, to_device(host.value, device));
  ATTUNE_ASSIGN(attn_bias, to_device(host.attn_bias, device));
  ATTUNE_ASSIGN(grad_output, to_device(host.grad_output, device));
  ATTUNE_ASSIGN(grad_lse, to_device(host.grad_lse, device));
  return AttendTensors{std::move(query),     std::move(key),         std::move(value),
                       std::move(attn_bias), std::move(grad_output), std::move(grad_lse)};
}

std::vector<double> values_of(const TensorView& tensor) {
  const std::vector<float> elements = reference::dense(tensor);
  return {elements.begin(), elements.end()};
}

Result<void> write_tensors(const AttendOptions& options, const std::string& kernel,
                           const std::vector<std::pair<std::string, const Tensor*>>& tensors) {
  std::vector<StoredTensor> stored;
  for (const auto& [name, tensor] : tensors) {
    const MutableTensorView view = tensor->view();
    stored.push_back({name,
                      stored_dtype(view.dtype),
                      shape_of(view),
                      {static_cast<const std::byte*>(view.data), bytes_of(view)}});
  }
  return write_safetensors(
      options.output, stored,
      {{"made_by", "attune attend " ATTUNE_VERSION}, {"bias", options.bias}, {"kernel", kernel}});
}

}  // namespace attune::tools
