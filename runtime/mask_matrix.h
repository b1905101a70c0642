// A bias as the host can ask it: its blocks, the rows of their keys, and which key each query sees. What
// those are is the business of semantics.h and blocks.h alone; here the bias's tables are read and asked. For
// materialize, for pictures and for the tests' reference; no kernel runs.
#pragma once

#include "attune/attn_bias.h"
#include "attune/blocks.h"

#include <cstdint>
#include <vector>

namespace attune::runtime {

class MaskMatrix {
 public:
  /// For tensors of these extents. Tables that are on a device alone are copied back.
  MaskMatrix(const AttentionBias& bias, int batch, int len_q, int len_k);
  MaskMatrix(const MaskMatrix&) = delete;
  MaskMatrix& operator=(const MaskMatrix&) = delete;

  /// The blocks in order: batch entries or sequences.
  const std::vector<kernel::Block>& blocks() const { return blocks_; }
  /// Does query i of the block see its key j? By the window; the bias tensor has no say here.
  bool visible(const kernel::Block& block, int i, int j) const;
  /// The row of key, value and bias column that key j of the block lies in.
  int key_row(const kernel::Block& block, int j) const;

  int len_q() const { return params_.len_q; }
  int len_k() const { return params_.len_k; }
  /// Which (query row, key row) pairs of the batch entry are visible; row-major, len_q * len_k.
  std::vector<bool> dense(int batch_entry) const;

 private:
  kernel::Block block(int index) const;

  kernel::ForwardParams params_;  // extents and tables, as a kernel is told
  kernel::Edge left_, right_;
  bool varlen_, paged_;
  std::vector<std::int32_t> q_start_, k_start_, k_len_, pages_;
  std::vector<kernel::Block> blocks_;
};

}  // namespace attune::runtime
