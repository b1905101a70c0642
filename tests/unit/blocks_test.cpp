// Where blocks, tiles and slots are: exhaustively over small problems, and with tables that are wrong.
#include "attune/blocks.h"

#include "tests/support/random.h"

#include <doctest/doctest.h>
#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

using namespace attune::kernel;

namespace {

constexpr i32 kLargest = std::numeric_limits<i32>::max();

void check_divider(i32 divisor, i32 n) {
  const Divider divider = make_divider(divisor);
  if (n >= 0 && divide(n, divider) != n / divisor) FAIL(fmt::format("{} / {}", n, divisor));
}

/// Every number whose quotient is the easiest to get wrong.
void check_divider(i32 divisor) {
  for (const i64 quotient : {i64{0}, i64{1}, i64{2}, i64{kLargest} / divisor / 2, i64{kLargest} / divisor}) {
    for (i64 step = -1; step <= 1; ++step) {
      const i64 n = quotient * divisor + step;
      if (n <= kLargest) check_divider(divisor, static_cast<i32>(n));
    }
  }
  check_divider(divisor, kLargest);
  check_divider(divisor, kLargest - 1);
}

// ---- Slots ----

/// A packed problem whose tables live here.
struct Packed {
  std::vector<i32> q_start{0}, k_start{0};
  ForwardParams params;

  explicit Packed(const std::vector<i32>& q_lens) {
    for (const i32 len : q_lens) {
      q_start.push_back(q_start.back() + len);
      k_start.push_back(k_start.back() + 3);
    }
    params.batch = 1;
    params.groups = 2;
    params.heads = 3;
    params.len_q = q_start.back();
    params.len_k = k_start.back();
    params.sequences.count = static_cast<i32>(q_lens.size());
    params.sequences.q_start = q_start.data();
    params.sequences.k_start = k_start.data();
  }
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;
};

/// How often each element of the output is computed, [batch, len_q, groups, heads, head_dim_v]; what is wrong
/// with a slot otherwise.
template <KernelSpec S>
std::string count_slots(const ForwardParams& p, std::vector<int>& computed) {
  computed.assign(std::size_t(p.batch) * p.len_q * p.groups * p.heads * S.head_dim_v, 0);
  const i64 slots = forward_slots(S, p);
  for (i64 number = 0; number < slots; ++number) {
    const Slot slot = slot_of<S>(p, number);
    const Slot same = slot_of<S>(p, static_cast<u32>(number));
    if (same.begin != slot.begin || same.end != slot.end || same.block.index != slot.block.index ||
        same.head != slot.head || same.group != slot.group || same.part != slot.part) {
      return fmt::format("slot {} depends on the type of its number", number);
    }
    for (i32 i = slot.begin; i < slot.end; ++i) {
      const i32 row = slot.block.q_begin + i;
      if (i < 0 || i >= slot.block.len_q || row >= p.len_q)
        return fmt::format("slot {}: query {}", number, i);
      for (i32 d = slot.part * S.block_v; d < min((slot.part + 1) * S.block_v, S.head_dim_v); ++d) {
        const i64 head = head_number(p, slot);
        ++computed[((i64{slot.block.batch} * p.len_q + row) * p.groups * p.heads + head) * S.head_dim_v + d];
      }
      const i64 lse = lse_offset(p, slot, i);
      if (lse < 0 || lse >= i64{p.batch} * p.groups * p.heads * p.len_q)
        return fmt::format("slot {}: lse", number);
    }
  }
  return "";
}

template <KernelSpec S>
void check_slots(const ForwardParams& p) {
  std::vector<int> computed;
  REQUIRE(count_slots<S>(p, computed) == "");
  REQUIRE(std::ranges::all_of(computed, [](int times) { return times == 1; }));
}

constexpr KernelSpec spec(Blocks blocks, i32 block_m, Edge right, i32 head_dim_v = 1, i32 block_v = 1) {
  return {.head_dim_v = head_dim_v,
          .window_right = right,
          .blocks = blocks,
          .block_m = block_m,
          .block_v = block_v};
}

template <i32 BlockM, Edge Right>
void check_every_packing() {
  for (int count = 1; count <= 4; ++count) {
    std::vector<i32> lens(count);
    const int cases = count == 4 ? 6 * 6 * 6 * 6 : count == 3 ? 6 * 6 * 6 : count == 2 ? 6 * 6 : 6;
    for (int drawn = 0; drawn < cases; ++drawn) {
      for (int b = 0, rest = drawn; b < count; ++b, rest /= 6) lens[b] = rest % 6 * (BlockM > 2 ? 2 : 1);
      const Packed packed(lens);
      check_slots<spec(Blocks::varlen, BlockM, Right)>(packed.params);
    }
  }
}

// ---- Wrong tables ----

i32 garbage(attune::test::Random& random) {
  switch (random.integer(0, 4)) {
    case 0: return random.integer(-3, 40);
    case 1: return random.integer(0, 16);
    case 2: return std::numeric_limits<i32>::min() + random.integer(0, 2);
    case 3: return kLargest - random.integer(0, 2);
    default: return static_cast<i32>(random.bits());
  }
}

std::vector<i32> garbage(attune::test::Random& random, int count) {
  std::vector<i32> table(count);
  for (i32& number : table) number = garbage(random);
  return table;
}

/// Every row of every slot's queries and keys is one of the tensors'.
template <KernelSpec S>
void check_rows(const ForwardParams& p) {
  std::vector<int> computed;
  REQUIRE(count_slots<S>(p, computed) == "");
  for (i32 index = 0; index < p.sequences.count; ++index) {
    const Block block = block_of<S>(p, index);
    REQUIRE(block.len_q >= 0);
    REQUIRE(block.len_k >= 0);
    REQUIRE(block.q_begin >= 0);
    REQUIRE(block.q_begin + block.len_q <= p.len_q);
    for (i32 j = 0; j < block.len_k; ++j) {
      const i32 row = key_row<S>(p, block, j);
      REQUIRE(row >= 0);
      REQUIRE(row < p.len_k);
    }
    // No window of such a block overflows: its bounds are those of a block of these lengths.
    const Window window = window_of_block<S>(p, block);
    REQUIRE(window.lower >= -2 * kMaxLength);
    REQUIRE(window.upper <= 2 * kMaxLength);
  }
}

}  // namespace

