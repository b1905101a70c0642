#include "tools/verify/mask_classes.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>

namespace attune::verify {
namespace {

using Plan = MaskPlan;
using Tables = MaskTables;
using enum Addressing;
using enum Demand;
using enum WithTensor;

constexpr bool kOpen = false;
constexpr bool kBound = true;

std::int64_t window_size(const Plan& p) {
  return p.window.left + 1;
}
BlockTables pages(const Plan& p, const Tables& t) {
  return {t.pages, p.table_width, p.page_size};
}
BlockDiagonalMask packed_lists(const Plan& p) {
  return BlockDiagonalMask::from_seqlens(p.q_lens, p.k_lens);
}
BlockDiagonalMask packed_tables(const Tables& t) {
  return BlockDiagonalMask::from_seqstarts(t.q_starts, t.k_starts);
}
/// The gappy keys that become the paged ones: block b's start lies in notional cell b.
std::vector<std::int64_t> cell_starts(const Plan& p) {
  std::vector<std::int64_t> starts = p.k_starts;
  for (std::size_t b = 0; b < starts.size(); ++b) starts[b] += static_cast<std::int64_t>(b) * p.padding;
  starts.push_back(static_cast<std::int64_t>(starts.size()) * p.padding + p.table_width * p.page_size);
  return starts;
}
/// A mask that no class of the documentation has.
AttentionBias by_hand(AttentionBias bias, const Plan& p) {
  bias.name = "AttentionBias";
  bias.window = p.window;
  return bias;
}

// clang-format off
constexpr MaskClass kClasses[] = {
    {"None", whole, kOpen, kOpen, nothing,
     [](const Plan&, const Tables&) { return AttentionBias(); }, nullptr, nullptr, never},
    {"Tensor", whole, kOpen, kOpen, nothing,
     [](const Plan&, const Tables&) { return AttentionBias(); }, nullptr, nullptr, always},
    {"LowerTriangularMask", whole, kOpen, kBound, nothing,
     [](const Plan&, const Tables&) -> AttentionBias { return LowerTriangularMask{}; },
     nullptr, nullptr, never},
    {"LowerTriangularMaskWithTensorBias", whole, kOpen, kBound, nothing,
     [](const Plan&, const Tables&) -> AttentionBias { return LowerTriangularMask{}; },
     nullptr, nullptr, always},
    {"LowerTriangularFromBottomRightMask", whole, kOpen, kBound, nothing,
     [](const Plan&, const Tables&) -> AttentionBias { return LowerTriangularFromBottomRightMask{}; }},
    {"LowerTriangularFromBottomRightLocalAttentionMask", whole, kBound, kBound, nothing,
     [](const Plan& p, const Tables&) -> AttentionBias {
       return LowerTriangularFromBottomRightLocalAttentionMask{window_size(p)}; },
     nullptr,
     [](const Plan& p, const Tables&) -> AttentionBias {
       return LowerTriangularFromBottomRightMask{}.make_local_attention(window_size(p)); }},
    {"LocalAttentionFromBottomRightMask", whole, kBound, kBound, nothing,
     [](const Plan& p, const Tables&) -> AttentionBias {
       return LocalAttentionFromBottomRightMask{p.window.left, p.window.right}; }},
    {"AttentionBias (window)", whole, kBound, kOpen, nothing,
     [](const Plan& p, const Tables&) { return by_hand({}, p); }},

    {"BlockDiagonalMask", packed, kOpen, kOpen, nothing,
     [](const Plan& p, const Tables&) -> AttentionBias { return packed_lists(p); },
     [](const Plan&, const Tables& t) -> AttentionBias { return packed_tables(t); }},
    {"BlockDiagonalCausalMask", packed, kOpen, kBound, nothing,
     [](const Plan& p, const Tables&) -> AttentionBias {
       return BlockDiagonalCausalMask::from_seqlens(p.q_lens, p.k_lens); },
     [](const Plan&, const Tables& t) -> AttentionBias {
       return BlockDiagonalCausalMask::from_seqstarts(t.q_starts, t.k_starts); },
     [](const Plan& p, const Tables&) -> AttentionBias { return packed_lists(p).make_causal(); }},
    {"BlockDiagonalCausalFromBottomRightMask", packed, kOpen, kBound, enough_keys,
     [](const Plan& p, const Tables&) -> AttentionBias {
       return BlockDiagonalCausalFromBottomRightMask::from_seqlens(p.q_lens, p.k_lens); },
     [](const Plan&, const Tables& t) -> AttentionBias {
       return BlockDiagonalCausalFromBottomRightMask::from_seqstarts(t.q_starts, t.k_starts); },
     [](const Plan& p, const Tables&) -> AttentionBias {
       return packed_lists(p).make_causal_from_bottomright(); }},
    {"BlockDiagonalCausalLocalAttentionMask", packed, kBound, kBound, last_query_sees_one,
     [](const Plan& p, const Tables&) -> AttentionBias {
       return packed_lists(p).make_local_attention(window_size(p)); },
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return packed_tables(t).make_local_attention(window_size(p)); },
     [](const Plan& p, const Tables&) -> AttentionBias {
       return packed_lists(p).make_causal().make_local_attention(window_size(p)); }},
    {"BlockDiagonalCausalLocalAttentionFromBottomRightMask", packed, kBound, kBound, enough_keys,
     [](const Plan& p, const Tables&) -> AttentionBias {
       return packed_lists(p).make_local_attention_from_bottomright(window_size(p)); },
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return packed_tables(t).make_local_attention_from_bottomright(window_size(p)); }},
    {"AttentionBias (window, packed)", packed, kBound, kOpen, nothing,
     [](const Plan& p, const Tables&) { return by_hand(packed_lists(p), p); },
     [](const Plan& p, const Tables& t) { return by_hand(packed_tables(t), p); }},

