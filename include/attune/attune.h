// Attune: memory-efficient attention, compiled for the exact problem at first use.
//
//   attune::Attention result = attune::memory_efficient_attention_forward_requires_grad(
//       query, key, value, attune::LowerTriangularMask{});
//
// Tensors are views of the caller's memory, [B, M, H, K] (batch, length, heads, head dim), [B, M, K] (one
// head) or [B, M, G, H, K] (groups of heads), float32, float16 or bfloat16, with any strides whose last is 1.
// CPU tensors run on the CPU, CUDA tensors on their GPU, in the caller's stream and context. Every function
// throws attune::Error; its kind says whose fault it was. All functions are thread-safe.
#pragma once

#include "attune/attn_bias.h"
#include "attune/error.h"
#include "attune/tensor.h"
#include "attune/version.h"

#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace attune {

// ---- Attention ----

/// Kernel families, to force one (the default picks and `attune explain` says why).
enum class Family { automatic, cpu, simt, mma, sm90 };

/// Where a dropout's random numbers come from: a seed, and how many calls have drawn from it.
struct ATTUNE_EXPORT DropoutState {
  std::uint64_t seed = 0;
  std::uint64_t offset = 0;
};

/// Hands out states: one per call that drops, so that calls differ and a seed reproduces all of them.
/// Thread-safe.
class Generator {
 public:
  explicit Generator(std::uint64_t seed = 0) : state_{seed, 0} {}
  void manual_seed(std::uint64_t seed) {
    const std::lock_guard lock(mutex_);
    state_ = {seed, 0};
  }
  DropoutState next() {
    const std::lock_guard lock(mutex_);
    const DropoutState now = state_;
    ++state_.offset;
    return now;
  }

 private:
  std::mutex mutex_;
  DropoutState state_;
};

struct AttentionOptions {
  std::optional<double> scale;  ///< Factor of query * key; default head_dim ** -0.5. Must be finite.
  void* stream = nullptr;       ///< CUstream of CUDA tensors; null is the default stream. Ignored on the CPU.
  /// The families that may run; empty: any. The order does not matter, the registry's preference does.
  std::vector<Family> families;
  double p = 0;          ///< Dropout probability in [0, 1], rounded to a multiple of 2^-16.
  DropoutState dropout;  ///< Which pairs are dropped; the same state drops the same pairs on every device.
  std::optional<DType> output_dtype;  ///< Of results that Attune allocates; default as each function says.
  /// Scratch memory of forward calls, on the tensors' device, at a multiple of 256: forward_workspace_bytes()
  /// says who needs any. Null: Attune allocates it in the stream's order.
  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
};

struct Attention {
  Tensor output;  ///< [B, Mq, H, Kv] or [B, Mq, G, H, Kv]
  Tensor lse;  ///< [B, H, Mq] or [B, G, H, Mq] float32: ln of the sum of exp(score) over visible keys; -inf
               ///< where there is none. Packed with sequences: [1, H, all query rows].
};

/// softmax(scale * query key^T + bias) value, as in Rabe and Staats, "Self-attention Does Not Need O(n^2)
/// Memory". query [B, Mq, H, K], key [B, Mkv, H, K], value [B, Mkv, H, Kv], output [B, Mq, H, Kv] of any of
/// the three types; lse, if given, [B, H, Mq] contiguous float32. Key and value may have fewer heads, as long
/// as their number divides H: query head h then uses key head h / (H / Hkv). In 5-D [B, M, G, H, K], an
/// extent of 1 of key and value broadcasts over G or H. A query that sees no key gets output 0 and lse -inf.
/// `output` must not overlap the inputs. CUDA work is only enqueued: the call does not wait for the GPU.
ATTUNE_EXPORT void memory_efficient_attention_forward(const TensorView& query, const TensorView& key,
                                                      const TensorView& value,
                                                      const MutableTensorView& output,
                                                      const MutableTensorView* lse = nullptr,
                                                      const AttentionBias& bias = {},
                                                      const AttentionOptions& options = {});

/// Bytes of workspace that the same call needs: 0, but where few queries leave most of a GPU idle, as in
/// decoding, and its keys are split over blocks. Only shapes, strides and types of the tensors matter.
ATTUNE_EXPORT std::size_t forward_workspace_bytes(const TensorView& query, const TensorView& key,
                                                  const TensorView& value, bool with_lse,
                                                  const AttentionBias& bias = {},
                                                  const AttentionOptions& options = {});

/// The same into memory that Attune allocates; output_dtype defaults to the query's.
ATTUNE_EXPORT Tensor memory_efficient_attention(const TensorView& query, const TensorView& key,
                                                const TensorView& value, const AttentionBias& bias = {},
                                                const AttentionOptions& options = {});

/// Output and log-sum-exp, which a backward pass needs.
ATTUNE_EXPORT Attention memory_efficient_attention_forward_requires_grad(
    const TensorView& query, const TensorView& key, const TensorView& value, const AttentionBias& bias = {},
    const AttentionOptions& options = {});