TEST_CASE("division by a constant of the launch is exact") {
  for (i32 divisor = 1; divisor <= 5000; ++divisor) check_divider(divisor);
  for (i32 shift = 1; shift < 31; ++shift) {
    for (i32 step = -1; step <= 1; ++step) check_divider((1 << shift) + step);
  }
  for (const i32 divisor : {kLargest, kLargest - 1, (1 << 30) + 1, 3 * (1 << 29)}) check_divider(divisor);
  attune::test::Random random(attune::test::test_seed());
  for (int round = 0; round < 200'000; ++round) {
    const i32 divisor = random.integer(1, kLargest) >> random.integer(0, 30);
    check_divider(max(divisor, 1), random.integer(0, kLargest));
    check_divider(max(divisor, 1));
  }
}

TEST_CASE("every query of a dense problem is in exactly one slot of each head and part") {
  for (i32 len_q = 0; len_q <= 9; ++len_q) {
    ForwardParams p;
    p.batch = 2;
    p.groups = 3;
    p.heads = 2;
    p.len_q = len_q;
    p.len_k = 4;
    check_slots<spec(Blocks::dense, 1, Edge::open)>(p);
    check_slots<spec(Blocks::dense, 4, Edge::open)>(p);
    check_slots<spec(Blocks::dense, 4, Edge::bounded)>(p);
    check_slots<spec(Blocks::dense, 3, Edge::bounded, 7, 3)>(p);
  }
}

TEST_CASE("every query of every packing of up to four sequences is in exactly one slot") {
  check_every_packing<1, Edge::open>();
  check_every_packing<2, Edge::bounded>();
  check_every_packing<3, Edge::open>();
  check_every_packing<4, Edge::bounded>();
}

TEST_CASE("many sequences, most of them empty, fill exactly their slots") {
  attune::test::Random random(attune::test::test_seed(), 1);
  for (int round = 0; round < 300; ++round) {
    std::vector<i32> lens(random.integer(1, 60));
    for (i32& len : lens) len = random.chance(0.6) ? 0 : random.integer(1, 200);
    const Packed packed(lens);
    check_slots<spec(Blocks::varlen, 64, Edge::open)>(packed.params);
    check_slots<spec(Blocks::varlen, 16, Edge::bounded, 5, 2)>(packed.params);
  }
}

