// A bias as tests can ask it: its blocks, the rows of their keys, and which key each query sees. What those are
// is the business of semantics.h and blocks.h alone; here the bias's tables are read and asked.
#pragma once

#include "attune/attune.h"
#include "attune/blocks.h"
#include "attune/semantics.h"

#include <string>
#include <vector>

namespace attune::reference {

class Mask {
 public:
  /// For tensors of these extents: batch entries, query rows and key rows.
  Mask(const AttentionBias& bias, int batch, int len_q, int len_k);

  /// The blocks in order: batch entries or sequences.
  const std::vector<kernel::Block>& blocks() const { return blocks_; }
  /// Does query i of the block see its key j? By the window; the bias tensor has no say here.
  bool visible(const kernel::Block& block, int i, int j) const;
  /// The row of key, value and bias column that key j of the block lies in.
  int key_row(const kernel::Block& block, int j) const;

  /// Which (query row, key row) pairs of the batch entry are visible; row-major, len_q * len_k.
  std::vector<bool> dense(int batch_entry) const;

 private:
  kernel::ForwardParams params_;  // extents and tables, as a kernel is told
  kernel::Edge left_, right_;
  bool varlen_ = false, paged_ = false;
  std::vector<std::int32_t> q_start_, k_start_, k_len_, pages_;
  std::vector<kernel::Block> blocks_;
};

/// One line per query row of batch entry 0, '#' for a visible key, '.' for a hidden one.
std::string picture(const Mask& mask);

/// "LocalAttentionFromBottomRightMask(anchor bottom_right, left 1, right 2)": name, window and blocks.
std::string to_string(const AttentionBias& bias);

}  // namespace attune::reference
