#include "tools/mask_picture.h"

#include "tools/console.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

namespace attune::tools {
namespace {

constexpr std::array kBlockColours{Colour::green, Colour::yellow};

/// Sorted, each once, without what lies on the rim.
std::vector<std::int64_t> inner_borders(std::vector<std::int64_t> borders, std::int64_t end) {
  std::ranges::sort(borders);
  borders.erase(std::unique(borders.begin(), borders.end()), borders.end());
  std::erase_if(borders, [&](std::int64_t border) { return border <= 0 || border >= end; });
  return borders;
}

std::vector<std::int64_t> key_borders(const Sequences& s, std::int64_t keys) {
  std::vector<std::int64_t> borders;
  if (s.block_tables) {
    for (std::int64_t row = 0; row < keys; row += s.page_size) borders.push_back(row);
    return borders;
  }
  const std::vector<std::int32_t> starts = s.k_starts.read();
  borders.assign(starts.begin(), starts.end());
  return borders;
}

bool is_border(const std::vector<std::int64_t>& borders, std::int64_t at) {
  return std::ranges::binary_search(borders, at);
}

/// Something for each key, with something else at each border.
template <typename Cell>
std::string line_of(const MaskPicture& picture, std::string_view border, Cell&& cell) {
  std::string line;
  for (std::int64_t j = 0; j < picture.keys; ++j) {
    if (is_border(picture.column_borders, j)) line += border;
    line += cell(j);
  }
  return line;
}

/// The number of the first key behind each border, where there is room for it.
std::string key_ruler(const MaskPicture& picture) {
  std::string ruler;
  std::int64_t column = 0;
  for (std::int64_t j = 0; j < picture.keys; ++j, column += 2) {
    if (is_border(picture.column_borders, j)) ++column;
    if (j != 0 && !is_border(picture.column_borders, j)) continue;
    const auto taken = static_cast<std::int64_t>(ruler.size());
    if (taken > column || (taken == column && taken > 0)) continue;
    ruler += std::string(static_cast<std::size_t>(column - taken), ' ') + std::to_string(j);
  }
  return ruler;
}

/// The visible pairs of a row in colour, run by run.
std::string painted(const MaskPicture& picture, std::size_t i) {
  const Colour colour = kBlockColours[static_cast<std::size_t>(picture.row_block[i]) % kBlockColours.size()];
  std::string line;
  std::string run;
  const auto end_run = [&] {
    if (!run.empty()) line += paint(run, colour, Stream::out);
    run.clear();
  };
  for (std::int64_t j = 0; j < picture.keys; ++j) {
    if (is_border(picture.column_borders, j)) {
      end_run();
      line += "│";
    }
    if (picture.rows[i][static_cast<std::size_t>(j)] == '1') {
      run += "██";
    } else {
      end_run();
      line += "··";
    }
  }
  end_run();
  return line;
}

std::string ruled_text(const MaskPicture& picture) {
  const std::size_t label = std::max<std::size_t>(2, std::to_string(picture.rows.size()).size());
  const std::string margin(label + 1, ' ');
  const auto rule = [&](const char* left, const char* cross, const char* right) {
    return margin + left + line_of(picture, cross, [](std::int64_t) { return "──"; }) + right + "\n";
  };
  std::string text = margin + " " + key_ruler(picture) + "\n" + rule("┌", "┬", "┐");
  for (std::size_t i = 0; i < picture.rows.size(); ++i) {
    if (is_border(picture.row_borders, static_cast<std::int64_t>(i))) text += rule("├", "┼", "┤");
    text += fmt::format("{:>{}} │{}│\n", i, label, painted(picture, i));
  }
  return text + rule("└", "┴", "┘");
}

/// Two queries in a line, by half blocks.
std::string dense_text(const MaskPicture& picture) {
  constexpr std::array kHalves{"·", "▄", "▀", "█"};
  std::string text;
  for (std::size_t i = 0; i < picture.rows.size(); i += 2) {
    std::string line;
    for (std::size_t j = 0; j < static_cast<std::size_t>(picture.keys); ++j) {
      const bool upper = picture.rows[i][j] == '1';
      const bool lower = i + 1 < picture.rows.size() && picture.rows[i + 1][j] == '1';
      line += kHalves[std::size_t{upper} * 2 + std::size_t{lower}];
    }
    text += line + "\n";
  }
  return text;
}

std::string title_of(const MaskPicture& picture) {
  const auto pairs = static_cast<double>(picture.keys) * static_cast<double>(picture.rows.size());
  const std::int64_t visible = picture.visible();
  return fmt::format("{}: {} queries x {} keys, {} visible ({:.3g} %)", picture.name, picture.rows.size(),
                     picture.keys, visible, pairs > 0 ? 100.0 * static_cast<double>(visible) / pairs : 0.0);
}

}  // namespace

MaskRows mask_rows(const AttentionBias& bias, std::int64_t queries, std::int64_t keys) {
  const Tensor matrix = bias.materialize({queries, keys});
  const auto* element = static_cast<const float*>(matrix.data());
  MaskRows rows(static_cast<std::size_t>(queries));
  for (std::string& row : rows) {
    for (std::int64_t j = 0; j < keys; ++j) row += *element++ == 0.0f ? '1' : '0';
  }
  return rows;
}

std::int64_t MaskPicture::visible() const {
  std::int64_t count = 0;
  for (const std::string& row : rows) count += std::ranges::count(row, '1');
  return count;
}

MaskPicture picture_of(const AttentionBias& bias, std::int64_t queries, std::int64_t keys) {
  MaskPicture picture{.name = bias.name, .keys = keys, .rows = mask_rows(bias, queries, keys)};
  picture.row_block.resize(picture.rows.size());
  if (!bias.sequences) return picture;
  const std::vector<std::int32_t> starts = bias.sequences->q_starts.read();
  for (std::size_t b = 0; b + 1 < starts.size(); ++b) {
    std::fill(picture.row_block.begin() + starts[b], picture.row_block.begin() + starts[b + 1],
              static_cast<int>(b));
  }
  picture.row_borders = inner_borders({starts.begin(), starts.end()}, queries);
  picture.column_borders = inner_borders(key_borders(*bias.sequences, keys), keys);
  return picture;
}

std::string terminal_text(const MaskPicture& picture, int columns) {
  const auto width = 2 * picture.keys + static_cast<std::int64_t>(picture.column_borders.size()) +
                     static_cast<std::int64_t>(std::to_string(picture.rows.size()).size()) + 4;
  return title_of(picture) + "\n" + (width <= columns ? ruled_text(picture) : dense_text(picture));
}

std::string svg_text(const MaskPicture& picture) {
  constexpr int kCell = 10;
  constexpr int kTitle = 20;
  constexpr std::array kFills{"#2f6f9f", "#d08a2e"};
  const std::int64_t width = picture.keys * kCell;
  const auto height = static_cast<std::int64_t>(picture.rows.size()) * kCell;
  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"-1 {} {} {}\" font-family=\"sans-serif\" "
      "font-size=\"12\">\n"
      "<title>{}</title>\n<text x=\"0\" y=\"-6\">{}</text>\n"
      "<rect width=\"{}\" height=\"{}\" fill=\"#f4f4f4\" stroke=\"#888\"/>\n",
      -kTitle, std::max<std::int64_t>(width, 480) + 2, height + kTitle + 1, title_of(picture),
      title_of(picture), width, height);
  for (std::size_t i = 0; i < picture.rows.size(); ++i) {
    const std::string& row = picture.rows[i];
    const char* fill = kFills[static_cast<std::size_t>(picture.row_block[i]) % kFills.size()];
    for (std::size_t begin = row.find('1'); begin != std::string::npos; begin = row.find('1', begin)) {
      const std::size_t end = std::min(row.find('0', begin), row.size());
      svg += fmt::format("<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"{}\"/>\n", begin * kCell,
                         i * kCell, (end - begin) * kCell, kCell, fill);
      begin = end;
    }
  }
  const auto line = [&](std::int64_t x1, std::int64_t y1, std::int64_t x2, std::int64_t y2) {
    svg += fmt::format("<line x1=\"{}\" y1=\"{}\" x2=\"{}\" y2=\"{}\" stroke=\"#888\"/>\n", x1, y1, x2, y2);
  };
  for (const std::int64_t at : picture.row_borders) line(0, at * kCell, width, at * kCell);
  for (const std::int64_t at : picture.column_borders) line(at * kCell, 0, at * kCell, height);
  return svg + "</svg>\n";
}

std::string side_by_side(const std::string& left_title, const MaskRows& left, const std::string& right_title,
                         const MaskRows& right) {
  const auto drawn = [](const MaskRows& rows, std::size_t i) {
    std::string row = i < rows.size() ? rows[i] : std::string();
    std::ranges::replace(row, '1', '#');
    std::ranges::replace(row, '0', '.');
    return row;
  };
  std::size_t width = left_title.size();
  for (const std::string& row : left) width = std::max(width, row.size());
  std::string text = fmt::format("{:<{}}   {}\n", left_title, width, right_title);
  for (std::size_t i = 0; i < std::max(left.size(), right.size()); ++i) {
    const std::string a = drawn(left, i);
    const std::string b = drawn(right, i);
    text += fmt::format("{:<{}}   {}{}\n", a, width, b, a == b ? "" : "  <-");
  }
  return text;
}

}  // namespace attune::tools
