// The C ABI over the C++ API: nothing but statuses leaves, and the text of the last failure stays with the
// thread.
#include "attune/attune.h"
#include "attune/attune_c.h"
#include "runtime/engine.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <array>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

namespace {

using attune::Error;
using attune::ErrorKind;

static_assert(ATTUNE_MAX_RANK == attune::kMaxRank);

thread_local std::string last_error;

attune_status status_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::invalid_argument: return ATTUNE_INVALID_ARGUMENT;
    case ErrorKind::unsupported: return ATTUNE_UNSUPPORTED;
    case ErrorKind::environment: return ATTUNE_ENVIRONMENT;
    case ErrorKind::internal: return ATTUNE_INTERNAL;
  }
  return ATTUNE_INTERNAL;
}

/// Runs `body`; whatever it throws becomes a status and a text.
template <typename Body>
attune_status guarded(Body&& body) noexcept {
  try {
    body();
    return ATTUNE_OK;
  } catch (const Error& error) {
    last_error = error.what();
    return status_of(error.kind());
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
    return ATTUNE_ENVIRONMENT;
  } catch (const std::exception& error) {
    last_error = error.what();
    return ATTUNE_INTERNAL;
  }
}

[[noreturn]] void refuse(std::string message) {
  throw Error(ErrorKind::invalid_argument, std::move(message));
}

template <typename View>
View view_of(const char* name, const attune_tensor* tensor) {
  if (tensor == nullptr) refuse(fmt::format("{}: null tensor", name));
  View view;
  view.data = tensor->data;
  view.dtype = static_cast<attune::DType>(tensor->dtype);
  view.device = {static_cast<attune::DeviceType>(tensor->device_type), tensor->device_index};
  view.rank = tensor->rank;
  std::memcpy(view.shape.data(), tensor->shape, sizeof tensor->shape);
  std::memcpy(view.strides.data(), tensor->strides, sizeof tensor->strides);
  return view;
}

/// A struct of the caller's version: what an older caller does not have stays zero.
template <typename Struct>
Struct versioned(const char* name, const Struct* given) {
  Struct copy{};
  if (given == nullptr) return copy;
  if (given->struct_size < sizeof(size_t) || given->struct_size > 4096) {
    refuse(fmt::format("{}: struct_size {} is not set; start from its INIT macro", name, given->struct_size));
  }
  std::memcpy(&copy, given, given->struct_size < sizeof copy ? given->struct_size : sizeof copy);
  return copy;
}

attune::Int32Table table_of(const char* name, const attune_tensor* tensor) {
  if (tensor == nullptr) refuse(fmt::format("bias: {} is null, but the bias has sequences", name));
  const auto view = view_of<attune::TensorView>(name, tensor);
  if (view.rank < 1 || view.rank > 2)
    refuse(fmt::format("bias: {} has rank {}, expected 1", name, view.rank));
  return view;
}

std::shared_ptr<const attune::Sequences> sequences_of(const attune_bias& bias) {
  auto sequences =
      std::make_shared<attune::Sequences>(attune::Sequences{.count = bias.sequences,
                                                            .q_starts = table_of("q_starts", bias.q_starts),
                                                            .k_starts = table_of("k_starts", bias.k_starts)});
  if (bias.k_lens != nullptr) sequences->k_lens = table_of("k_lens", bias.k_lens);
  if (bias.block_tables == nullptr) return sequences;
  if (bias.block_tables->rank != 2) {
    refuse(
        fmt::format("bias: block_tables has rank {}, expected [sequences, pages]", bias.block_tables->rank));
  }
  sequences->block_tables = table_of("block_tables", bias.block_tables);
  sequences->table_width = bias.block_tables->shape[1];
  sequences->page_size = bias.page_size;
  sequences->page_run = bias.page_run;
  return sequences;
}

attune::AttentionBias bias_of(const attune_bias* given) {
  attune::AttentionBias result;
  if (given == nullptr) return result;
  const attune_bias bias = versioned("bias", given);
  result.name = bias.name != nullptr ? bias.name : "bias";
  result.window = {static_cast<attune::Window::Anchor>(bias.anchor), bias.window_left, bias.window_right};
  if (bias.tensor != nullptr) result.tensor = view_of<attune::TensorView>("attn_bias", bias.tensor);
  if (bias.sequences != 0 || bias.q_starts != nullptr) result.sequences = sequences_of(bias);
  return result;
}

