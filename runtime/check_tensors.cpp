#include "runtime/check_tensors.h"

#include "attune/semantics.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <span>

namespace attune::runtime {
namespace {

/// Steps between elements beyond this are no memory of any machine, and sums of a few of them do not
/// overflow.
constexpr std::int64_t kMaxReach = std::int64_t{1} << 58;

bool contains(DTypes dtypes, DType dtype) {
  return (static_cast<unsigned>(dtypes) >> static_cast<unsigned>(dtype) & 1u) != 0;
}

/// The bytes that an axis reaches over; negative with a negative stride. Nothing: beyond any memory.
Result<std::int64_t> reach_of(const char* name, const TensorView& t, int axis) {
  std::int64_t reach = 0;
  if (t.strides[axis] == std::numeric_limits<std::int64_t>::min() ||
      __builtin_mul_overflow(t.strides[axis], (t.shape[axis] - 1) * item_bytes(t.dtype), &reach) ||
      reach > kMaxReach || reach < -kMaxReach) {
    return invalid_argument(fmt::format("{}: shape {} with stride {} on axis {} overflows the address space",
                                        name, shape_text(t), t.strides[axis], axis));
  }
  return reach;
}

// ---- Overlap. Elements a[i] and b[j] share a byte iff the difference of their addresses, a sum of one term
// for each axis, is within an element's size. ----

/// step * x for some 0 <= x <= count.
struct Term {
  std::int64_t step;
  std::int64_t count;
};

/// The terms of the address differences a - b, the largest step first.
class Differences {
 public:
  Differences(const TensorView& a, const TensorView& b)
      : base_(static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(a.data)) -
              static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(b.data))) {
    add(a, 1);
    add(b, -1);
    std::ranges::sort(terms(), std::ranges::greater{}, &Term::step);
  }

  std::span<Term> terms() { return std::span(terms_).first(size_); }
  /// The difference where every x is 0.
  std::int64_t base() const { return base_; }

 private:
  void add(const TensorView& t, int sign) {
    for (int axis = 0; axis < t.rank; ++axis) {
      const std::int64_t step = sign * stride_of(t, axis) * item_bytes(t.dtype);
      if (step == 0) continue;
      if (step < 0) base_ += step * (t.shape[axis] - 1);  // counted from the other end it rises
      add_term({step < 0 ? -step : step, t.shape[axis] - 1});
    }
  }

  void add_term(Term term) {
    const auto same = std::ranges::find(terms(), term.step, &Term::step);
    if (same != terms().end()) {
      same->count += term.count;
    } else {
      terms_[size_++] = term;
    }
  }

  std::int64_t base_;
  std::array<Term, 2 * kMaxRank> terms_{};
  std::size_t size_ = 0;
};

/// Is some sum of the terms within [low, high]? Gives up, with no, when the budget of steps is spent.
bool reaches(std::span<const Term> terms, std::int64_t low, std::int64_t high, int& budget) {
  if (high < 0 || --budget < 0) return false;
  if (terms.empty()) return low <= 0;
  const auto [step, count] = terms.front();
  const auto rest = terms.subspan(1);
  std::int64_t rest_reach = 0;
  for (const Term& term : rest) rest_reach += term.step * term.count;
  const std::int64_t needed = std::max<std::int64_t>(low - rest_reach, 0);
  const std::int64_t last = std::min(count, high / step);
  for (std::int64_t x = (needed + step - 1) / step; x <= last && budget > 0; ++x) {
    if (reaches(rest, low - x * step, high - x * step, budget)) return true;
  }
  return false;
}

}  // namespace

// ---- Texts ----

std::string text_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return "f32";
    case DType::f16: return "f16";
    case DType::bf16: return "bf16";
    case DType::boolean: return "boolean";
    case DType::i32: return "i32";
  }
  return fmt::format("dtype {}", static_cast<int>(dtype));
}

std::string text_of(Device device) {
  if (device == Device{}) return "cpu";
  return fmt::format("{}:{}", device.type == DeviceType::cpu ? "cpu" : "cuda", device.index);
}

std::string shape_text(const TensorView& tensor) {
  return fmt::format("[{}]", fmt::join(tensor.shape.begin(), tensor.shape.begin() + tensor.rank, ", "));
}

// ---- One tensor ----