/// Attention over some of the keys, to be merged with others'; output_dtype defaults to float32, and p must
/// be 0.
ATTUNE_EXPORT Attention memory_efficient_attention_partial(const TensorView& query, const TensorView& key,
                                                           const TensorView& value,
                                                           const AttentionBias& bias = {},
                                                           const AttentionOptions& options = {});

/// Combines attention over disjoint sets of keys: out = sum_i out_i exp(lse_i) / sum_i exp(lse_i), lse = ln
/// sum_i exp(lse_i) (Juravsky et al., "Hydragen", arXiv 2402.05099). attn: [B, M, H, Kv] or [B, M, G, H, Kv]
/// each, of one type; lse: float32 [B, H, >= M] or [B, G, H, >= M] each; any strides, the last of attn 1. A
/// chunk whose lse is -inf counts for nothing, whatever its values. output_dtype defaults to attn's; without
/// write_lse the result's lse is empty. Of options, stream and output_dtype count.
ATTUNE_EXPORT Attention merge_attentions(std::span<const TensorView> attn, std::span<const TensorView> lse,
                                         bool write_lse = true, const AttentionOptions& options = {});
/// Stacked: [chunks, B, M, H, Kv] and [chunks, B, H, M], or with G.
ATTUNE_EXPORT Attention merge_attentions(const TensorView& attn, const TensorView& lse, bool write_lse = true,
                                         const AttentionOptions& options = {});
/// Into the caller's memory; lse_out may be null.
ATTUNE_EXPORT void merge_attentions(std::span<const TensorView> attn, std::span<const TensorView> lse,
                                    const MutableTensorView& output, const MutableTensorView* lse_out,
                                    const AttentionOptions& options = {});

// ---- Gradients ----

/// Where gradients go. Those that are null are neither wanted nor computed.
struct GradientViews {
  const MutableTensorView* query = nullptr;  ///< of query's shape and type, as the next two of theirs
  const MutableTensorView* key = nullptr;
  const MutableTensorView* value = nullptr;
  const MutableTensorView* bias =
      nullptr;  ///< of the bias tensor's shape and type; summed where its extent is 1
};

struct Gradients {
  Tensor query, key, value;
  Tensor bias;  ///< empty unless asked for
};

struct BackwardOptions {
  const TensorView* grad_lse = nullptr;  ///< gradient of the lse, in a layout of the lse; null: 0
  /// The same bits in every run. Without, sums of the query's gradient may depend on the order in which a
  /// GPU's blocks finish; docs/semantics.md has the cost.
  bool deterministic = false;
  bool bias_gradient = false;  ///< of the allocating call: gives the bias tensor's gradient, too
  /// Scratch memory on the tensors' device, at a multiple of 256; null: Attune allocates it in the stream's
  /// order.
  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
};

/// Gradients of memory_efficient_attention with respect to query, key, value and an additive bias tensor (Dao
/// et al., "FlashAttention", arXiv 2205.14135, appendix B.4), for everything that forward takes. `output` and
/// `lse` are forward's for the same arguments, dropout state included; grad_output has the output's shape and
/// type and any strides, 0 included. lse: float32 [B, H, >= Mq] or [B, G, H, >= Mq], any strides; with
/// sequences packed [1, (G,) H, >= all query rows] or padded [sequences, (G,) H, >= longest]. -inf or +inf
/// marks a query that saw no key: its gradients are 0, as are those of keys that no query sees. Results must
/// not overlap each other or what is read. options.families restricts the gradients' kernels;
/// options.output_dtype is not looked at.
ATTUNE_EXPORT void memory_efficient_attention_backward(
    const TensorView& grad_output, const TensorView& output, const TensorView& lse, const TensorView& query,
    const TensorView& key, const TensorView& value, const GradientViews& gradients,
    const AttentionBias& bias = {}, const AttentionOptions& options = {},
    const BackwardOptions& backward = {});

/// The same into memory that Attune allocates, contiguous.
ATTUNE_EXPORT Gradients memory_efficient_attention_backward(
    const TensorView& grad_output, const TensorView& output, const TensorView& lse, const TensorView& query,
    const TensorView& key, const TensorView& value, const AttentionBias& bias = {},
    const AttentionOptions& options = {}, const BackwardOptions& backward = {});

/// Bytes of workspace that the same call needs: some numbers of each query, whatever the number of keys. Only
/// shapes, strides and types of the tensors matter.
ATTUNE_EXPORT std::size_t backward_workspace_bytes(const TensorView& grad_output, const TensorView& output,
                                                   const TensorView& lse, const TensorView& query,
                                                   const TensorView& key, const TensorView& value,
                                                   const GradientViews& gradients,
                                                   const AttentionBias& bias = {},
                                                   const AttentionOptions& options = {},
                                                   const BackwardOptions& backward = {});

