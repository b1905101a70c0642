// A mask as a picture: for a terminal, as SVG, or two of them side by side.
#pragma once

#include "attune/attn_bias.h"

#include <cstdint>
#include <string>
#include <vector>

namespace attune::tools {

/// Which pairs are visible: a string of '0' and '1' for each query row, a character for each key row.
using MaskRows = std::vector<std::string>;

/// As materialize says.
MaskRows mask_rows(const AttentionBias& bias, std::int64_t queries, std::int64_t keys);

struct MaskPicture {
  std::string name;
  std::int64_t keys = 0;
  MaskRows rows;
  std::vector<std::int64_t> row_borders;     // where sequences begin, without 0 and the end; ascending
  std::vector<std::int64_t> column_borders;  // where their keys, or pages, begin and end
  std::vector<int> row_block;                // the sequence of each row

  std::int64_t visible() const;
};

/// Fails as materialize does.
MaskPicture picture_of(const AttentionBias& bias, std::int64_t queries, std::int64_t keys);

/// With rulers and borders, two characters for each pair where that fits `columns`; else one character for
/// two queries' pairs, without. Visible pairs are in colour on a terminal.
std::string terminal_text(const MaskPicture& picture, int columns);
std::string svg_text(const MaskPicture& picture);

/// '#' visible, '.' hidden; lines in which the two differ end with an arrow.
std::string side_by_side(const std::string& left_title, const MaskRows& left, const std::string& right_title,
                         const MaskRows& right);

}  // namespace attune::tools
