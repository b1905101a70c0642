// Who owns which gradient: every row of key and value and every element of a bias in exactly one slot, and
// the segments of a tile against the keys of every block, one by one, also with tables that are wrong.
#include "attune/backward.h"

#include "tests/support/random.h"

#include <doctest/doctest.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

using namespace attune::kernel;
using attune::test::Random;
using attune::test::test_seed;

namespace {

constexpr i32 kLargest = std::numeric_limits<i32>::max();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// ---- Slots ----

BackwardParams problem(i32 len_q, i32 len_k) {
  BackwardParams p;
  p.forward.batch = 2;
  p.forward.groups = 2;
  p.forward.heads = 3;
  p.forward.len_q = len_q;
  p.forward.len_k = len_k;
  return p;
}

/// How often each [batch, group, head of the query, row, column] is in a slot of grad_key_value.
template <KernelSpec S>
void check_key_slots(const BackwardParams& p) {
  constexpr i32 kColumns = max(S.head_dim, S.head_dim_v);
  const ForwardParams& f = p.forward;
  std::vector<int> owned(std::size_t(f.batch) * f.groups * f.heads * f.len_k * kColumns);
  for (i64 number = 0; number < backward_slots(S, p); ++number) {
    const KeySlot slot = key_slot_of<S>(p, number);
    const KeySlot same = key_slot_of<S>(p, static_cast<u32>(number));
    REQUIRE(std::tie(slot.batch, slot.group, slot.head, slot.part, slot.begin, slot.end) ==
            std::tie(same.batch, same.group, same.head, same.part, same.begin, same.end));
    for (i32 n = 0; n < sharing_heads(p); ++n) {
      const QueryHead head = sharing_head(p, slot, n);
      REQUIRE(head.group < f.groups);
      REQUIRE(head.head < f.heads);
      for (i32 j = slot.begin; j < slot.end; ++j) {
        for (i32 d = slot.part * S.block_v; d < min((slot.part + 1) * S.block_v, kColumns); ++d) {
          const i64 row = ((i64{slot.batch} * f.groups + head.group) * f.heads + head.head) * f.len_k + j;
          ++owned.at(static_cast<std::size_t>(row * kColumns + d));
        }
      }
    }
  }
  REQUIRE(std::ranges::all_of(owned, [](int times) { return times == 1; }));
}

/// How often each [batch, group, head of the query, query row, key row] is in a slot of grad_bias, and that
/// each element of the bias has one slot.
template <KernelSpec S>
void check_bias_slots(const BackwardParams& p) {
  const ForwardParams& f = p.forward;
  std::vector<int> added(std::size_t(f.batch) * f.groups * f.heads * f.len_q * f.len_k);
  std::vector<int> owned(std::size_t(p.bias_batch) * p.bias_groups * p.bias_heads * p.bias_rows * f.len_k);
  for (i64 number = 0; number < backward_slots(S, p); ++number) {
    const BiasSlot slot = bias_slot_of<S>(p, number);
    const BiasSlot same = bias_slot_of<S>(p, static_cast<u32>(number));
    REQUIRE(std::tie(slot.batch, slot.group, slot.head, slot.m_begin, slot.m_end, slot.begin, slot.end) ==
            std::tie(same.batch, same.group, same.head, same.m_begin, same.m_end, same.begin, same.end));
    const i32 rows = p.bias_rows == 1 ? 1 : slot.m_end - slot.m_begin;
    for (i32 row = 0; row < rows; ++row) {
      const i64 head = (i64{slot.batch} * p.bias_groups + slot.group) * p.bias_heads + slot.head;
      const i64 first = (head * p.bias_rows + (p.bias_rows == 1 ? 0 : slot.m_begin) + row) * f.len_k;
      for (i32 j = slot.begin; j < slot.end; ++j) ++owned.at(static_cast<std::size_t>(first + j));
    }
    for (i32 entry = slot.batch; entry < slot.batch + biased_batches(p); ++entry) {
      for (i32 n = 0; n < biased_heads(p); ++n) {
        const QueryHead head = biased_head(p, slot, n);
        for (i32 i = slot.m_begin; i < slot.m_end; ++i) {
          const i64 row = ((i64{entry} * f.groups + head.group) * f.heads + head.head) * f.len_q + i;
          for (i32 j = slot.begin; j < slot.end; ++j) ++added.at(static_cast<std::size_t>(row * f.len_k + j));
        }
      }
    }
  }
  const auto once = [](int times) { return times == 1; };
  REQUIRE(std::ranges::all_of(owned, once));
  REQUIRE(std::ranges::all_of(added, once));
}

constexpr KernelSpec key_value_spec(i32 block_n, i32 head_dim = 1, i32 head_dim_v = 1, i32 block_v = 1) {
  return {.operation = Operation::grad_key_value,
          .head_dim = head_dim,
          .head_dim_v = head_dim_v,
          .block_n = block_n,
          .block_v = block_v};
}
constexpr KernelSpec bias_spec(i32 block_m, i32 block_n) {
  return {.operation = Operation::grad_bias, .block_m = block_m, .block_n = block_n};
}

// ---- Segments ----

/// A row of the tile is this key of this block.
struct RowKey {
  i32 row, block, key;
  auto operator<=>(const RowKey&) const = default;
};

template <KernelSpec S>
std::vector<RowKey> by_segments(const ForwardParams& p, i32 batch, i32 begin, i32 end) {
  std::vector<RowKey> found;
  for_each_segment<S>(p, batch, begin, end, [&](const KeySegment& segment) {
    for (i32 row = segment.begin; row < segment.end; ++row) {
      found.push_back({row, segment.block.index, segment.key + row - segment.begin});
    }
  });
  std::ranges::sort(found);
  return found;
}

template <KernelSpec S>
std::vector<RowKey> by_keys(const ForwardParams& p, i32 batch, i32 begin, i32 end) {
  std::vector<RowKey> found;
  const bool dense = S.blocks == Blocks::dense;
  for (i32 index = dense ? batch : 0; index < (dense ? batch + 1 : p.sequences.count); ++index) {
    const Block block = block_of<S>(p, index);
    for (i32 j = 0; j < block.len_k; ++j) {
      const i32 row = key_row<S>(p, block, j);
      if (row >= begin && row < end) found.push_back({row, index, j});
    }
  }
  std::ranges::sort(found);
  return found;
}

/// Over tiles of a few sizes, the last of which hangs over nothing.
template <KernelSpec S>
void check_segments(const ForwardParams& p) {
  const int batches = S.blocks == Blocks::dense ? p.batch : 1;
  for (i32 batch = 0; batch < batches; ++batch) {
    for (const i32 tile : {1, 3, 8, 64}) {
      for (i32 begin = 0; begin < p.len_k; begin += tile) {
        const i32 end = min(begin + tile, p.len_k);
        REQUIRE(by_segments<S>(p, batch, begin, end) == by_keys<S>(p, batch, begin, end));
      }
    }
  }
}

// ---- The order in which parts of tiles of paged keys add to sums ----

/// Walks over all parts as blocks take them, and counts who has added to a tile of queries.
template <KernelSpec S>
void check_parts_before(const ForwardParams& p) {
  std::map<std::pair<i32, i32>, i32> added;  // of sequence and tile of queries
  const i32 width = p.sequences.table_width;
  for (i32 tile = 0; tile * S.block_n < p.len_k; ++tile) {
    const i32 begin = tile * S.block_n, end = min(begin + S.block_n, p.len_k);
    for (i32 own = 0; own < places<S>(p); ++own) {
      const KeySegment whole = segment_at<S>(p, 0, begin, end, own);
      if (whole.begin >= whole.end) continue;
      const Window window = window_of_block<S>(p, whole.block);
      const KeySegment keys = seen_part<S>(whole, window);
      if (keys.begin >= keys.end) continue;
      const i32 key_end = keys.key + keys.end - keys.begin;
      const QueryRange seeing = visiting_queries<S>(window, whole.block.len_q, keys.key, key_end);
      for (i32 m = seeing.begin / S.block_m; m * S.block_m < seeing.end; ++m) {
        const i32 sequence = whole.block.index;
        const KeyRange seen = keys_seen_by_tile<S>(p, sequence, whole.block.q_begin + m * S.block_m);
        i32 before = 0;
        for (i32 column = 0; column < width; ++column) {
          const i32 place = sequence * width + column;
          before += parts_before<S>(p, seen, place, column, place < own ? end : begin);
        }
        REQUIRE(before == added[std::pair{sequence, m}]++);
      }
    }
  }
}

constexpr KernelSpec kDense{};
constexpr KernelSpec kVarlen{.blocks = Blocks::varlen};
constexpr KernelSpec kPaged{.blocks = Blocks::varlen, .keys = Keys::paged};
constexpr KernelSpec in_turns(Edge left, Edge right) {
  KernelSpec spec = kPaged;
  spec.window_left = left;
  spec.window_right = right;
  spec.block_m = 3;
  spec.block_n = 4;
  return spec;
}

/// Tables of `count` sequences, whose numbers come from `number`.
struct Tables {
  std::vector<i32> q_start, k_start, k_len, pages;
  ForwardParams params;

