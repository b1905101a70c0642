// The mask's definition: visible() against literal pictures, and the ranges of tiles against visible() over
// every small geometry. The two spellings could be wrong together; the pictures could not.
#include "attune/semantics.h"

#include "attune/attune.h"
#include "tests/support/random.h"
#include "tools/reference/mask.h"

#include <doctest/doctest.h>
#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

using namespace attune::kernel;

namespace {

constexpr KernelSpec kOpen{};
constexpr KernelSpec kLeft{.window_left = Edge::bounded};
constexpr KernelSpec kRight{.window_right = Edge::bounded};
constexpr KernelSpec kBoth{.window_left = Edge::bounded, .window_right = Edge::bounded};

/// What a query sees of the keys, or what sees a key of the queries, found by asking for every one: they are
/// neighbours.
struct Line {
  int first, last;
};

/// `seen(n)` for the numbers below `count`.
template <typename Seen>
Line line_of(int count, Seen&& seen) {
  Line line{count, -1};
  int members = 0;
  for (int n = 0; n < count; ++n) {
    if (!seen(n)) continue;
    line.first = std::min(line.first, n);
    line.last = std::max(line.last, n);
    ++members;
  }
  if (members != std::max(0, line.last - line.first + 1)) FAIL("a line has a gap");
  return line;
}

/// What is wrong with the two ranges of the lines [begin, end), `count` numbers each; empty when nothing is.
template <typename Range>
std::string check_ranges(const std::vector<Line>& lines, int count, int begin, int end, Range visited,
                         Range unmasked) {
  Line some{count, -1};    // the union of the lines
  Line all{0, count - 1};  // their intersection
  for (int n = begin; n < end; ++n) {
    some.first = std::min(some.first, lines[n].first);
    some.last = std::max(some.last, lines[n].last);
    all.first = std::max(all.first, lines[n].first);
    all.last = std::min(all.last, lines[n].last);
  }
  const auto same = [](Range range, Line expected) {
    if (expected.first > expected.last) return range.begin >= range.end;
    return range.begin == expected.first && range.end == expected.last + 1;
  };
  if (!same(visited, some)) return "visited";
  if (!same(unmasked, all)) return "unmasked";
  return "";
}

/// Compares both spellings for every range of queries and every range of keys; returns how many it compared.
template <KernelSpec S>
int check_window(Window w, int len_q, int len_k) {
  std::vector<Line> rows, columns;
  for (int i = 0; i < len_q; ++i) {
    rows.push_back(line_of(len_k, [&](int j) { return visible<S>(w, len_k, i, j); }));
  }
  for (int j = 0; j < len_k; ++j) {
    columns.push_back(line_of(len_q, [&](int i) { return visible<S>(w, len_k, i, j); }));
  }
  int compared = 0;
  const auto check_all = [&](int lines, const char* name, const auto& check) {
    for (int begin = 0; begin < lines; ++begin) {
      for (int end = begin + 1; end <= lines; ++end, ++compared) {
        const std::string wrong = check(begin, end);
        if (wrong.empty()) continue;
        FAIL(fmt::format("{} {} [{}, {}) with len_q {}, len_k {}, window [{}, {}], edges {}{}", wrong, name,
                         begin, end, len_q, len_k, w.lower, w.upper, static_cast<int>(S.window_left),
                         static_cast<int>(S.window_right)));
      }
    }
  };
  check_all(len_q, "keys of queries", [&](int begin, int end) {
    return check_ranges(rows, len_k, begin, end, visited_keys<S>(w, len_k, begin, end),
                        unmasked_keys<S>(w, len_k, begin, end));
  });
  check_all(len_k, "queries of keys", [&](int begin, int end) {
    return check_ranges(columns, len_q, begin, end, visiting_queries<S>(w, len_q, begin, end),
                        unmasked_queries<S>(w, len_q, begin, end));
  });
  return compared;
}

std::string picture(const attune::AttentionBias& bias, int len_q, int len_k) {
  return attune::reference::picture(attune::reference::Mask(bias, 1, len_q, len_k));
}

/// The definition in 64 bits, without any clamping.
bool sees(Anchor anchor, i64 left, i64 right, i64 len_q, i64 len_k, i64 i, i64 j) {
  const i64 position = anchor == Anchor::bottom_right ? len_k - (len_q - i) : i;
  if (left >= 0 && position - j > left) return false;
  return right < 0 || j - position <= right;
}

}  // namespace

