#include "tools/verify/bias_arguments.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

namespace attune::verify {
namespace {

using nlohmann::json;

// ---- Arguments ----

SeqLens list(const json& arguments, const char* name) {
  return arguments.contains(name) ? arguments.at(name).get<SeqLens>() : SeqLens{};
}

std::int64_t number(const json& arguments, const char* name) {
  return arguments.at(name).get<std::int64_t>();
}

BlockTables tables(const json& arguments) {
  const auto rows = arguments.at("block_tables").get<std::vector<std::vector<std::int32_t>>>();
  const std::size_t width = rows.empty() ? 0 : rows.front().size();
  std::vector<std::int32_t> table;
  for (std::size_t b = 0; b < rows.size(); ++b) {
    if (rows[b].size() != width) {
      throw Error(
          ErrorKind::invalid_argument,
          fmt::format("block_tables: row {} has {} pages, but row 0 has {}", b, rows[b].size(), width));
    }
    table.insert(table.end(), rows[b].begin(), rows[b].end());
  }
  return {std::move(table), static_cast<std::int64_t>(width), number(arguments, "page_size")};
}

// ---- Routes ----

BlockDiagonalMask block_diagonal(const json& a) {
  return BlockDiagonalMask::from_seqlens(list(a, "q_seqlen"), list(a, "kv_seqlen"));
}

template <typename Mask>
AttentionBias from_seqlens(const json& a) {
  return Mask::from_seqlens(list(a, "q_seqlen"), list(a, "kv_seqlen"));
}

template <typename Mask>
Mask padded(const json& a) {
  return Mask::from_seqlens(list(a, "q_seqlen"), number(a, "kv_padding"), list(a, "kv_seqlen"));
}

template <typename Mask>
Mask padded_local(const json& a) {
  return Mask::from_seqlens_local(list(a, "q_seqlen"), number(a, "kv_padding"), list(a, "kv_seqlen"),
                                  number(a, "window_size"));
}

template <>
BlockDiagonalLocalAttentionPaddedKeysMask padded_local(const json& a) {
  return BlockDiagonalLocalAttentionPaddedKeysMask::from_seqlens_local(
      list(a, "q_seqlen"), number(a, "kv_padding"), list(a, "kv_seqlen"), number(a, "window_left"),
      number(a, "window_right"));
}

template <typename Mask>
AttentionBias gappy(const json& a) {
  return Mask::from_seqlens(list(a, "q_seqlen"), list(a, "kv_seqstarts"), list(a, "kv_seqlen"));
}

template <typename Mask>
AttentionBias paged(const json& a) {
  return Mask::from_seqlens(list(a, "q_seqlen"), list(a, "kv_seqlen"), tables(a));
}

template <typename Mask>
AttentionBias paged_gappy(const json& a) {
  return Mask::from_seqlens(list(a, "q_seqlen"), list(a, "kv_seqstarts"), list(a, "kv_seqlen"), tables(a));
}

/// The gappy bias whose block b lives in the cell [b * notional_padding, (b + 1) * notional_padding) and
/// starts there where kv_seqstarts_in_row says, in pages.
template <typename Mask>
AttentionBias paged_cells(const json& a) {
  const std::int64_t padding = number(a, "notional_padding");
  SeqLens starts = list(a, "kv_seqstarts_in_row");
  for (std::size_t b = 0; b < starts.size(); ++b) starts[b] += static_cast<std::int64_t>(b) * padding;
  starts.push_back(static_cast<std::int64_t>(starts.size()) * padding);
  return Mask::from_seqlens(list(a, "q_seqlen"), starts, list(a, "kv_seqlen")).make_paged(tables(a), padding);
}

const std::vector<BiasRoute>& all_routes() {
  using Names = std::vector<std::string_view>;
  const Names none;
  const Names size{"window_size"};
  const Names sides{"window_left", "window_right"};
  const Names blocks{"q_seqlen", "kv_seqlen?"};
  const Names local_blocks{"q_seqlen", "kv_seqlen?", "window_size"};
  const Names padding{"q_seqlen", "kv_padding", "kv_seqlen"};
  const Names padding_size{"q_seqlen", "kv_padding", "kv_seqlen", "window_size"};
  const Names padding_sides{"q_seqlen", "kv_padding", "kv_seqlen", "window_left", "window_right"};
  const Names gaps{"q_seqlen", "kv_seqstarts", "kv_seqlen"};
  const Names pages{"q_seqlen", "kv_seqlen", "block_tables", "page_size"};
  const Names paged_gaps{"q_seqlen", "kv_seqstarts", "kv_seqlen", "block_tables", "page_size"};
  const Names cells{"q_seqlen",     "kv_seqstarts_in_row", "kv_seqlen",
                    "block_tables", "page_size",           "notional_padding"};
  const auto with_pages = [](Names names) {
    names.insert(names.end(), {"block_tables", "page_size"});
    return names;
  };
  static const std::vector<BiasRoute> routes{
      {"LowerTriangularMask", "constructor", none,
       [](const json&) -> AttentionBias { return LowerTriangularMask{}; }},
      {"LowerTriangularFromBottomRightMask", "constructor", none,
       [](const json&) -> AttentionBias { return LowerTriangularFromBottomRightMask{}; }},
      {"LowerTriangularFromBottomRightLocalAttentionMask",
       "LowerTriangularFromBottomRightMask.make_local_attention", size,
       [](const json& a) -> AttentionBias {
         return LowerTriangularFromBottomRightMask{}.make_local_attention(number(a, "window_size"));
       }},
      {"LocalAttentionFromBottomRightMask", "constructor", sides,
       [](const json& a) -> AttentionBias {
         return LocalAttentionFromBottomRightMask{number(a, "window_left"), number(a, "window_right")};
       }},

      {"BlockDiagonalMask", "from_seqlens", blocks, from_seqlens<BlockDiagonalMask>},
      {"BlockDiagonalCausalMask", "BlockDiagonalMask.make_causal", blocks,
       [](const json& a) -> AttentionBias { return block_diagonal(a).make_causal(); }},
      {"BlockDiagonalCausalMask", "from_seqlens", blocks, from_seqlens<BlockDiagonalCausalMask>},
      {"BlockDiagonalCausalFromBottomRightMask", "BlockDiagonalMask.make_causal_from_bottomright", blocks,
       [](const json& a) -> AttentionBias { return block_diagonal(a).make_causal_from_bottomright(); }},
      {"BlockDiagonalCausalFromBottomRightMask", "from_seqlens", blocks,
       from_seqlens<BlockDiagonalCausalFromBottomRightMask>},
      {"BlockDiagonalCausalLocalAttentionMask", "BlockDiagonalMask.make_local_attention", local_blocks,
       [](const json& a) -> AttentionBias {
         return block_diagonal(a).make_local_attention(number(a, "window_size"));
       }},
      {"BlockDiagonalCausalLocalAttentionFromBottomRightMask",
       "BlockDiagonalMask.make_local_attention_from_bottomright", local_blocks,
       [](const json& a) -> AttentionBias {
         return block_diagonal(a).make_local_attention_from_bottomright(number(a, "window_size"));
       }},

      {"BlockDiagonalPaddedKeysMask", "from_seqlens", padding,
       [](const json& a) -> AttentionBias { return padded<BlockDiagonalPaddedKeysMask>(a); }},
      {"BlockDiagonalCausalWithOffsetPaddedKeysMask", "from_seqlens", padding,
       [](const json& a) -> AttentionBias { return padded<BlockDiagonalCausalWithOffsetPaddedKeysMask>(a); }},
      {"BlockDiagonalLocalAttentionPaddedKeysMask", "from_seqlens_local", padding_sides,
       [](const json& a) -> AttentionBias {
         return padded_local<BlockDiagonalLocalAttentionPaddedKeysMask>(a);
       }},
      {"BlockDiagonalCausalLocalAttentionPaddedKeysMask", "from_seqlens_local", padding_size,
       [](const json& a) -> AttentionBias {
         return padded_local<BlockDiagonalCausalLocalAttentionPaddedKeysMask>(a);
       }},

      {"BlockDiagonalGappyKeysMask", "from_seqlens", gaps, gappy<BlockDiagonalGappyKeysMask>},
      {"BlockDiagonalCausalWithOffsetGappyKeysMask", "from_seqlens", gaps,
       gappy<BlockDiagonalCausalWithOffsetGappyKeysMask>},

      {"PagedBlockDiagonalPaddedKeysMask", "from_seqlens", pages, paged<PagedBlockDiagonalPaddedKeysMask>},
      {"PagedBlockDiagonalPaddedKeysMask", "BlockDiagonalPaddedKeysMask.make_paged", with_pages(padding),
       [](const json& a) -> AttentionBias {
         return padded<BlockDiagonalPaddedKeysMask>(a).make_paged(tables(a));
       }},
      {"PagedBlockDiagonalCausalWithOffsetPaddedKeysMask", "from_seqlens", pages,
       paged<PagedBlockDiagonalCausalWithOffsetPaddedKeysMask>},
      {"PagedBlockDiagonalCausalWithOffsetPaddedKeysMask",
       "BlockDiagonalCausalWithOffsetPaddedKeysMask.make_paged", with_pages(padding),
       [](const json& a) -> AttentionBias {
         return padded<BlockDiagonalCausalWithOffsetPaddedKeysMask>(a).make_paged(tables(a));
       }},
      {"PagedBlockDiagonalLocalAttentionPaddedKeysMask",
       "BlockDiagonalLocalAttentionPaddedKeysMask.make_paged", with_pages(padding_sides),
       [](const json& a) -> AttentionBias {
         return padded_local<BlockDiagonalLocalAttentionPaddedKeysMask>(a).make_paged(tables(a));
       }},
      {"PagedBlockDiagonalCausalLocalAttentionPaddedKeysMask",
       "BlockDiagonalCausalLocalAttentionPaddedKeysMask.make_paged", with_pages(padding_size),
       [](const json& a) -> AttentionBias {
         return padded_local<BlockDiagonalCausalLocalAttentionPaddedKeysMask>(a).make_paged(tables(a));
       }},
      {"PagedBlockDiagonalGappyKeysMask", "from_seqlens", paged_gaps,
       paged_gappy<PagedBlockDiagonalGappyKeysMask>},
      {"PagedBlockDiagonalGappyKeysMask", "BlockDiagonalGappyKeysMask.make_paged", cells,
       paged_cells<BlockDiagonalGappyKeysMask>},
      {"PagedBlockDiagonalCausalWithOffsetGappyKeysMask", "from_seqlens", paged_gaps,
       paged_gappy<PagedBlockDiagonalCausalWithOffsetGappyKeysMask>},
      {"PagedBlockDiagonalCausalWithOffsetGappyKeysMask",
       "BlockDiagonalCausalWithOffsetGappyKeysMask.make_paged", cells,
       paged_cells<BlockDiagonalCausalWithOffsetGappyKeysMask>},
  };
  return routes;
}

// ---- Checks ----

struct Argument {
  std::string_view name;
  bool required;
};

Argument argument_of(std::string_view spelled) {
  const bool required = !spelled.ends_with('?');
  return {required ? spelled : spelled.substr(0, spelled.size() - 1), required};
}

std::string takes_text(const BiasRoute& route) {
  std::vector<std::string_view> names;
  for (const std::string_view spelled : route.takes) names.push_back(argument_of(spelled).name);
  return names.empty() ? "no arguments" : fmt::format("{}", fmt::join(names, ", "));
}

Result<void> check_names(const BiasRoute& route, const json& arguments) {
  for (const std::string_view spelled : route.takes) {
    const Argument argument = argument_of(spelled);
    if (argument.required && !arguments.contains(argument.name)) {
      return invalid_argument(
          fmt::format("{} needs {}; it takes {}", route.bias, argument.name, takes_text(route)));
    }
  }
  for (const auto& argument : arguments.items()) {
    const auto is = [&](std::string_view spelled) { return argument_of(spelled).name == argument.key(); };
    if (std::ranges::none_of(route.takes, is)) {
      return invalid_argument(
          fmt::format("{} has no {}; it takes {}", route.bias, argument.key(), takes_text(route)));
    }
  }
  return done();
}

}  // namespace

std::span<const BiasRoute> routes() {
  return all_routes();
}

Result<const BiasRoute*> find_route(std::string_view bias, std::string_view via) {
  std::vector<std::string_view> classes;
  std::vector<std::string_view> ways;
  for (const BiasRoute& route : routes()) {
    if (route.bias == bias && (via.empty() || route.via == via)) return &route;
    if (route.bias == bias) ways.push_back(route.via);
    if (classes.empty() || classes.back() != route.bias) classes.push_back(route.bias);
  }
  if (ways.empty()) {
    return invalid_argument(fmt::format("no bias class {}; there are {}", bias, fmt::join(classes, ", ")));
  }
  return invalid_argument(fmt::format("{} is not made via {}, but via {}", bias, via, fmt::join(ways, ", ")));
}

Result<AttentionBias> make_bias(const BiasRoute& route, const json& arguments) {
  ATTUNE_TRY(check_names(route, arguments));
  try {
    return route.make(arguments);
  } catch (const json::exception& error) {
    return invalid_argument(
        fmt::format("{}: an argument is no number or no list of numbers: {}", route.bias, error.what()));
  } catch (const Error& error) {
    return Failure{error.kind(), error.what()};
  }
}

BiasExtents extents_of(const AttentionBias& bias) {
  if (!bias.sequences) return {};
  const Sequences& s = *bias.sequences;
  BiasExtents extents{.queries = s.q_starts.read().back(), .keys = s.key_rows};
  if (s.block_tables) {
    std::int64_t pages = 0;
    for (const std::int32_t page : s.block_tables->read()) pages = std::max<std::int64_t>(pages, page + 1);
    extents.keys = pages * s.page_size;
  }
  return extents;
}

}  // namespace attune::verify
