// What every tensor of a call is checked for, whatever its part in it, and its axes by name.
#pragma once

#include "attune/params.h"
#include "attune/tensor.h"
#include "base/result.h"

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

namespace attune::runtime {

// ---- Texts ----

/// "f32"; "dtype 77" of a number that names none.
std::string text_of(DType dtype);
/// "cpu", "cuda:1"
std::string text_of(Device device);
/// "[2, 3, 4]": the first `rank` entries.
std::string shape_text(const TensorView& tensor);

// ---- One tensor ----

/// A set of types: bit 1 << DType.
enum class DTypes : unsigned {
  floating = 1u << static_cast<int>(DType::f32) | 1u << static_cast<int>(DType::f16) |
             1u << static_cast<int>(DType::bf16),
  bias = floating | 1u << static_cast<int>(DType::boolean),
};

/// Is it of one of these types and on a device that can be? `name` begins every message.
Result<void> check_kind(const char* name, const TensorView& tensor, DTypes dtypes = DTypes::floating);

/// Has it the axes of attention: 3, 4 or 5 of them?
Result<void> check_rank(const char* name, const TensorView& tensor);

/// check_kind(), and is it of the query's rank and on its device?
Result<void> check_like(const TensorView& query, const char* name, const TensorView& other);

enum class LastStride { one, any };

/// A checked tensor and the bytes [begin, end) from its first element to its last; none when it is empty.
struct Memory {
  const char* name = "";
  const TensorView* tensor = nullptr;
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
};

/// Are extents, strides and pointer those of memory that can exist? Kind and rank have been checked.
Result<Memory> check_memory(const char* name, const TensorView& tensor, LastStride last = LastStride::one);

bool is_empty(const TensorView& tensor);

/// The stride of an axis; 0 where there is nothing to step over.
std::int64_t stride_of(const TensorView& tensor, int axis);

/// The axes of [B, M, K] (one group of one head), [B, M, H, K] (groups of one head) or [B, M, G, H, K].
struct Axes {
  std::int64_t batch = 0;
  std::int64_t len = 0;
  std::int64_t groups = 1;
  std::int64_t heads = 1;  // of a group
  std::int64_t dim = 0;
  kernel::Strides strides;
};
Axes axes_of(const TensorView& tensor);

/// The same heads in `groups` groups; their number divides that of the heads.
Axes regrouped(Axes axes, std::int64_t groups);

/// The shape of the lse of a query or of an attention: [B, H, M], or [B, G, H, M] in 5-D; contiguous,
/// float32.
TensorView lse_like(const TensorView& tensor);

// ---- What is written ----

/// The elements of an output may not share memory. Finds strides of 0 and more elements than bytes for them.
Result<void> check_distinct(const Memory& written);

/// An lse that is written: float32, contiguous, of the query's device and of this shape.
Result<Memory> check_lse(const char* name, const TensorView& lse, const TensorView& expected);

/// Refuses what is written where something is read.
Result<void> check_apart(const Memory& written, std::span<const Memory* const> others);
inline Result<void> check_apart(const Memory& written, std::initializer_list<const Memory*> others) {
  return check_apart(written, std::span(others.begin(), others.size()));
}

/// Do two tensors have a byte in common? Exact for views of common layouts, interleaved ones included; says
/// no where finding out takes too long.
bool overlap(const Memory& a, const Memory& b);

/// Workspaces begin at multiples of this, as allocations of CUDA do.
inline constexpr std::size_t kWorkspaceAlignment = 256;
Result<void> check_workspace(const void* workspace);

// ---- Several tensors ----

/// The largest power of two up to 16 that divides every address, and every step between rows, of the
/// tensors.
class Alignment {
 public:
  void include(const TensorView& tensor);
  int bytes() const;

 private:
  std::uint64_t bits_ = 16;
};

}  // namespace attune::runtime