Result<void> check_kind(const char* name, const TensorView& t, DTypes dtypes) {
  if (static_cast<unsigned>(t.dtype) > static_cast<unsigned>(DType::i32)) {
    return invalid_argument(fmt::format("{}: unknown dtype {}", name, static_cast<int>(t.dtype)));
  }
  if (!contains(dtypes, t.dtype)) {
    return invalid_argument(fmt::format("{}: dtype {}, expected f32, f16{} bf16{}", name, text_of(t.dtype),
                                        dtypes == DTypes::bias ? "," : " or",
                                        dtypes == DTypes::bias ? " or boolean" : ""));
  }
  if (static_cast<unsigned>(t.device.type) > static_cast<unsigned>(DeviceType::cuda) || t.device.index < 0) {
    return invalid_argument(fmt::format("{}: unknown device (type {}, index {})", name,
                                        static_cast<int>(t.device.type), t.device.index));
  }
  return done();
}

Result<void> check_rank(const char* name, const TensorView& t) {
  if (t.rank >= 3 && t.rank <= 5) return done();
  return invalid_argument(
      fmt::format("{}: rank {}, expected [B, M, H, K], [B, M, K] or [B, M, G, H, K]", name, t.rank));
}

Result<void> check_like(const TensorView& query, const char* name, const TensorView& other) {
  ATTUNE_TRY(check_kind(name, other));
  ATTUNE_TRY(check_rank(name, other));
  if (other.rank != query.rank) {
    return invalid_argument(
        fmt::format("query and {} differ in rank ({} and {}): all should be BMHK, all BMK or all BMGHK", name,
                    query.rank, other.rank));
  }
  if (!(other.device == query.device)) {
    return invalid_argument(fmt::format("query is on {} but {} is on {}: all should be on the same device",
                                        text_of(query.device), name, text_of(other.device)));
  }
  return done();
}

Result<Memory> check_memory(const char* name, const TensorView& t, LastStride last) {
  bool empty = false;
  for (int axis = 0; axis < t.rank; ++axis) {
    const std::int64_t size = t.shape[axis];
    if (size < 0) {
      return invalid_argument(fmt::format("{}: axis {} of shape {} is negative", name, axis, shape_text(t)));
    }
    if (size > kernel::kMaxLength) {
      return unsupported(fmt::format("{}: axis {} has extent {}, the limit is 2^29", name, axis, size));
    }
    empty = empty || size == 0;
  }
  if (last == LastStride::one && t.shape[t.rank - 1] > 1 && t.strides[t.rank - 1] != 1) {
    return invalid_argument(
        fmt::format("{}: the last axis has stride {}, expected 1; make a contiguous copy of the tensor", name,
                    t.strides[t.rank - 1]));
  }
  if (empty) return Memory{name, &t};
  const auto address = reinterpret_cast<std::uintptr_t>(t.data);
  const std::int64_t item = item_bytes(t.dtype);
  if (t.data == nullptr) return invalid_argument(fmt::format("{}: null data pointer", name));
  if (address % static_cast<std::uintptr_t>(item) != 0) {
    return invalid_argument(fmt::format("{}: the data pointer is not aligned to its element size", name));
  }
  Memory memory{name, &t, address, address + static_cast<std::uintptr_t>(item)};
  for (int axis = 0; axis < t.rank; ++axis) {
    if (t.shape[axis] <= 1) continue;
    ATTUNE_ASSIGN(reach, reach_of(name, t, axis));
    (reach < 0 ? memory.begin : memory.end) += static_cast<std::uintptr_t>(reach);
  }
  return memory;
}

bool is_empty(const TensorView& t) {
  return std::any_of(t.shape.begin(), t.shape.begin() + t.rank, [](std::int64_t size) { return size == 0; });
}

std::int64_t stride_of(const TensorView& t, int axis) {
  return t.shape[axis] > 1 ? t.strides[axis] : 0;
}

Axes axes_of(const TensorView& t) {
  Axes axes;
  axes.batch = t.shape[0];
  axes.len = t.shape[1];
  axes.dim = t.shape[t.rank - 1];
  axes.strides.batch = stride_of(t, 0);
  axes.strides.seq = stride_of(t, 1);
  if (t.rank >= 4) {
    axes.groups = t.shape[2];
    axes.strides.group = stride_of(t, 2);
  }
  if (t.rank == 5) {
    axes.heads = t.shape[3];
    axes.strides.head = stride_of(t, 3);
  }
  return axes;
}