TEST_CASE("a causal mask's last tiles come first") {
  ForwardParams p;
  p.batch = p.groups = p.heads = 1;
  p.len_q = 10;
  p.len_k = 10;
  constexpr KernelSpec kCausal = spec(Blocks::dense, 4, Edge::bounded);
  CHECK(slot_of<kCausal>(p, 0).begin == 8);
  CHECK(slot_of<kCausal>(p, 2).begin == 0);
  CHECK(slot_of<spec(Blocks::dense, 4, Edge::open)>(p, 0).begin == 0);
}

TEST_CASE("wrong tables of a device name no row outside the tensors") {
  attune::test::Random random(attune::test::test_seed(), 2);
  constexpr KernelSpec kPacked = spec(Blocks::varlen, 4, Edge::bounded);
  constexpr KernelSpec kPaged{.head_dim_v = 1,
                              .window_left = Edge::bounded,
                              .blocks = Blocks::varlen,
                              .keys = Keys::paged,
                              .block_m = 3,
                              .block_v = 1};
  for (int round = 0; round < 3000; ++round) {
    const int count = random.integer(1, 5);
    const auto q_start = garbage(random, count + 1), k_start = garbage(random, count + 1),
               k_len = garbage(random, count);
    ForwardParams p;
    p.batch = 1;
    p.groups = 1;
    p.heads = 2;
    p.len_q = random.integer(1, 30);
    p.len_k = random.integer(0, 30);
    p.reach = make_reach(random.pick({Anchor::top_left, Anchor::bottom_right}), random.integer(0, kLargest),
                         random.integer(0, kLargest));
    p.sequences = {.count = count, .q_start = q_start.data(), .k_start = k_start.data()};
    check_rows<kPacked>(p);
    p.sequences.k_len = k_len.data();
    check_rows<kPacked>(p);

    const int width = random.integer(0, 4), page_size = random.integer(1, 9);
    const auto pages = garbage(random, count * width);
    p.len_k = page_size * random.integer(1, 5);
    p.sequences.pages = pages.data();
    p.sequences.table_width = width;
    p.sequences.page_size = make_divider(page_size);
    check_rows<kPaged>(p);
  }
}

TEST_CASE("parts of a range are in order, even, and all of it") {
  for (i32 count = -1; count <= 40; ++count) {
    for (i32 parts = 1; parts <= 50; ++parts) {
      i32 end = 7;
      for (i32 part = 0; part < parts; ++part) {
        const KeyRange share = part_of({7, 7 + count}, part, parts);
        REQUIRE(share.begin == end);
        end = share.end;
        const i32 size = share.end - share.begin;
        REQUIRE((size == max(count, 0) / parts || size == max(count, 0) / parts + 1));
      }
      REQUIRE(end == 7 + max(count, 0));
    }
  }
  const KeyRange last = part_of({0, kMaxLength}, 3999, 4000);  // no product of these fits 32 bits
  CHECK(last.end == kMaxLength);
}

TEST_CASE("slots of blocks that share keys are those of the tile, once for each") {
  constexpr KernelSpec kSplit{.split = Split::on, .block_m = 16};
  constexpr KernelSpec kWhole{.block_m = 16};
  ForwardParams whole;
  whole.batch = 2;
  whole.groups = 3;
  whole.heads = 2;
  whole.len_q = 20;
  ForwardParams split = whole;
  split.splits = 5;
  const i64 slots = forward_slots(kWhole, whole);
  REQUIRE(forward_slots(kSplit, split) == 5 * slots);
  for (u32 number = 0; number < 5 * slots; ++number) {
    const Slot one = slot_of<kWhole>(whole, number / 5);
    const Slot part = slot_of<kSplit>(split, number);
    CHECK(part.split == static_cast<i32>(number % 5));
    CHECK(part.block.index == one.block.index);
    CHECK(part.group == one.group);
    CHECK(part.head == one.head);
    CHECK(part.begin == one.begin);
    CHECK(part.end == one.end);
  }
}
