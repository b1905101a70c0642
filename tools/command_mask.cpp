// attune mask: draws a bias.
#include "tools/command.h"
#include "tools/console.h"
#include "tools/mask_picture.h"
#include "tools/option_values.h"
#include "tools/output_file.h"
#include "tools/verify/bias_arguments.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <memory>
#include <optional>
#include <span>
#include <sstream>
#include <vector>

namespace attune::tools {
namespace {

using nlohmann::json;

constexpr std::int64_t kMostPairs = std::int64_t{1} << 26;

struct MaskOptions {
  std::string bias;
  std::string via;
  json arguments = json::object();
  std::optional<std::int64_t> queries;
  std::optional<std::int64_t> keys;
  std::string output;
};

/// "0,1;2,3": rows of pages.
Result<json> parse_block_tables(const std::string& text) {
  json table = json::array();
  std::istringstream rows(text);
  for (std::string row; std::getline(rows, row, ';');) {
    json pages = json::array();
    std::istringstream entries(row);
    for (std::string entry; std::getline(entries, entry, ',');) {
      std::int32_t page = 0;
      if (!CLI::detail::lexical_cast(CLI::detail::trim(entry), page)) {
        return invalid_argument(
            fmt::format("--block-tables {}: \"{}\" is no page; expected rows like \"0,1;2,3\"", text, entry));
      }
      pages.push_back(page);
    }
    table.push_back(std::move(pages));
  }
  return table;
}

/// How many queries and keys: what the sequences have, or what was asked for.
Result<verify::BiasExtents> extents_of(const AttentionBias& bias, const MaskOptions& options) {
  verify::BiasExtents extents = verify::extents_of(bias);
  const auto settle = [&](std::int64_t& extent, const std::optional<std::int64_t>& asked,
                          const char* option) -> Result<void> {
    if (extent < 0 && !asked) return invalid_argument(fmt::format("{} needs {} N", options.bias, option));
    extent = asked.value_or(extent);
    return done();
  };
  ATTUNE_TRY(settle(extents.queries, options.queries, "--queries"));
  ATTUNE_TRY(settle(extents.keys, options.keys, "--keys"));
  if (extents.queries > 0 && extents.keys > kMostPairs / extents.queries) {
    return invalid_argument(
        fmt::format("{} x {} pairs are too many to draw, the limit is 2^26", extents.queries, extents.keys));
  }
  return extents;
}

json to_json(const MaskPicture& picture) {
  return {{"class", picture.name},
          {"queries", picture.rows.size()},
          {"keys", picture.keys},
          {"visible", picture.visible()},
          {"query_borders", picture.row_borders},
          {"key_borders", picture.column_borders},
          {"rows", picture.rows}};
}

Result<int> mask(const MaskOptions& options, bool as_json) {
  ATTUNE_ASSIGN(route, verify::find_route(options.bias, options.via));
  ATTUNE_ASSIGN(bias, verify::make_bias(*route, options.arguments));
  ATTUNE_ASSIGN(extents, extents_of(bias, options));
  const MaskPicture picture = picture_of(bias, extents.queries, extents.keys);
  if (!options.output.empty()) {
    const std::string svg = svg_text(picture);
    ATTUNE_TRY(write_output_file(options.output, std::as_bytes(std::span(svg))));
  }
  if (as_json) {
    ATTUNE_TRY(print_json(to_json(picture)));
  } else if (options.output.empty()) {
    ATTUNE_TRY(print(terminal_text(picture, terminal_columns())));
  }
  return kOk;
}

std::string classes_text() {
  std::vector<std::string_view> classes;
  for (const verify::BiasRoute& route : verify::routes()) {
    if (classes.empty() || classes.back() != route.bias) classes.push_back(route.bias);
  }
  return fmt::format("Classes: {}", fmt::join(classes, " "));
}

}  // namespace

void add_mask(CLI::App& app, Session& session) {
  auto options = std::make_shared<MaskOptions>();
  CLI::App* command = app.add_subcommand("mask", "Draw a bias: which keys each query sees");
  command->add_option("CLASS", options->bias, "BlockDiagonalCausalMask, ...")->required();
  command->add_option("--via", options->via,
                      "The constructor or conversion to take, where there are several");

  json& arguments = options->arguments;
  const auto lens = [&](const char* option, const char* name, const char* what) {
    command
        ->add_option_function<std::vector<std::int64_t>>(
            option, [&arguments, name](const std::vector<std::int64_t>& list) { arguments[name] = list; },
            what)
        ->delimiter(',')
        ->check(any_integer<std::int64_t>())
        ->expected(1)
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  };
  const auto number = [&](const char* option, const char* name, const char* what) {
    command
        ->add_option_function<std::int64_t>(
            option, [&arguments, name](std::int64_t value) { arguments[name] = value; }, what)
        ->check(any_integer<std::int64_t>());
  };
  lens("--q-seqlen", "q_seqlen", "Queries of each sequence: 3,6,2");
  lens("--kv-seqlen", "kv_seqlen", "Keys of each sequence");
  lens("--kv-seqstarts", "kv_seqstarts", "First key of each sequence and, for gappy masks, all key rows");
  lens("--kv-seqstarts-in-row", "kv_seqstarts_in_row",
       "First key of each sequence in its own row of pages, for --via ...GappyKeysMask.make_paged");
  number("--kv-padding", "kv_padding", "Key rows of each sequence, padding included");
  number("--notional-padding", "notional_padding", "Logical keys of each sequence's cell, for make_paged");
  number("--page-size", "page_size", "Keys of a page");
  number("--window-size", "window_size", "Keys of a local causal window, the query's own included");
  number("--window-left", "window_left", "Keys to the left of the query's own");
  number("--window-right", "window_right", "Keys to the right of the query's own");
  auto block_tables = std::make_shared<std::string>();
  command->add_option("--block-tables", *block_tables, "Pages of each sequence: \"0,1;2,3\"");
  command->add_option("--queries", options->queries, "Queries of a mask of whole attention")
      ->check(integer_from<std::int64_t>(0));
  command->add_option("--keys", options->keys, "Keys of a mask of whole attention; key rows of a paged one")
      ->check(integer_from<std::int64_t>(0));
  command->add_option("-o,--output", options->output, "Write the picture to this SVG file");
  command->footer(classes_text());
  command->callback([options, block_tables, &session] {
    session.action = [options, block_tables, &session]() -> Result<int> {
      if (!block_tables->empty()) {
        ATTUNE_ASSIGN(table, parse_block_tables(*block_tables));
        options->arguments["block_tables"] = std::move(table);
      }
      return mask(*options, session.json);
    };
  });
}

}  // namespace attune::tools