Axes regrouped(Axes axes, std::int64_t groups) {
  if (axes.groups == groups) return axes;
  axes.heads = axes.groups / groups;
  axes.groups = groups;
  axes.strides.head = axes.strides.group;
  axes.strides.group *= axes.heads;
  return axes;
}

TensorView lse_like(const TensorView& t) {
  const Axes axes = axes_of(t);
  if (t.rank == 5) return {nullptr, DType::f32, {axes.batch, axes.groups, axes.heads, axes.len}, t.device};
  return {nullptr, DType::f32, {axes.batch, axes.groups, axes.len}, t.device};
}

// ---- What is written ----

Result<void> check_distinct(const Memory& written) {
  const TensorView& t = *written.tensor;
  if (is_empty(t)) return done();
  std::int64_t bytes = item_bytes(t.dtype);
  bool overflow = false;
  for (int axis = 0; axis < t.rank; ++axis) {
    if (t.shape[axis] > 1 && t.strides[axis] == 0) {
      return invalid_argument(
          fmt::format("{}: stride 0 on axis {}: its elements would share memory", written.name, axis));
    }
    overflow = overflow || __builtin_mul_overflow(bytes, t.shape[axis], &bytes);
  }
  if (overflow || static_cast<std::uintptr_t>(bytes) > written.end - written.begin) {
    return invalid_argument(
        fmt::format("{}: shape {} with these strides has its elements share memory; allocate it contiguously",
                    written.name, shape_text(t)));
  }
  return done();
}

Result<Memory> check_lse(const char* name, const TensorView& lse, const TensorView& expected) {
  const auto same_shape = [&] {
    return std::equal(lse.shape.begin(), lse.shape.begin() + lse.rank, expected.shape.begin());
  };
  if (lse.dtype != DType::f32 || lse.rank != expected.rank || !same_shape()) {
    return invalid_argument(fmt::format("{}: expected float32 {}", name, shape_text(expected)));
  }
  if (!(lse.device == expected.device)) {
    return invalid_argument(fmt::format("{}: is on {}, expected {}, the device of the inputs", name,
                                        text_of(lse.device), text_of(expected.device)));
  }
  if (is_empty(lse)) return Memory{name, &lse};  // no element: neither memory nor strides matter
  for (int axis = 0; axis < lse.rank; ++axis) {
    if (lse.shape[axis] > 1 && lse.strides[axis] != expected.strides[axis]) {
      return invalid_argument(fmt::format("{}: must be contiguous", name));
    }
  }
  return check_memory(name, lse);
}

Result<void> check_apart(const Memory& written, std::span<const Memory* const> others) {
  for (const Memory* other : others) {
    if (overlap(written, *other)) {
      return invalid_argument(
          fmt::format("{}: shares memory with {}; give it memory of its own", written.name, other->name));
    }
  }
  return done();
}

bool overlap(const Memory& a, const Memory& b) {
  if (a.begin >= b.end || b.begin >= a.end) return false;
  Differences differences(*a.tensor, *b.tensor);
  const std::int64_t below = item_bytes(a.tensor->dtype) - 1;
  const std::int64_t above = item_bytes(b.tensor->dtype) - 1;
  int budget = 10'000;
  return reaches(differences.terms(), -below - differences.base(), above - differences.base(), budget);
}

Result<void> check_workspace(const void* workspace) {
  if (reinterpret_cast<std::uintptr_t>(workspace) % kWorkspaceAlignment == 0) return done();
  return invalid_argument(
      fmt::format("workspace: its address should be a multiple of {}", kWorkspaceAlignment));
}

// ---- Several tensors ----

void Alignment::include(const TensorView& tensor) {
  const auto item = static_cast<std::uint64_t>(item_bytes(tensor.dtype));
  bits_ |= reinterpret_cast<std::uintptr_t>(tensor.data);
  for (int axis = 0; axis < tensor.rank - 1; ++axis) {
    bits_ |= static_cast<std::uint64_t>(stride_of(tensor, axis)) * item;
  }
  bits_ |= static_cast<std::uint64_t>(tensor.shape[tensor.rank - 1]) * item;
}

int Alignment::bytes() const {
  return 1 << std::countr_zero(bits_);
}

}  // namespace attune::runtime
