// Views of the caller's tensors, and tensors that Attune allocates.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <vector>

#ifndef ATTUNE_EXPORT
#define ATTUNE_EXPORT __attribute__((visibility("default")))
#endif

namespace attune {

/// The first three are what attention computes with; boolean (one byte) and i32 serve biases and their
/// tables.
enum class DType { f32, f16, bf16, boolean, i32 };

/// Bytes of one element.
constexpr std::int64_t item_bytes(DType dtype) {
  switch (dtype) {
    case DType::f32:
    case DType::i32: return 4;
    case DType::f16:
    case DType::bf16: return 2;
    case DType::boolean: return 1;
  }
  return 0;
}

enum class DeviceType { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;
  bool operator==(const Device&) const = default;
};

inline constexpr int kMaxRank = 6;  // [chunks, B, M, G, H, K]

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

}  // namespace attune
