// A strided tensor among poison: every byte of its storage that is not an element, before, between and behind
// them, holds a pattern that is NaN in every floating type. A kernel that reads a neighbour's rows, a gap or
// past the end computes a NaN; one that writes there leaves a trace.
#pragma once

#include "attune/tensor.h"
#include "tools/verify/random.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace attune::verify {

/// How a tensor's axes lie in memory.
struct Layout {
  std::array<int, kMaxRank> order{0, 1, 2, 3, 4, 5};  ///< axes, the outermost first
  std::array<std::int64_t, kMaxRank> gap{};           ///< unused elements behind all slices of an axis
  std::array<bool, kMaxRank> broadcast{};             ///< stride 0: all indices share one slice
  std::array<bool, kMaxRank> reversed{};              ///< negative stride
  std::int64_t step = 1;                              ///< the innermost axis's stride
  std::int64_t granule = 1;                           ///< every other stride is a multiple of it, in elements
  std::int64_t offset = 0;                            ///< elements from an aligned address to the lowest one
};

enum class Access { read, write };

/// Any layout with a last stride of 1 whose rows are aligned to `align_bytes`, a power of two up to 16, and
/// below 16 to no more. Only a tensor that is read is broadcast.
Layout random_layout(Random& random, DType dtype, int rank, int align_bytes, Access access);
/// A layout that a tensor copy engine takes (runtime/boxes.h).
Layout random_box_layout(Random& random, DType dtype, int rank);
/// Likewise, for a bias tensor [..., query, key].
Layout random_bias_box_layout(Random& random, DType dtype, int rank);

/// Any layout at all, for a tensor that is read element by element.
Layout random_strides(Random& random, int rank);

/// Likewise, without columns that lie side by side.
Layout random_scattered(Random& random, DType dtype, const std::vector<std::int64_t>& shape);

/// A tensor's index; the entries from its rank on are 0.
using Index = std::array<std::int64_t, kMaxRank>;

class GuardedTensor {
 public:
  static constexpr std::size_t kAlignment = 256;  // that of a workspace

  GuardedTensor() = default;
  GuardedTensor(DType dtype, const std::vector<std::int64_t>& shape, const Layout& layout);
  /// A contiguous table.
  explicit GuardedTensor(const std::vector<std::int32_t>& table);

  /// Writes next() to every element, row-major.
  void fill(const std::function<float()>& next);
  /// Poisons the elements that no used index reaches.
  void poison_unused(const std::function<bool(const Index&)>& used);
  /// Writes the elements of a tensor of the same shape, as a kernel would: what is outside them stays sealed.
  void assign(const TensorView& from);

  MutableTensorView view() const;
  /// The same tensor in a copy of the storage elsewhere, as aligned.
  MutableTensorView view_in(void* storage, Device device) const;
  /// All of the memory, guards included; for copies to and from a GPU.
  std::span<std::byte> storage() const;

  /// The elements, row-major.
  std::vector<double> values() const;
  /// What was written where nothing may be: "" when every byte outside the elements holds its poison and, for
  /// a tensor that is only read, every element is what fill() wrote.
  std::string damage(Access allowed) const;

 private:
  struct alignas(kAlignment) Block {
    std::array<std::byte, kAlignment> bytes;
  };
  mutable std::vector<Block> blocks_;
  std::vector<Block> sealed_;  // the storage as it was before any kernel ran
  MutableTensorView shape_;    // without data
  std::int64_t first_ = 0;     // bytes from the storage's begin to element [0, 0, ...]
};

/// A tensor of a call by its name, and what the call may do with it.
struct Part {
  const char* name;
  const GuardedTensor* tensor;
  Access access;
};

}  // namespace attune::verify