  template <typename Number>
  Tables(int count, i32 width, i32 page_size, Number&& number) {
    for (std::vector<i32>* table : {&q_start, &k_start, &k_len, &pages}) {
      table->resize(table == &pages ? std::size_t(count) * width : std::size_t(count) + 1);
      for (i32& entry : *table) entry = number();
    }
    params.batch = params.groups = params.heads = 1;
    params.sequences = {.count = count,
                        .q_start = q_start.data(),
                        .k_start = k_start.data(),
                        .pages = pages.data(),
                        .table_width = width,
                        .page_size = make_divider(page_size)};
  }
  Tables(const Tables&) = delete;
  Tables& operator=(const Tables&) = delete;
};

}  // namespace

TEST_CASE("every row and column of key and value is in one slot, with every query head that shares it") {
  for (i32 len_k = 0; len_k <= 9; ++len_k) {
    BackwardParams p = problem(4, len_k);
    for (const i32 groups : {1, 2}) {
      for (const i32 heads : {1, 3}) {
        p.key_groups = groups;
        p.key_heads = heads;
        check_key_slots<key_value_spec(1)>(p);
        check_key_slots<key_value_spec(4)>(p);
        check_key_slots<key_value_spec(4, 7, 5, 3)>(p);
        check_key_slots<key_value_spec(3, 2, 6, 4)>(p);
      }
    }
  }
}

