// A strided tensor among poison: every byte of its storage that is not an element, before, between and behind
// them, holds a pattern that is NaN in every type. A kernel that reads a neighbour's rows, a gap or past the
// end computes a NaN; one that writes there leaves a trace.
#pragma once

#include "attune/attune.h"
#include "tests/support/random.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace attune::test {

/// How a tensor's axes lie in memory. The last axis is innermost, with stride 1.
struct Layout {
  std::array<int, kMaxRank> order{0, 1, 2, 3, 4};  ///< axes, the outermost first
  std::array<std::int64_t, kMaxRank> gap{};        ///< unused elements behind each slice of an axis
  std::array<bool, kMaxRank> broadcast{};          ///< stride 0: all indices share one slice
  std::array<bool, kMaxRank> reversed{};           ///< negative stride
  std::int64_t granule = 1;                        ///< every stride is a multiple of it, in elements
  std::int64_t offset = 0;                         ///< elements from a 64-byte boundary to the lowest one
};

enum class Access { read, write };

/// Any layout whose rows are aligned to `align_bytes`, a power of two up to 16, and below 16 to no more. Only
/// a tensor that is read is broadcast.
Layout random_layout(Random& random, DType dtype, int rank, int align_bytes, Access access);

class GuardedTensor {
 public:
  GuardedTensor() = default;
  GuardedTensor(DType dtype, const std::vector<std::int64_t>& shape, const Layout& layout);

  /// Writes next() to every element, row-major.
  void fill(const std::function<float()>& next);

  MutableTensorView view() const;
  /// The same tensor in a copy of the storage elsewhere, 64-byte aligned.
  MutableTensorView view_in(void* storage, Device device) const;
  /// All of the memory, guards included; for copies to and from a GPU.
  std::span<std::byte> storage() const;

  /// The elements, row-major.
  std::vector<double> values() const;
  /// What was written where nothing may be: "" when every byte outside the elements holds its poison and, for
  /// a tensor that is only read, every element is what fill() wrote.
  std::string damage(Access allowed) const;

 private:
  struct alignas(64) Block {
    std::array<std::byte, 64> bytes;
  };
  mutable std::vector<Block> blocks_;
  std::vector<Block> sealed_;  // the storage as it was before any kernel ran
  MutableTensorView shape_;    // without data
  std::int64_t first_ = 0;     // bytes from the storage's begin to element [0, 0, ...]
};

}  // namespace attune::test
