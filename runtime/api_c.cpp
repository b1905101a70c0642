// The C ABI over the C++ API: nothing but statuses leaves, and the text of the last failure stays with the
// thread.
#include "runtime/c_arguments.h"
#include "runtime/c_backward.h"
#include "runtime/engine.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

namespace {

using attune::runtime::BackwardArguments;
using attune::runtime::bias_of;
using attune::runtime::guarded;
using attune::runtime::options_of;
using attune::runtime::refuse;
using attune::runtime::versioned;
using attune::runtime::view_of;

template <typename View = attune::TensorView>
std::vector<View> views_of(const char* name, const attune_tensor* tensors, size_t count) {
  std::vector<View> views;
  for (size_t i = 0; i < count; ++i) {
    views.push_back(view_of<View>(name, tensors == nullptr ? nullptr : tensors + i));
  }
  return views;
}

/// A copy of the text that attune_free releases.
char* c_string(const std::string& text) {
  auto* copy = static_cast<char*>(std::malloc(text.size() + 1));
  if (copy == nullptr) throw std::bad_alloc();
  std::memcpy(copy, text.c_str(), text.size() + 1);
  return copy;
}

/// One of the two functions that say why a family cannot run a call, as JSON.
template <typename Reasons>
attune_status write_reasons(Reasons&& reasons, int32_t family, const attune_tensor* query,
                            const attune_tensor* key, const attune_tensor* value, const attune_bias* bias,
                            const attune_options* options, char** json) {
  return guarded([&] {
    if (json == nullptr) refuse("not_supported_reasons: null json");
    *json =
        c_string(nlohmann::json(
                     reasons(static_cast<attune::Family>(family), view_of<attune::TensorView>("query", query),
                             view_of<attune::TensorView>("key", key),
                             view_of<attune::TensorView>("value", value), bias_of(bias), options_of(options)))
                     .dump());
  });
}

}  // namespace

const char* attune_version(void) {
  return ATTUNE_VERSION;
}

const char* attune_status_name(attune_status status) {
  switch (status) {
    case ATTUNE_OK: return "ok";
    case ATTUNE_INVALID_ARGUMENT: return "invalid argument";
    case ATTUNE_UNSUPPORTED: return "unsupported";
    case ATTUNE_ENVIRONMENT: return "environment";
    case ATTUNE_INTERNAL: return "internal";
  }
  return "unknown status";
}

const char* attune_last_error(void) {
  return attune::runtime::last_error();
}

attune_status attune_memory_efficient_attention_forward(const attune_tensor* query, const attune_tensor* key,
                                                        const attune_tensor* value,
                                                        const attune_tensor* output, const attune_tensor* lse,
                                                        const attune_bias* bias,
                                                        const attune_options* options) {
  return guarded([&] {
    attune::MutableTensorView lse_view;
    if (lse != nullptr) lse_view = view_of<attune::MutableTensorView>("lse", lse);
    attune::memory_efficient_attention_forward(
        view_of<attune::TensorView>("query", query), view_of<attune::TensorView>("key", key),
        view_of<attune::TensorView>("value", value), view_of<attune::MutableTensorView>("output", output),
        lse != nullptr ? &lse_view : nullptr, bias_of(bias), options_of(options));
  });
}

attune_status attune_forward_workspace_bytes(const attune_tensor* query, const attune_tensor* key,
                                             const attune_tensor* value, int with_lse,
                                             const attune_bias* bias, const attune_options* options,
                                             size_t* bytes) {
  return guarded([&] {
    if (bytes == nullptr) refuse("forward_workspace_bytes: null bytes");
    *bytes = attune::forward_workspace_bytes(
        view_of<attune::TensorView>("query", query), view_of<attune::TensorView>("key", key),
        view_of<attune::TensorView>("value", value), with_lse != 0, bias_of(bias), options_of(options));
  });
}

attune_status attune_prepare(const attune_tensor* query, const attune_tensor* key, const attune_tensor* value,
                             int with_lse, const attune_bias* bias, const attune_options* options) {
  return guarded([&] {
    attune::prepare(view_of<attune::TensorView>("query", query), view_of<attune::TensorView>("key", key),
                    view_of<attune::TensorView>("value", value), with_lse != 0, bias_of(bias),
                    options_of(options));
  });
}

attune_status attune_memory_efficient_attention_backward(
    const attune_tensor* grad_output, const attune_tensor* output, const attune_tensor* lse,
    const attune_tensor* query, const attune_tensor* key, const attune_tensor* value,
    const attune_gradients* gradients, const attune_bias* bias, const attune_options* options,
    const attune_backward_options* backward) {
  return guarded([&] {
    const BackwardArguments call(grad_output, output, lse, query, key, value, gradients, bias, options,
                                 backward);
    call.pass_to([](auto&&... arguments) { attune::memory_efficient_attention_backward(arguments...); });
  });
}

attune_status attune_backward_workspace_bytes(const attune_tensor* grad_output, const attune_tensor* output,
                                              const attune_tensor* lse, const attune_tensor* query,
                                              const attune_tensor* key, const attune_tensor* value,
                                              const attune_gradients* gradients, const attune_bias* bias,
                                              const attune_options* options,
                                              const attune_backward_options* backward, size_t* bytes) {
  return guarded([&] {
    if (bytes == nullptr) refuse("backward_workspace_bytes: null bytes");
    const BackwardArguments call(grad_output, output, lse, query, key, value, gradients, bias, options,
                                 backward);
    *bytes = call.pass_to([](auto&&... arguments) { return attune::backward_workspace_bytes(arguments...); });
  });
}