    {"BlockDiagonalPaddedKeysMask", padded, kOpen, kOpen, nothing,
     [](const Plan& p, const Tables&) -> AttentionBias {
       return BlockDiagonalPaddedKeysMask::from_seqlens(p.q_lens, p.padding, p.k_lens); },
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return BlockDiagonalPaddedKeysMask::from_seqstarts(t.q_starts, p.padding, t.k_lens); }},
    {"BlockDiagonalCausalWithOffsetPaddedKeysMask", padded, kOpen, kBound, nothing,
     [](const Plan& p, const Tables&) -> AttentionBias {
       return BlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqlens(p.q_lens, p.padding, p.k_lens); },
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return BlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqstarts(t.q_starts, p.padding, t.k_lens); }},
    {"BlockDiagonalLocalAttentionPaddedKeysMask", padded, kBound, kBound, nothing,
     [](const Plan& p, const Tables&) -> AttentionBias {
       return BlockDiagonalLocalAttentionPaddedKeysMask::from_seqlens_local(
           p.q_lens, p.padding, p.k_lens, p.window.left, p.window.right); },
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return BlockDiagonalLocalAttentionPaddedKeysMask::from_seqstarts_local(
           t.q_starts, p.padding, t.k_lens, p.window.left, p.window.right); }},
    {"BlockDiagonalCausalLocalAttentionPaddedKeysMask", padded, kBound, kBound, nothing,
     [](const Plan& p, const Tables&) -> AttentionBias {
       return BlockDiagonalCausalLocalAttentionPaddedKeysMask::from_seqlens_local(
           p.q_lens, p.padding, p.k_lens, window_size(p)); },
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return BlockDiagonalCausalLocalAttentionPaddedKeysMask::from_seqstarts_local(
           t.q_starts, p.padding, t.k_lens, window_size(p)); }},

    {"BlockDiagonalGappyKeysMask", gappy, kOpen, kOpen, nothing,
     [](const Plan& p, const Tables&) -> AttentionBias {
       return BlockDiagonalGappyKeysMask::from_seqlens(p.q_lens, p.k_starts, p.k_lens); },
     [](const Plan&, const Tables& t) -> AttentionBias {
       return BlockDiagonalGappyKeysMask::from_seqstarts(t.q_starts, t.k_starts, t.k_lens); }},
    {"BlockDiagonalCausalWithOffsetGappyKeysMask", gappy, kOpen, kBound, nothing,
     [](const Plan& p, const Tables&) -> AttentionBias {
       return BlockDiagonalCausalWithOffsetGappyKeysMask::from_seqlens(p.q_lens, p.k_starts, p.k_lens); },
     [](const Plan&, const Tables& t) -> AttentionBias {
       return BlockDiagonalCausalWithOffsetGappyKeysMask::from_seqstarts(t.q_starts, t.k_starts, t.k_lens); }},

    {"PagedBlockDiagonalPaddedKeysMask", paged, kOpen, kOpen, nothing,
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return PagedBlockDiagonalPaddedKeysMask::from_seqlens(p.q_lens, p.k_lens, pages(p, t)); },
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return PagedBlockDiagonalPaddedKeysMask::from_seqstarts(t.q_starts, t.k_lens, pages(p, t)); },
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return BlockDiagonalPaddedKeysMask::from_seqlens(p.q_lens, p.padding, p.k_lens)
           .make_paged(pages(p, t)); }},
    {"PagedBlockDiagonalCausalWithOffsetPaddedKeysMask", paged, kOpen, kBound, nothing,
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return PagedBlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqlens(p.q_lens, p.k_lens, pages(p, t)); },
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return PagedBlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqstarts(
           t.q_starts, t.k_lens, pages(p, t)); },
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return BlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqlens(p.q_lens, p.padding, p.k_lens)
           .make_paged(pages(p, t)); }},
    {"PagedBlockDiagonalLocalAttentionPaddedKeysMask", paged, kBound, kBound, nothing,
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return BlockDiagonalLocalAttentionPaddedKeysMask::from_seqlens_local(
           p.q_lens, p.padding, p.k_lens, p.window.left, p.window.right).make_paged(pages(p, t)); },
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return BlockDiagonalLocalAttentionPaddedKeysMask::from_seqstarts_local(
           t.q_starts, p.padding, t.k_lens, p.window.left, p.window.right).make_paged(pages(p, t)); }},
    {"PagedBlockDiagonalCausalLocalAttentionPaddedKeysMask", paged, kBound, kBound, nothing,
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return BlockDiagonalCausalLocalAttentionPaddedKeysMask::from_seqlens_local(
           p.q_lens, p.padding, p.k_lens, window_size(p)).make_paged(pages(p, t)); },
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return BlockDiagonalCausalLocalAttentionPaddedKeysMask::from_seqstarts_local(
           t.q_starts, p.padding, t.k_lens, window_size(p)).make_paged(pages(p, t)); }},
    {"AttentionBias (window, paged)", paged, kBound, kOpen, nothing,
     [](const Plan& p, const Tables& t) {
       return by_hand(PagedBlockDiagonalPaddedKeysMask::from_seqlens(p.q_lens, p.k_lens, pages(p, t)), p); },
     [](const Plan& p, const Tables& t) {
       return by_hand(PagedBlockDiagonalPaddedKeysMask::from_seqstarts(t.q_starts, t.k_lens, pages(p, t)), p); }},

    {"PagedBlockDiagonalGappyKeysMask", paged_gappy, kOpen, kOpen, nothing,
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return PagedBlockDiagonalGappyKeysMask::from_seqlens(p.q_lens, p.k_starts, p.k_lens, pages(p, t)); },
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return PagedBlockDiagonalGappyKeysMask::from_seqstarts(t.q_starts, t.k_starts, t.k_lens, pages(p, t)); },
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return BlockDiagonalGappyKeysMask::from_seqlens(p.q_lens, cell_starts(p), p.k_lens)
           .make_paged(pages(p, t), p.padding); }},
    {"PagedBlockDiagonalCausalWithOffsetGappyKeysMask", paged_gappy, kOpen, kBound, nothing,
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return PagedBlockDiagonalCausalWithOffsetGappyKeysMask::from_seqlens(
           p.q_lens, p.k_starts, p.k_lens, pages(p, t)); },
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return PagedBlockDiagonalCausalWithOffsetGappyKeysMask::from_seqstarts(
           t.q_starts, t.k_starts, t.k_lens, pages(p, t)); },
     [](const Plan& p, const Tables& t) -> AttentionBias {
       return BlockDiagonalCausalWithOffsetGappyKeysMask::from_seqlens(p.q_lens, cell_starts(p), p.k_lens)
           .make_paged(pages(p, t), p.padding); }},
};
// clang-format on