/// Compiles and loads the kernels that the same call would use, without touching the tensors' data.
ATTUNE_EXPORT void prepare_backward(const TensorView& grad_output, const TensorView& output,
                                    const TensorView& lse, const TensorView& query, const TensorView& key,
                                    const TensorView& value, const GradientViews& gradients,
                                    const AttentionBias& bias = {}, const AttentionOptions& options = {},
                                    const BackwardOptions& backward = {});

/// Gradients of merge_attentions with respect to every chunk: with w_i = exp(lse_i - lse), that of attn[i] is
/// w_i grad_output and that of attn_lse[i] is w_i (grad_lse + sum_c (attn[i] - output)_c grad_output_c).
/// `attn` and `attn_lse` are the chunks that were merged, `output` and `lse` what they merged to; grad_output
/// has the output's shape and type and any strides, 0 included, and grad_lse, which may be null for 0, a
/// layout of the lse. lse: float32 [B, H, >= M] or [B, G, H, >= M], any strides. grad_attn[i] has the shape
/// and type of attn[i], grad_attn_lse[i] is float32 [B, H, M] or [B, G, H, M], contiguous. A chunk whose lse
/// is -inf gets zeros, whatever its values. Results must not overlap each other or what is read. Of options,
/// stream counts.
ATTUNE_EXPORT void merge_attentions_backward(const TensorView& grad_output, const TensorView* grad_lse,
                                             const TensorView& output, const TensorView& lse,
                                             std::span<const TensorView> attn,
                                             std::span<const TensorView> attn_lse,
                                             std::span<const MutableTensorView> grad_attn,
                                             std::span<const MutableTensorView> grad_attn_lse,
                                             const AttentionOptions& options = {});

/// The same into memory that Attune allocates, contiguous: the gradients of each chunk's output and lse.
ATTUNE_EXPORT std::vector<Attention> merge_attentions_backward(
    const TensorView& grad_output, const TensorView* grad_lse, const TensorView& output,
    const TensorView& lse, std::span<const TensorView> attn, std::span<const TensorView> attn_lse,
    const AttentionOptions& options = {});

// ---- Ahead of time ----

/// Compiles and loads the kernel that the same call would use, without touching the tensors' data.
ATTUNE_EXPORT void prepare(const TensorView& query, const TensorView& key, const TensorView& value,
                           bool with_lse, const AttentionBias& bias = {},
                           const AttentionOptions& options = {});

// ---- Introspection ----

/// Why the family cannot run the call, the most useful reason first; empty when it can. A call that no family
/// could run because its arguments make no sense gives that reason for every family.
ATTUNE_EXPORT std::vector<std::string> not_supported_reasons(Family family, const TensorView& query,
                                                             const TensorView& key, const TensorView& value,
                                                             const AttentionBias& bias = {},
                                                             const AttentionOptions& options = {});

/// Which kernel the call would run and why, as a JSON object: family, candidate, spec, key, device, reasons
/// against the other families, whether it is loaded, cached or has to be compiled, and a tuned choice. Where
/// keys are split over blocks it is the kernel of their parts, with "splits", how many, and "merge" like it.
ATTUNE_EXPORT std::string explain(const TensorView& query, const TensorView& key, const TensorView& value,
                                  bool with_lse, const AttentionBias& bias = {},
                                  const AttentionOptions& options = {});

/// The same about the gradients of query, key and value.
ATTUNE_EXPORT std::vector<std::string> backward_not_supported_reasons(Family family, const TensorView& query,
                                                                      const TensorView& key,
                                                                      const TensorView& value,
                                                                      const AttentionBias& bias = {},
                                                                      const AttentionOptions& options = {});

/// The kernels of a backward call, in the order of their launches, as a JSON object: "kernels", each as
/// explain() has it, and "workspace_bytes".
ATTUNE_EXPORT std::string explain_backward(const TensorView& grad_output, const TensorView& output,
                                           const TensorView& lse, const TensorView& query,
                                           const TensorView& key, const TensorView& value,
                                           const GradientViews& gradients, const AttentionBias& bias = {},
                                           const AttentionOptions& options = {},
                                           const BackwardOptions& backward = {});

struct Counters {
  std::uint64_t compiles = 0;       ///< kernels that a compiler built in this process
  std::uint64_t loads = 0;          ///< images loaded
  std::uint64_t launches = 0;       ///< kernels run
  std::uint64_t cache_hits = 0;     ///< entries found on disk
  std::uint64_t cache_misses = 0;   ///< entries not found on disk
  std::uint64_t cache_defects = 0;  ///< entries refused and quarantined
  std::uint64_t cache_stores = 0;   ///< entries written
};
ATTUNE_EXPORT Counters counters();

/// The candidate that the calling thread's last call ran, "mma_128x64x4_d64"; of a backward call, the one
/// that computed the gradients of key and value, if any were wanted. Empty before the first.
ATTUNE_EXPORT std::string last_kernel();

}  // namespace attune
