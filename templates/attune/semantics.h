// What attention means: which keys a query sees. Written once; the reference, the CPU kernels and the GPU
// kernels all include this file, and nobody else spells a mask.
//
// A mask has two spellings, and both stand here: visible() per element, and the ranges of keys that a tile of
// queries visits (visited_keys) or sees without any masking (unmasked_keys). tests/unit/semantics_test.cpp
// checks one against the other over every small geometry, and both against pictures and upstream's masks.
#pragma once

#include "attune/hd.h"
#include "attune/spec.h"

namespace attune::kernel {

/// Longest sequence: i + window.lower and i + window.upper then always fit an i32, also for the rows of a
/// tile that hangs over the end.
inline constexpr i32 kMaxLength = 1 << 29;

/// Key j is visible to query i iff i + lower <= j <= i + upper (and 0 <= j < len_k).
struct Window {
  i32 lower = 0;
  i32 upper = 0;
};

/// Where a window is anchored: query 0 stands at key 0, or the last query stands at the last key.
enum class Anchor : i32 { top_left, bottom_right };

/// The window that reaches `left` keys to the left and `right` keys to the right of each query's own
/// position; a negative reach means without bound. Bounds are clamped to the matrix, so a kernel never
/// overflows.
constexpr Window make_window(Anchor anchor, i64 left, i64 right, i32 len_q, i32 len_k) {
  const i64 shift = anchor == Anchor::bottom_right ? i64{len_k} - len_q : 0;
  const i64 leftmost = -i64{len_q};  // i + leftmost < 0 for every query
  const i64 rightmost = len_k;       // i + rightmost >= len_k for every query
  const auto clamp = [&](i64 x) {
    return static_cast<i32>(x < leftmost ? leftmost : x > rightmost ? rightmost : x);
  };
  const i64 reach = i64{kMaxLength} * 4;
  return {left < 0 ? clamp(leftmost) : clamp(shift - (left < reach ? left : reach)),
          right < 0 ? clamp(rightmost) : clamp(shift + (right < reach ? right : reach))};
}

/// Is key j visible to query i? The caller guarantees 0 <= j; len_k is checked here.
template <KernelSpec S>
ATTUNE_HD constexpr bool visible(Window w, i32 len_k, i32 i, i32 j) {
  if (j >= len_k) return false;
  if constexpr (S.window_left == Edge::bounded) {
    if (j < i + w.lower) return false;
  }
  if constexpr (S.window_right == Edge::bounded) {
    if (j > i + w.upper) return false;
  }
  return true;
}

/// visible() for a vector of queries i and a key j < len_k: the mask of a comparison, all ones where visible.
template <KernelSpec S, typename Lanes>
ATTUNE_HD constexpr Lanes visible_lanes(Window w, Lanes i, i32 j) {
  Lanes seen = Lanes(-1);
  if constexpr (S.window_left == Edge::bounded) seen = seen & (Lanes(j) >= i + Lanes(w.lower));
  if constexpr (S.window_right == Edge::bounded) seen = seen & (Lanes(j) <= i + Lanes(w.upper));
  return seen;
}

/// Half-open; empty when begin >= end.
struct KeyRange {
  i32 begin = 0;
  i32 end = 0;
};

/// The smallest range that holds every key visible to some query of [m_begin, m_end).
template <KernelSpec S>
ATTUNE_HD constexpr KeyRange visited_keys(Window w, i32 len_k, i32 m_begin, i32 m_end) {
  KeyRange keys{0, len_k};
  if constexpr (S.window_left == Edge::bounded) keys.begin = max(keys.begin, m_begin + w.lower);
  if constexpr (S.window_right == Edge::bounded) keys.end = min(keys.end, m_end + w.upper);
  return keys;
}

/// The largest range of keys that are visible to every query of [m_begin, m_end): no masking needed there.
template <KernelSpec S>
ATTUNE_HD constexpr KeyRange unmasked_keys(Window w, i32 len_k, i32 m_begin, i32 m_end) {
  KeyRange keys{0, len_k};
  if constexpr (S.window_left == Edge::bounded) keys.begin = max(keys.begin, m_end - 1 + w.lower);
  if constexpr (S.window_right == Edge::bounded) keys.end = min(keys.end, m_begin + 1 + w.upper);
  return keys;
}

}  // namespace attune::kernel