TEST_CASE("every element of a bias is in one slot, with every pair that it was added to") {
  for (i32 len_q = 0; len_q <= 5; ++len_q) {
    for (i32 len_k = 0; len_k <= 5; ++len_k) {
      BackwardParams p = problem(len_q, len_k);
      for (int broadcast = 0; broadcast < 16; ++broadcast) {
        p.bias_batch = (broadcast & 1) != 0 ? 1 : p.forward.batch;
        p.bias_groups = (broadcast & 2) != 0 ? 1 : p.forward.groups;
        p.bias_heads = (broadcast & 4) != 0 ? 1 : p.forward.heads;
        p.bias_rows = (broadcast & 8) != 0 ? 1 : p.forward.len_q;
        check_bias_slots<bias_spec(1, 1)>(p);
        check_bias_slots<bias_spec(3, 2)>(p);
        check_bias_slots<bias_spec(8, 4)>(p);
      }
    }
  }
}

TEST_CASE("operations by query have the slots of the forward pass") {
  const BackwardParams p = problem(9, 4);
  constexpr KernelSpec kRows{.operation = Operation::grad_query, .head_dim = 1, .block_m = 4, .block_v = 1};
  CHECK(backward_slots(kRows, p) == 2 * 2 * 3 * 3);
  constexpr KernelSpec kDelta{.operation = Operation::delta, .head_dim_v = 100, .block_m = 4};
  CHECK(backward_slots(kDelta, p) == 2 * 2 * 3 * 3);
}

TEST_CASE("segments of a dense problem are its batch entry's keys") {
  ForwardParams p;
  p.batch = 2;
  p.len_q = 3;
  for (p.len_k = 0; p.len_k <= 9; ++p.len_k) check_segments<kDense>(p);
}

TEST_CASE("segments hold the keys of every sequence, gappy, overlapping, out of order and in no sequence") {
  Random random(test_seed());
  for (int round = 0; round < 2000; ++round) {
    Tables drawn(random.integer(1, 6), 0, 1, [&] { return random.integer(0, 20); });
    drawn.params.len_q = 20;
    drawn.params.len_k = random.integer(0, 30);
    drawn.params.sequences.k_len = drawn.k_len.data();
    check_segments<kVarlen>(drawn.params);
    std::ranges::sort(drawn.k_start);
    drawn.params.sequences.k_len = nullptr;
    check_segments<kVarlen>(drawn.params);
  }
}

TEST_CASE("segments hold the keys behind every page, shared ones for each sequence that has them") {
  Random random(test_seed(), 1);
  for (int round = 0; round < 2000; ++round) {
    const i32 page_size = random.integer(1, 9), page_count = random.integer(1, 6);
    Tables drawn(random.integer(1, 5), random.integer(0, 4), page_size,
                 [&] { return random.integer(0, page_count - 1); });
    for (i32& start : drawn.k_start) start = random.integer(0, 2 * page_size);
    for (i32& length : drawn.k_len) length = random.integer(0, 4 * page_size);
    drawn.params.len_q = 5;
    drawn.params.len_k = page_size * page_count;
    drawn.params.sequences.k_len = drawn.k_len.data();
    check_segments<kPaged>(drawn.params);
  }
}