// ---- Drawing ----

/// A reach of a window: short, about as long as the sequence, or beyond every key.
std::int64_t random_reach(Random& random, int length) {
  const double kind = random.unit();
  if (kind < 0.5) return random.integer(0, 8);
  if (kind < 0.95) return random.integer(0, length + 8);
  return std::int64_t{1} << random.pick({31, 40, 62});
}

/// Both sides, bounded as the class has them.
Window random_window(Random& random, const MaskClass& mask, int length) {
  Window window;
  window.anchor = random.pick({Window::Anchor::top_left, Window::Anchor::bottom_right});
  if (mask.left) window.left = random_reach(random, length);
  if (mask.right) window.right = random_reach(random, length);
  return window;
}

/// Queries that make no more pairs with the keys than allowed, if one does.
std::int64_t fewer(Random& random, std::int64_t queries, std::int64_t keys, std::int64_t most_pairs) {
  if (keys == 0 || queries * keys <= most_pairs) return queries;
  return random.integer(1, static_cast<int>(std::max<std::int64_t>(1, most_pairs / keys)));
}

void draw_lengths(Random& random, const MaskClass& mask, std::int64_t most_pairs, Plan& plan) {
  const int count = random.integer(1, 6);
  std::int64_t pairs = 0;
  for (int b = 0; b < count; ++b) {
    std::int64_t queries = random_length(random);
    std::int64_t keys = random.chance(0.3) ? queries : random_length(random);
    if (mask.demand == enough_keys && keys < queries) std::swap(keys, queries);
    if (mask.demand == last_query_sees_one) {
      keys = std::max(keys, queries - plan.window.left);  // queries - window_size < keys
    }
    queries = fewer(random, queries, keys, most_pairs - pairs);
    pairs += queries * keys;
    plan.q_lens.push_back(queries);
    plan.k_lens.push_back(keys);
  }
  plan.len_q = static_cast<int>(std::accumulate(plan.q_lens.begin(), plan.q_lens.end(), std::int64_t{0}));
}

