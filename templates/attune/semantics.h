// What attention means: which keys a query sees, and what a bias does to a score. Written once; the
// reference, the CPU kernels and the GPU kernels all include this file, and nobody else spells a mask.
//
// A mask has two spellings, and both stand here: visible() per element, and the ranges of keys that a tile of
// queries visits (visited_keys) or sees without any masking (unmasked_keys); for the gradients of keys also
// the ranges of queries that visit a tile of keys (visiting_queries, unmasked_queries).
// tests/unit/semantics_test.cpp checks one against the other over every small geometry, and both against
// pictures and upstream's masks.
//
// Queries i and keys j count from the beginning of their block (blocks.h): a batch entry or a sequence.
#pragma once

#include "attune/hd.h"
#include "attune/num.h"
#include "attune/spec.h"

namespace attune::kernel {

/// Longest sequence and widest reach: i + window.lower and i + window.upper then always fit an i32, also for
/// the rows of a tile that hangs over the end.
inline constexpr i32 kMaxLength = 1 << 29;

/// Where a window is anchored: query 0 stands at key 0, or the last query stands at the last key.
enum class Anchor : i32 { top_left, bottom_right };

/// How many keys a query sees to the left and to the right of its own position. A side whose edge is open
/// (spec.h) is not looked at.
struct Reach {
  Anchor anchor = Anchor::top_left;
  i32 left = 0;
  i32 right = 0;
};

/// Key j is visible to query i iff i + lower <= j <= i + upper (and 0 <= j < len_k).
struct Window {
  i32 lower = 0;
  i32 upper = 0;
};

/// Reaches beyond kMaxLength end nowhere else than there; negative ones (no bound) become 0.
constexpr Reach make_reach(Anchor anchor, i64 left, i64 right) {
  const auto clamped = [](i64 x) {
    return static_cast<i32>(x < 0 ? 0 : x < kMaxLength ? x : i64{kMaxLength});
  };
  return {anchor, clamped(left), clamped(right)};
}

ATTUNE_HD constexpr Window window_of(Reach reach, i32 len_q, i32 len_k) {
  const i32 shift = reach.anchor == Anchor::bottom_right ? len_k - len_q : 0;
  return {shift - reach.left, shift + reach.right};
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

/// visible() for vectors of queries i and of keys j < len_k: the mask of a comparison, all ones where
/// visible.
template <KernelSpec S, typename Lanes>
ATTUNE_HD constexpr Lanes visible_lanes(Window w, Lanes i, Lanes j) {
  Lanes seen = Lanes(-1);
  if constexpr (S.window_left == Edge::bounded) seen = seen & (j >= i + Lanes(w.lower));
  if constexpr (S.window_right == Edge::bounded) seen = seen & (j <= i + Lanes(w.upper));
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

/// Half-open; empty when begin >= end.
struct QueryRange {
  i32 begin = 0;
  i32 end = 0;
};

/// The smallest range that holds every query that sees some key of [n_begin, n_end), all of them below len_k.
template <KernelSpec S>
ATTUNE_HD constexpr QueryRange visiting_queries(Window w, i32 len_q, i32 n_begin, i32 n_end) {
  QueryRange queries{0, len_q};
  if constexpr (S.window_right == Edge::bounded) queries.begin = max(queries.begin, n_begin - w.upper);
  if constexpr (S.window_left == Edge::bounded) queries.end = min(queries.end, n_end - w.lower);
  return queries;
}

/// The largest range of queries that see every key of [n_begin, n_end): no masking needed there.
template <KernelSpec S>
ATTUNE_HD constexpr QueryRange unmasked_queries(Window w, i32 len_q, i32 n_begin, i32 n_end) {
  QueryRange queries{0, len_q};
  if constexpr (S.window_right == Edge::bounded) queries.begin = max(queries.begin, n_end - 1 - w.upper);
  if constexpr (S.window_left == Edge::bounded) queries.end = min(queries.end, n_begin + 1 - w.lower);
  return queries;
}

/// A score in base 2 (num.h) with its element of the bias tensor, widened to float: a number is added to the
/// score in base e, a boolean hides the key where it is 0. Comes before the window's mask, which overrules
/// whatever the bias holds at a hidden key. F is float or a vector of floats.
template <Bias B, typename F>
ATTUNE_HD F with_bias(F score2, F element) {
  if constexpr (B == Bias::none) return score2;
  if constexpr (B == Bias::boolean) return element != F(0.0f) ? score2 : F(neg_inf());
  return score2 + element * F(kLog2e);
}

}  // namespace attune::kernel