attune_status attune_prepare_backward(const attune_tensor* grad_output, const attune_tensor* output,
                                      const attune_tensor* lse, const attune_tensor* query,
                                      const attune_tensor* key, const attune_tensor* value,
                                      const attune_gradients* gradients, const attune_bias* bias,
                                      const attune_options* options,
                                      const attune_backward_options* backward) {
  return guarded([&] {
    const BackwardArguments call(grad_output, output, lse, query, key, value, gradients, bias, options,
                                 backward);
    call.pass_to([](auto&&... arguments) { attune::prepare_backward(arguments...); });
  });
}

attune_status attune_explain_backward(const attune_tensor* grad_output, const attune_tensor* output,
                                      const attune_tensor* lse, const attune_tensor* query,
                                      const attune_tensor* key, const attune_tensor* value,
                                      const attune_gradients* gradients, const attune_bias* bias,
                                      const attune_options* options, const attune_backward_options* backward,
                                      char** json) {
  return guarded([&] {
    if (json == nullptr) refuse("explain_backward: null json");
    const BackwardArguments call(grad_output, output, lse, query, key, value, gradients, bias, options,
                                 backward);
    *json =
        c_string(call.pass_to([](auto&&... arguments) { return attune::explain_backward(arguments...); }));
  });
}

attune_status attune_merge_attentions(const attune_tensor* attn, const attune_tensor* lse, size_t chunks,
                                      const attune_tensor* output, const attune_tensor* lse_out,
                                      const attune_options* options) {
  return guarded([&] {
    attune::MutableTensorView lse_view;
    if (lse_out != nullptr) lse_view = view_of<attune::MutableTensorView>("lse_out", lse_out);
    const auto attn_views = views_of("attn", attn, chunks);
    const auto lse_views = views_of("lse", lse, chunks);
    attune::merge_attentions(attn_views, lse_views, view_of<attune::MutableTensorView>("output", output),
                             lse_out != nullptr ? &lse_view : nullptr, options_of(options));
  });
}

attune_status attune_merge_attentions_backward(
    const attune_tensor* grad_output, const attune_tensor* grad_lse, const attune_tensor* output,
    const attune_tensor* lse, const attune_tensor* attn, const attune_tensor* attn_lse, size_t chunks,
    const attune_tensor* grad_attn, const attune_tensor* grad_attn_lse, const attune_options* options) {
  return guarded([&] {
    using Mutable = attune::MutableTensorView;
    attune::TensorView grad_lse_view;
    if (grad_lse != nullptr) grad_lse_view = view_of<attune::TensorView>("grad_lse", grad_lse);
    const auto attn_views = views_of("attn", attn, chunks);
    const auto attn_lse_views = views_of("attn_lse", attn_lse, chunks);
    const auto grad_attn_views = views_of<Mutable>("grad_attn", grad_attn, chunks);
    const auto grad_attn_lse_views = views_of<Mutable>("grad_attn_lse", grad_attn_lse, chunks);
    attune::merge_attentions_backward(view_of<attune::TensorView>("grad_output", grad_output),
                                      grad_lse != nullptr ? &grad_lse_view : nullptr,
                                      view_of<attune::TensorView>("output", output),
                                      view_of<attune::TensorView>("lse", lse), attn_views, attn_lse_views,
                                      grad_attn_views, grad_attn_lse_views, options_of(options));
  });
}

attune_status attune_explain(const attune_tensor* query, const attune_tensor* key, const attune_tensor* value,
                             int with_lse, const attune_bias* bias, const attune_options* options,
                             char** json) {
  return guarded([&] {
    if (json == nullptr) refuse("explain: null json");
    *json = c_string(attune::explain(
        view_of<attune::TensorView>("query", query), view_of<attune::TensorView>("key", key),
        view_of<attune::TensorView>("value", value), with_lse != 0, bias_of(bias), options_of(options)));
  });
}

attune_status attune_not_supported_reasons(int32_t family, const attune_tensor* query,
                                           const attune_tensor* key, const attune_tensor* value,
                                           const attune_bias* bias, const attune_options* options,
                                           char** json) {
  return write_reasons(attune::not_supported_reasons, family, query, key, value, bias, options, json);
}

attune_status attune_backward_not_supported_reasons(int32_t family, const attune_tensor* query,
                                                    const attune_tensor* key, const attune_tensor* value,
                                                    const attune_bias* bias, const attune_options* options,
                                                    char** json) {
  return write_reasons(attune::backward_not_supported_reasons, family, query, key, value, bias, options,
                       json);
}

void attune_free(void* pointer) {
  std::free(pointer);
}

attune_status attune_get_counters(attune_counters* counters) {
  return guarded([&] {
    if (counters == nullptr) refuse("counters: null pointer");
    const attune_counters given = versioned("counters", counters);
    const attune::Counters now = attune::counters();
    const attune_counters full{given.struct_size, now.compiles,     now.loads,         now.launches,
                               now.cache_hits,    now.cache_misses, now.cache_defects, now.cache_stores};
    std::memcpy(counters, &full, given.struct_size < sizeof full ? given.struct_size : sizeof full);
  });
}

const char* attune_last_kernel(void) {
  return attune::runtime::last_kernel_name().c_str();
}