std::int64_t longest(const std::vector<std::int64_t>& lens) {
  return *std::ranges::max_element(lens);
}

/// Blocks in any order, with gaps between them or over each other.
void draw_gaps(Random& random, Plan& plan) {
  const std::int64_t total = longest(plan.k_lens) + random.integer(0, 100);
  for (const std::int64_t len : plan.k_lens) {
    plan.k_starts.push_back(random.integer(0, static_cast<int>(total - len)));
  }
  plan.k_starts.push_back(total);
  plan.len_k = static_cast<int>(total);
}

/// Pages in random order; some are shared, others unused. Columns beyond a sequence's keys name no page.
void draw_pages(Random& random, bool with_starts, int granule, Plan& plan) {
  const auto count = plan.k_lens.size();
  const int size = random.chance(0.5) ? random.pick({1, 2, 4, 8, 16, 32, 64}) : random.integer(1, 64);
  plan.page_size = kernel::round_up(size, granule);
  std::int64_t end = 0;  // the furthest logical key
  for (const std::int64_t len : plan.k_lens) {
    const std::int64_t start = with_starts ? random.integer(0, 40 / granule) * granule : 0;
    if (with_starts) plan.k_starts.push_back(start);
    end = std::max(end, start + len);
  }
  if (with_starts) end = std::max(end, longest(plan.k_starts) + 1);  // an empty block starts inside, too
  plan.table_width = (end + plan.page_size - 1) / plan.page_size + random.integer(0, 2);
  plan.padding = (plan.table_width + random.integer(0, 2)) * plan.page_size;
  const auto pages =
      static_cast<int>(static_cast<std::int64_t>(count) * plan.table_width) + random.integer(1, 3);
  plan.len_k = static_cast<int>(pages * plan.page_size);
  std::vector<std::int32_t> unused(pages);
  std::iota(unused.begin(), unused.end(), 0);
  random.shuffle(unused);
  for (std::size_t b = 0; b < count; ++b) {
    const std::int64_t start = with_starts ? plan.k_starts[b] : 0;
    for (std::int64_t column = 0; column < plan.table_width; ++column) {
      const bool holds_keys =
          (column + 1) * plan.page_size > start && column * plan.page_size < start + plan.k_lens[b];
      std::int32_t page = plan.pages.empty() ? -1 : random.pick(plan.pages);
      if (page < 0 || page >= pages || !random.chance(0.1)) {  // not shared
        page = unused.back();
        unused.pop_back();
      }
      plan.pages.push_back(holds_keys ? page : random.pick({page, -1, pages, 1 << 30}));
    }
  }
}

}  // namespace

