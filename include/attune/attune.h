// Attune: memory-efficient attention, compiled for the exact problem at first use.
//
//   attune::Attention result = attune::memory_efficient_attention_forward_requires_grad(
//       query, key, value, attune::LowerTriangularMask{});
//
// Tensors are views of the caller's memory, [B, M, H, K] (batch, length, heads, head dim) or [B, M, K] (one
// head), float32, float16 or bfloat16, with any strides whose last is 1. CPU tensors run on the CPU, CUDA
// tensors on their GPU, in the caller's stream and context. Every function throws attune::Error; its kind
// says whose fault it was. All functions are thread-safe.
#pragma once

#include "attune/error.h"
#include "attune/version.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#define ATTUNE_EXPORT __attribute__((visibility("default")))

namespace attune {

enum class DType { f32, f16, bf16 };
enum class DeviceType { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;
  bool operator==(const Device&) const = default;
};

inline constexpr int kMaxRank = 5;

/// A non-owning view. Shape and strides in elements; only the first `rank` entries count.
template <typename Pointer>
struct BasicTensorView {
  Pointer data = nullptr;
  DType dtype = DType::f32;
  Device device;
  int rank = 0;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> strides{};

  BasicTensorView() = default;
  /// A contiguous (row-major) view of `sizes`.
  BasicTensorView(Pointer pointer, DType type, std::initializer_list<std::int64_t> sizes, Device where = {})
      : data(pointer), dtype(type), device(where), rank(static_cast<int>(sizes.size())) {
    int axis = 0;
    for (std::int64_t size : sizes) {
      if (axis < kMaxRank) shape[axis++] = size;
    }
    std::int64_t stride = 1;
    for (axis = (rank < kMaxRank ? rank : kMaxRank) - 1; axis >= 0; --axis) {
      strides[axis] = stride;
      if (__builtin_mul_overflow(stride, shape[axis] > 1 ? shape[axis] : 1, &stride)) stride = 0;
    }
  }
  /// A writable view is a readable one.
  template <typename Other, typename = std::enable_if_t<std::is_convertible_v<Other, Pointer> &&
                                                        !std::is_same_v<Other, Pointer>>>
  BasicTensorView(const BasicTensorView<Other>& other)  // NOLINT: implicit
      : data(other.data),
        dtype(other.dtype),
        device(other.device),
        rank(other.rank),
        shape(other.shape),
        strides(other.strides) {}
};
using TensorView = BasicTensorView<const void*>;
using MutableTensorView = BasicTensorView<void*>;

/// Memory that Attune allocated, contiguous; freed by the destructor (for CUDA in order with the default
/// stream).
class ATTUNE_EXPORT Tensor {
 public:
  Tensor();
  Tensor(DType dtype, Device device, const std::vector<std::int64_t>& shape, void* stream = nullptr);
  Tensor(Tensor&&) noexcept;
  Tensor& operator=(Tensor&&) noexcept;
  ~Tensor();

  MutableTensorView view() const { return view_; }
  void* data() const { return view_.data; }

 private:
  MutableTensorView view_;
};

// ---- Biases. Query i sees key j iff the predicate holds; len_q and len_k are the two lengths. ----

/// j <= i + (len_k - len_q) and j > i + (len_k - len_q) - window_size. window_size >= 1 counts the diagonal
/// itself.
struct LowerTriangularFromBottomRightLocalAttentionMask {
  std::int64_t window_size = 1;
};

/// j <= i: causal, anchored at the first query and the first key.
struct LowerTriangularMask {};

/// j <= i + (len_k - len_q): causal, anchored at the last query and the last key.
struct LowerTriangularFromBottomRightMask {
  LowerTriangularFromBottomRightLocalAttentionMask make_local_attention(std::int64_t window_size) const {
    return {window_size};
  }
};

/// i + s - window_left <= j <= i + s + window_right with s = len_k - len_q; both reaches >= 0.
struct LocalAttentionFromBottomRightMask {
  std::int64_t window_left = 0;
  std::int64_t window_right = 0;
};

using AttentionBias =
    std::variant<std::monostate, LowerTriangularMask, LowerTriangularFromBottomRightMask,
                 LowerTriangularFromBottomRightLocalAttentionMask, LocalAttentionFromBottomRightMask>;

// ---- Attention ----

/// Kernel families, to force one (the default picks and `attune explain` says why).
enum class Family { automatic, cpu, simt, mma };

struct AttentionOptions {
  std::optional<double> scale;  ///< Factor of query * key; default head_dim ** -0.5. Must be finite.
  void* stream = nullptr;       ///< CUstream of CUDA tensors; null is the default stream. Ignored on the CPU.
  Family family = Family::automatic;
};

struct Attention {
  Tensor output;  ///< [B, Mq, H, Kv], the inputs' dtype
  Tensor lse;  ///< [B, H, Mq] float32: ln of the sum of exp(scale * q.k) over visible keys; -inf where there
               ///< is none
};

/// softmax(scale * query key^T + bias) value, as in Rabe and Staats, "Self-attention Does Not Need O(n^2)
/// Memory". query [B, Mq, H, K], key [B, Mkv, H, K], value [B, Mkv, H, Kv], output [B, Mq, H, Kv]; lse, if
/// given, [B, H, Mq] contiguous float32. A query that sees no key gets output 0 and lse -inf. `output` must
/// not overlap the inputs. CUDA work is only enqueued: the call does not wait for the GPU.
ATTUNE_EXPORT void memory_efficient_attention_forward(const TensorView& query, const TensorView& key,
                                                      const TensorView& value,
                                                      const MutableTensorView& output,
                                                      const MutableTensorView* lse = nullptr,
                                                      const AttentionBias& bias = {},
                                                      const AttentionOptions& options = {});

/// The same into memory that Attune allocates.
ATTUNE_EXPORT Tensor memory_efficient_attention(const TensorView& query, const TensorView& key,
                                                const TensorView& value, const AttentionBias& bias = {},
                                                const AttentionOptions& options = {});

/// Output and log-sum-exp, which a backward pass needs.
ATTUNE_EXPORT Attention memory_efficient_attention_forward_requires_grad(
    const TensorView& query, const TensorView& key, const TensorView& value, const AttentionBias& bias = {},
    const AttentionOptions& options = {});

/// Compiles and loads the kernel that the same call would use, without touching the tensors' data.
ATTUNE_EXPORT void prepare(const TensorView& query, const TensorView& key, const TensorView& value,
                           bool with_lse, const AttentionBias& bias = {},
                           const AttentionOptions& options = {});

// ---- Introspection ----

/// Which kernel the call would run and why, as a JSON object: family, candidate, spec, key, device, reasons
/// against the other families, and whether it is loaded, cached or has to be compiled.
ATTUNE_EXPORT std::string explain(const TensorView& query, const TensorView& key, const TensorView& value,
                                  bool with_lse, const AttentionBias& bias = {},
                                  const AttentionOptions& options = {});

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

/// The family and candidate that the calling thread's last attention call ran, "mma_128x64x4"; empty before
/// the first.
ATTUNE_EXPORT std::string last_kernel();

}  // namespace attune
