// What the functions of the C ABI share: its structs in the terms of the C++ API, and exceptions as statuses.
#pragma once

#include "attune/attune.h"
#include "attune/attune_c.h"
#include "runtime/raise.h"

#include <cstddef>
#include <cstring>

namespace attune::runtime {

/// Text of the calling thread's last failure.
const char* last_error();

/// The status of the exception that is being handled; keeps its text.
attune_status status_of_exception() noexcept;

/// Runs `body`; whatever it throws becomes a status and a text.
template <typename Body>
attune_status guarded(Body&& body) noexcept {
  try {
    body();
    return ATTUNE_OK;
  } catch (...) {
    return status_of_exception();
  }
}

static_assert(ATTUNE_MAX_RANK == kMaxRank);

template <typename View>
View view_of(const char* name, const attune_tensor* tensor) {
  if (tensor == nullptr) refuse("{}: null tensor", name);
  View view;
  view.data = tensor->data;
  view.dtype = static_cast<DType>(tensor->dtype);
  view.device = {static_cast<DeviceType>(tensor->device_type), tensor->device_index};
  view.rank = tensor->rank;
  std::memcpy(view.shape.data(), tensor->shape, sizeof tensor->shape);
  std::memcpy(view.strides.data(), tensor->strides, sizeof tensor->strides);
  return view;
}

/// The same tensor in other memory.
template <typename View, typename Data>
View at(View view, Data* data) {
  view.data = data;
  return view;
}

/// A struct of the caller's version: what an older caller does not have stays zero.
template <typename Struct>
Struct versioned(const char* name, const Struct* given) {
  Struct copy{};
  if (given == nullptr) return copy;
  if (given->struct_size < sizeof(std::size_t) || given->struct_size > 4096) {
    refuse("{}: struct_size {} is not set; start from its INIT macro", name, given->struct_size);
  }
  std::memcpy(&copy, given, given->struct_size < sizeof copy ? given->struct_size : sizeof copy);
  return copy;
}

AttentionBias bias_of(const attune_bias* given);
AttentionOptions options_of(const attune_options* given);

}  // namespace attune::runtime
