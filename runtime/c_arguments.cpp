#include "runtime/c_arguments.h"

#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

namespace attune::runtime {
namespace {

thread_local std::string last_text;

attune_status status_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::invalid_argument: return ATTUNE_INVALID_ARGUMENT;
    case ErrorKind::unsupported: return ATTUNE_UNSUPPORTED;
    case ErrorKind::environment: return ATTUNE_ENVIRONMENT;
    case ErrorKind::internal: return ATTUNE_INTERNAL;
  }
  return ATTUNE_INTERNAL;
}

Int32Table table_of(const char* name, const attune_tensor* tensor) {
  if (tensor == nullptr) refuse("bias: {} is null, but the bias has sequences", name);
  const auto view = view_of<TensorView>(name, tensor);
  if (view.rank < 1 || view.rank > 2) refuse("bias: {} has rank {}, expected 1", name, view.rank);
  return view;
}

std::shared_ptr<const Sequences> sequences_of(const attune_bias& bias) {
  auto sequences = std::make_shared<Sequences>(Sequences{.count = bias.sequences,
                                                         .q_starts = table_of("q_starts", bias.q_starts),
                                                         .k_starts = table_of("k_starts", bias.k_starts)});
  if (bias.k_lens != nullptr) sequences->k_lens = table_of("k_lens", bias.k_lens);
  if (bias.block_tables == nullptr) return sequences;
  if (bias.block_tables->rank != 2) {
    refuse("bias: block_tables has rank {}, expected [sequences, pages]", bias.block_tables->rank);
  }
  sequences->block_tables = table_of("block_tables", bias.block_tables);
  sequences->table_width = bias.block_tables->shape[1];
  sequences->page_size = bias.page_size;
  sequences->page_run = bias.page_run;
  return sequences;
}

/// Bit 0, "automatic", is any family, as no bit is.
std::vector<Family> families_of(uint32_t bits) {
  if (bits >> (ATTUNE_FAMILY_SM90 + 1) != 0) {
    refuse("options: families {:#x} has bits beyond those of attune_family", bits);
  }
  std::vector<Family> families;
  for (int family = ATTUNE_AUTOMATIC; family <= ATTUNE_FAMILY_SM90; ++family) {
    if ((bits >> family & 1u) != 0) families.push_back(static_cast<Family>(family));
  }
  return families;
}

}  // namespace

const char* last_error() {
  return last_text.c_str();
}

attune_status status_of_exception() noexcept {
  try {
    throw;
  } catch (const Error& error) {
    last_text = error.what();
    return status_of(error.kind());
  } catch (const std::bad_alloc&) {
    last_text = "out of memory";
    return ATTUNE_ENVIRONMENT;
  } catch (const std::exception& error) {
    last_text = error.what();
    return ATTUNE_INTERNAL;
  }
}

AttentionBias bias_of(const attune_bias* given) {
  AttentionBias result;
  if (given == nullptr) return result;
  const attune_bias bias = versioned("bias", given);
  result.name = bias.name != nullptr ? bias.name : "bias";
  result.window = {static_cast<Window::Anchor>(bias.anchor), bias.window_left, bias.window_right};
  if (bias.tensor != nullptr) result.tensor = view_of<TensorView>("attn_bias", bias.tensor);
  if (bias.sequences != 0 || bias.q_starts != nullptr) result.sequences = sequences_of(bias);
  return result;
}

AttentionOptions options_of(const attune_options* given) {
  const attune_options options = versioned("options", given);
  AttentionOptions result;
  if (options.scale != nullptr) result.scale = *options.scale;
  result.stream = options.stream;
  result.families = families_of(options.families);
  result.p = options.p;
  result.dropout = {options.seed, options.offset};
  result.workspace = options.workspace;
  result.workspace_bytes = options.workspace_bytes;
  if (options.output_dtype != nullptr) result.output_dtype = static_cast<DType>(*options.output_dtype);
  return result;
}

}  // namespace attune::runtime