/// Bit 0, "automatic", is any family, as no bit is.
std::vector<attune::Family> families_of(uint32_t bits) {
  if (bits >> (ATTUNE_FAMILY_SM90 + 1) != 0) {
    refuse(fmt::format("options: families {:#x} has bits beyond those of attune_family", bits));
  }
  std::vector<attune::Family> families;
  for (int family = ATTUNE_AUTOMATIC; family <= ATTUNE_FAMILY_SM90; ++family) {
    if ((bits >> family & 1u) != 0) families.push_back(static_cast<attune::Family>(family));
  }
  return families;
}

attune::AttentionOptions options_of(const attune_options* given) {
  const attune_options options = versioned("options", given);
  attune::AttentionOptions result;
  if (options.scale != nullptr) result.scale = *options.scale;
  result.stream = options.stream;
  result.families = families_of(options.families);
  result.p = options.p;
  result.dropout = {options.seed, options.offset};
  if (options.output_dtype != nullptr)
    result.output_dtype = static_cast<attune::DType>(*options.output_dtype);
  return result;
}

/// The arguments that the functions about one backward call share.
struct Backward {
  attune::TensorView grad_output, output, lse, query, key, value;
  std::array<attune::MutableTensorView, 4> memory;
  attune::GradientViews gradients;
  attune::AttentionBias bias;
  attune::AttentionOptions options;
  attune::TensorView grad_lse;
  attune::BackwardOptions backward;

  Backward(const attune_tensor* given_grad_output, const attune_tensor* given_output,
           const attune_tensor* given_lse, const attune_tensor* given_query, const attune_tensor* given_key,
           const attune_tensor* given_value, const attune_gradients* given_gradients,
           const attune_bias* given_bias, const attune_options* given_options,
           const attune_backward_options* given_backward)
      : grad_output(view_of<attune::TensorView>("grad_output", given_grad_output)),
        output(view_of<attune::TensorView>("output", given_output)),
        lse(view_of<attune::TensorView>("lse", given_lse)),
        query(view_of<attune::TensorView>("query", given_query)),
        key(view_of<attune::TensorView>("key", given_key)),
        value(view_of<attune::TensorView>("value", given_value)),
        bias(bias_of(given_bias)),
        options(options_of(given_options)) {
    const attune_gradients wanted = versioned("gradients", given_gradients);
    gradients = {gradient(0, "grad_query", wanted.query), gradient(1, "grad_key", wanted.key),
                 gradient(2, "grad_value", wanted.value), gradient(3, "grad_bias", wanted.bias)};
    const attune_backward_options chosen = versioned("backward options", given_backward);
    backward.deterministic = chosen.deterministic != 0;
    backward.workspace = chosen.workspace;
    backward.workspace_bytes = chosen.workspace_bytes;
    if (chosen.grad_lse == nullptr) return;
    grad_lse = view_of<attune::TensorView>("grad_lse", chosen.grad_lse);
    backward.grad_lse = &grad_lse;
  }
  Backward(const Backward&) = delete;  // its options point into it
  Backward& operator=(const Backward&) = delete;

  /// Calls one of the C++ functions with all of them.
  template <typename Function>
  auto pass_to(Function&& function) const {
    return function(grad_output, output, lse, query, key, value, gradients, bias, options, backward);
  }

 private:
  const attune::MutableTensorView* gradient(std::size_t index, const char* name, const attune_tensor* given) {
    if (given == nullptr) return nullptr;
    memory[index] = view_of<attune::MutableTensorView>(name, given);
    return &memory[index];
  }
};

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
  return last_error.c_str();
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
    const Backward call(grad_output, output, lse, query, key, value, gradients, bias, options, backward);
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
    const Backward call(grad_output, output, lse, query, key, value, gradients, bias, options, backward);
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
    const Backward call(grad_output, output, lse, query, key, value, gradients, bias, options, backward);
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
    const Backward call(grad_output, output, lse, query, key, value, gradients, bias, options, backward);
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