std::string MaskPlan::text() const {
  std::string text = fmt::format("Mq{} Mkv{}", len_q, len_k);
  if (window.left >= 0) text += fmt::format(" left {}", window.left);
  if (window.right >= 0) text += fmt::format(" right {}", window.right);
  if (q_lens.empty()) return text;
  text += fmt::format(" q_lens {} k_lens {}", q_lens, k_lens);
  if (!k_starts.empty()) text += fmt::format(" k_starts {}", k_starts);
  if (page_size > 0) text += fmt::format(" pages of {}: {} columns {}", page_size, table_width, pages);
  return text;
}

HostTables tables_of(const MaskPlan& plan) {
  HostTables tables;
  const auto narrow = [](const std::vector<std::int64_t>& numbers) {
    return std::vector<std::int32_t>(numbers.begin(), numbers.end());
  };
  const auto starts_of = [](const std::vector<std::int64_t>& lens) {
    std::vector<std::int32_t> starts{0};
    for (const std::int64_t len : lens) starts.push_back(starts.back() + static_cast<std::int32_t>(len));
    return starts;
  };
  if (plan.q_lens.empty()) return tables;
  tables.q_starts = starts_of(plan.q_lens);
  tables.k_starts = plan.k_starts.empty() ? starts_of(plan.k_lens) : narrow(plan.k_starts);
  tables.k_lens = narrow(plan.k_lens);
  tables.pages = plan.pages;
  return tables;
}

std::span<const MaskClass> mask_classes() {
  return kClasses;
}

bool serves(const codegen::Problem& problem, const MaskClass& mask) {
  using kernel::Blocks;
  using kernel::Edge;
  using kernel::Keys;
  const auto edge = [](bool bound) { return bound ? Edge::bounded : Edge::open; };
  const bool with_tensor = problem.bias != kernel::Bias::none;
  if (mask.tensor != maybe && (mask.tensor == always) != with_tensor) return false;
  const bool behind_pages = mask.keys == paged || mask.keys == paged_gappy;
  return !codegen::merges(problem.operation) && problem.window_left == edge(mask.left) &&
         problem.window_right == edge(mask.right) &&
         problem.blocks == (mask.keys == whole ? Blocks::dense : Blocks::varlen) &&
         problem.keys == (behind_pages ? Keys::paged : Keys::contiguous);
}

int random_length(Random& random) {
  const double kind = random.unit();
  if (kind < 0.05) return 0;
  if (kind < 0.13) return 1;
  if (kind < 0.55) return random.pick({16, 32, 48, 64, 96, 128}) + random.integer(-1, 1);
  return random.integer(2, 160);
}

MaskPlan random_plan(Random& random, const MaskClass& mask, std::int64_t most_pairs, int granule) {
  Plan plan;
  plan.window = random_window(random, mask, 160);
  if (mask.keys == whole) {
    plan.len_q = random_length(random);
    plan.len_k = random.chance(0.2) ? plan.len_q : random_length(random);
    plan.len_q = static_cast<int>(fewer(random, plan.len_q, plan.len_k, most_pairs));
    return plan;
  }
  draw_lengths(random, mask, most_pairs, plan);
  switch (mask.keys) {
    case packed:
      plan.len_k = static_cast<int>(std::accumulate(plan.k_lens.begin(), plan.k_lens.end(), std::int64_t{0}));
      break;
    case padded:
      plan.padding = longest(plan.k_lens) + random.integer(0, 20);
      plan.len_k = static_cast<int>(plan.padding * static_cast<std::int64_t>(plan.k_lens.size()));
      break;
    case gappy: draw_gaps(random, plan); break;
    case paged: draw_pages(random, false, granule, plan); break;
    case paged_gappy: draw_pages(random, true, granule, plan); break;
    case whole: break;
  }
  return plan;
}

AttentionBias make_mask(const MaskClass& mask, Route route, const MaskPlan& plan, const MaskTables& tables) {
  if (route == Route::tables && mask.from_tables != nullptr) return mask.from_tables(plan, tables);
  if (route == Route::conversion && mask.converted != nullptr) return mask.converted(plan, tables);
  return mask.from_lists(plan, tables);
}

}  // namespace attune::verify