TEST_CASE("tile ranges equal visible() for every geometry up to 9 x 9") {
  int compared = 0;
  for (int len_q = 0; len_q <= 9; ++len_q) {
    for (int len_k = 0; len_k <= 9; ++len_k) {
      compared += check_window<kOpen>({}, len_q, len_k);
      for (int lower = -len_q; lower <= len_k; ++lower) {
        compared += check_window<kLeft>({.lower = lower}, len_q, len_k);
        compared += check_window<kRight>({.upper = lower}, len_q, len_k);
        for (int upper = lower; upper <= len_k; ++upper) {
          compared += check_window<kBoth>({lower, upper}, len_q, len_k);
        }
      }
    }
  }
  CHECK(compared > 200'000);
}

TEST_CASE("a tile's ranges ignore what lies behind the last key") {
  CHECK(visited_keys<kOpen>({}, 5, 0, 64).end == 5);
  CHECK(unmasked_keys<kRight>({.upper = 100}, 5, 0, 64).end == 5);
  CHECK_FALSE(visible<kOpen>({}, 5, 0, 5));
  CHECK(visiting_queries<kOpen>({}, 5, 0, 64).end == 5);
  CHECK(unmasked_queries<kLeft>({.lower = -100}, 5, 0, 64).end == 5);
}

TEST_CASE("LowerTriangularMask stands at the first query and the first key") {
  CHECK(picture(attune::LowerTriangularMask{}, 3, 5) ==
        "#....\n"
        "##...\n"
        "###..\n");
  CHECK(picture(attune::LowerTriangularMask{}, 4, 2) ==
        "#.\n"
        "##\n"
        "##\n"
        "##\n");
}

TEST_CASE("LowerTriangularFromBottomRightMask stands at the last query and the last key") {
  CHECK(picture(attune::LowerTriangularFromBottomRightMask{}, 3, 5) ==
        "###..\n"
        "####.\n"
        "#####\n");
  CHECK(picture(attune::LowerTriangularFromBottomRightMask{}, 4, 2) ==
        "..\n"  // more queries than keys: the first queries see nothing
        "..\n"
        "#.\n"
        "##\n");
}

TEST_CASE("LowerTriangularFromBottomRightLocalAttentionMask counts the diagonal in its window") {
  const auto bias = attune::LowerTriangularFromBottomRightMask{}.make_local_attention(2);
  CHECK(picture(bias, 3, 5) ==
        ".##..\n"
        "..##.\n"
        "...##\n");
  CHECK(picture(bias, 4, 2) ==
        "..\n"
        "..\n"
        "#.\n"
        "##\n");
  CHECK(picture(attune::LowerTriangularFromBottomRightLocalAttentionMask{1}, 3, 3) ==
        "#..\n"
        ".#.\n"
        "..#\n");
}

TEST_CASE("LocalAttentionFromBottomRightMask equals the documentation's example") {
  const attune::LocalAttentionFromBottomRightMask bias{.window_left = 1, .window_right = 2};
  CHECK(picture(bias, 4, 4) ==
        "###.\n"
        "####\n"
        ".###\n"
        "..##\n");
  CHECK(picture(bias, 4, 5) ==
        "####.\n"
        ".####\n"
        "..###\n"
        "...##\n");
  CHECK(picture(bias, 5, 2) ==
        "..\n"
        "#.\n"
        "##\n"
        "##\n"
        "##\n");
}

TEST_CASE("no bias hides no key") {
  CHECK(picture({}, 2, 3) == "###\n###\n");
  CHECK(picture({}, 2, 0) == "\n\n");
}

TEST_CASE("make_reach clamps without changing what is visible") {
  const std::uint64_t seed = attune::test::test_seed();
  attune::test::Random random(seed);
  const auto length = [&] {
    return random.chance(0.5) ? random.integer(1, 40) : kMaxLength - random.integer(0, 40);
  };
  const auto reach = [&](int len) -> i64 {
    switch (random.integer(0, 4)) {
      case 0: return -1;
      case 1: return random.integer(0, 40);
      case 2: return len - random.integer(-40, 40);
      case 3: return i64{kMaxLength} * 4 + random.integer(-1, 1);
      default: return std::numeric_limits<i64>::max() - random.integer(0, 1);
    }
  };
  const auto near_an_end = [&](int len) {
    return random.chance(0.5) ? random.integer(0, std::min(len, 40) - 1)
                              : len - 1 - random.integer(0, std::min(len, 40) - 1);
  };
  for (int round = 0; round < 200'000; ++round) {
    const Anchor anchor = random.pick({Anchor::top_left, Anchor::bottom_right});
    const int len_q = length();
    const int len_k = length();
    const i64 left = std::max<i64>(-1, reach(len_k));
    const i64 right = std::max<i64>(-1, reach(len_k));
    const Window w = window_of(make_reach(anchor, left, right), len_q, len_k);
    const int i = near_an_end(len_q);
    const int j = near_an_end(len_k);
    const bool seen = left < 0
                          ? (right < 0 ? visible<kOpen>(w, len_k, i, j) : visible<kRight>(w, len_k, i, j))
                          : (right < 0 ? visible<kLeft>(w, len_k, i, j) : visible<kBoth>(w, len_k, i, j));
    if (seen != sees(anchor, left, right, len_q, len_k, i, j)) {
      FAIL(fmt::format("seed {}: len_q {}, len_k {}, left {}, right {}, query {}, key {}", seed, len_q, len_k,
                       left, right, i, j));
    }
  }
}

// In a constant expression an overflow does not compile. The last tile may hang over by a few hundred rows.
constexpr i64 kEndless = std::numeric_limits<i64>::max();
constexpr Reach kBoundless = make_reach(Anchor::bottom_right, kEndless, kEndless);
constexpr Window kWidest = window_of(kBoundless, kMaxLength, kMaxLength);
constexpr Window kAhead = window_of(make_reach(Anchor::bottom_right, 0, kEndless), 1, kMaxLength);
constexpr Window kBehind = window_of(make_reach(Anchor::bottom_right, kEndless, 0), kMaxLength, 0);
static_assert(visited_keys<kBoth>(kWidest, kMaxLength, kMaxLength - 1, kMaxLength + 512).end == kMaxLength);
static_assert(unmasked_keys<kBoth>(kWidest, kMaxLength, kMaxLength - 1, kMaxLength + 512).end == kMaxLength);
static_assert(visible<kBoth>(kAhead, kMaxLength, 0, kMaxLength - 1));
static_assert(visited_keys<kBoth>(kBehind, 0, 0, kMaxLength).end <= 0);
static_assert(visiting_queries<kBoth>(kWidest, kMaxLength, 0, kMaxLength).end == kMaxLength);
static_assert(unmasked_queries<kBoth>(kWidest, kMaxLength, kMaxLength - 1, kMaxLength + 512).begin == 511);
static_assert(visiting_queries<kBoth>(kBehind, kMaxLength, 0, 512).begin == kMaxLength);