TEST_CASE("parts of tiles of paged keys have numbers in the order in which they add to a tile of queries") {
  Random random(test_seed(), 3);
  for (int round = 0; round < 2000; ++round) {
    const i32 page_size = random.integer(1, 9), page_count = random.integer(1, 6);
    const bool garbage = random.chance(0.2);
    const auto number = [&]() -> i32 {
      return garbage ? static_cast<i32>(random.bits()) : random.integer(0, page_count - 1);
    };
    Tables drawn(random.integer(1, 5), random.integer(1, 5), page_size, number);
    if (!garbage) {
      for (i32& start : drawn.q_start) start = random.integer(0, 20);
      std::ranges::sort(drawn.q_start);
      for (i32& start : drawn.k_start) start = random.integer(0, 2 * page_size);
      for (i32& length : drawn.k_len) length = random.integer(0, 4 * page_size);
    }
    ForwardParams& p = drawn.params;
    p.len_q = random.integer(0, 20);
    p.len_k = page_size * page_count;
    p.sequences.k_len = drawn.k_len.data();
    p.reach = make_reach(random.pick({Anchor::top_left, Anchor::bottom_right}), random.integer(0, 9),
                         random.integer(0, 9));
    check_parts_before<in_turns(Edge::open, Edge::open)>(p);
    check_parts_before<in_turns(Edge::open, Edge::bounded)>(p);
    check_parts_before<in_turns(Edge::bounded, Edge::bounded)>(p);
  }
}

TEST_CASE("wrong tables of a device give segments inside the tile, those of key_row") {
  Random random(test_seed(), 2);
  const auto garbage = [&]() -> i32 {
    switch (random.integer(0, 3)) {
      case 0: return random.integer(-3, 40);
      case 1: return std::numeric_limits<i32>::min() + random.integer(0, 2);
      case 2: return kLargest - random.integer(0, 2);
      default: return static_cast<i32>(random.bits());
    }
  };
  for (int round = 0; round < 2000; ++round) {
    const i32 page_size = random.integer(1, 9);
    Tables drawn(random.integer(1, 5), random.integer(0, 4), page_size, garbage);
    drawn.params.len_q = random.integer(0, 30);
    drawn.params.len_k = page_size * random.integer(0, 5);
    check_segments<kVarlen>(drawn.params);
    drawn.params.sequences.k_len = drawn.k_len.data();
    check_segments<kVarlen>(drawn.params);
    check_segments<kPaged>(drawn.params);
  }
}

TEST_CASE("numbers of queries are found packed and padded, and never past their end") {
  Slot slot;
  slot.block = {.index = 3, .batch = 0, .q_begin = 10, .len_q = 4};
  slot.group = 1;
  slot.head = 2;
  QueryNumbers numbers{.strides = {.batch = 1000, .seq = 2, .group = 300, .head = 100}, .length = 14};
  CHECK(offset_of(numbers, slot, 3) == 300 + 200 + 13 * 2);
  numbers.per_sequence = 1;
  CHECK(offset_of(numbers, slot, 3) == 3000 + 300 + 200 + 3 * 2);
  numbers.length = 2;  // a table that is wrong
  CHECK(offset_of(numbers, slot, 3) == 3000 + 300 + 200 + 1 * 2);
}

TEST_CASE("a query that saw nothing has a base 2 lse of +inf, from either infinity") {
  CHECK(backward_lse2(-kInf) == kInf);
  CHECK(backward_lse2(kInf) == kInf);
  CHECK(backward_lse2(0.0f) == 0.0f);
  CHECK(backward_lse2(2.0f) == 2.0f * kLog2e);
}

TEST_CASE("a query has numbers that make its gradients right, 0 or NaN") {
  const auto numbers = [](float lse, float delta) {
    const QueryPair pair = query_pair(lse, delta);
    return std::pair{pair.lse2, pair.delta};
  };
  CHECK(numbers(2.0f, -3.0f) == std::pair{2.0f * kLog2e, -3.0f});
  CHECK_FALSE(is_void(query_pair(2.0f, -3.0f).lse2));
  for (const float blind : {-kInf, kInf}) {
    for (const float delta : {1.0f, kInf, kNan}) {
      CHECK(numbers(blind, delta) == std::pair{kInf, 0.0f});
      CHECK(is_void(query_pair(blind, delta).lse2));
    }
  }
  for (const auto& [lse, delta] :
       {std::pair{kNan, 1.0f}, {2.0f, kNan}, {2.0f, kInf}, {2.0f, -kInf}, {kNan, kNan}}) {
    const QueryPair pair = query_pair(lse, delta);
    CHECK(std::isnan(pair.lse2));
    CHECK(pair.delta == 0.0f);
    CHECK(is_void(pair.lse2));
  }
}
