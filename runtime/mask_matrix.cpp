#include "runtime/mask_matrix.h"

namespace attune::runtime {
namespace {

using kernel::Edge;
using kernel::KernelSpec;

constexpr KernelSpec kDense{};
constexpr KernelSpec kVarlen{.blocks = kernel::Blocks::varlen};
constexpr KernelSpec kPaged{.blocks = kernel::Blocks::varlen, .keys = kernel::Keys::paged};

constexpr KernelSpec kOpen{};
constexpr KernelSpec kLeft{.window_left = Edge::bounded};
constexpr KernelSpec kRight{.window_right = Edge::bounded};
constexpr KernelSpec kBoth{.window_left = Edge::bounded, .window_right = Edge::bounded};

kernel::Reach reach_of(const Window& window) {
  const auto anchor =
      window.anchor == Window::Anchor::top_left ? kernel::Anchor::top_left : kernel::Anchor::bottom_right;
  return kernel::make_reach(anchor, window.left, window.right);
}

Edge edge_of(std::int64_t reach) {
  return reach < 0 ? Edge::open : Edge::bounded;
}

}  // namespace

MaskMatrix::MaskMatrix(const AttentionBias& bias, int batch, int len_q, int len_k)
    : left_(edge_of(bias.window.left)),
      right_(edge_of(bias.window.right)),
      varlen_(bias.sequences != nullptr),
      paged_(varlen_ && bias.sequences->block_tables.has_value()) {
  params_.batch = batch;
  params_.len_q = len_q;
  params_.len_k = len_k;
  params_.reach = reach_of(bias.window);
  params_.window = kernel::window_of(params_.reach, len_q, len_k);
  if (varlen_) {
    const Sequences& s = *bias.sequences;
    q_start_ = s.q_starts.read();
    k_start_ = s.k_starts.read();
    params_.sequences.count = static_cast<int>(s.count);
    params_.sequences.q_start = q_start_.data();
    params_.sequences.k_start = k_start_.data();
    if (s.k_lens) {
      k_len_ = s.k_lens->read();
      params_.sequences.k_len = k_len_.data();
    }
    if (paged_) {
      pages_ = s.block_tables->read();
      params_.sequences.pages = pages_.data();
      params_.sequences.table_width = static_cast<int>(s.table_width);
      params_.sequences.page_size = kernel::make_divider(static_cast<int>(s.page_size));
    }
  }
  const int count = varlen_ ? params_.sequences.count : batch;
  for (int index = 0; index < count; ++index) blocks_.push_back(block(index));
}

kernel::Block MaskMatrix::block(int index) const {
  if (paged_) return kernel::block_of<kPaged>(params_, index);
  if (varlen_) return kernel::block_of<kVarlen>(params_, index);
  return kernel::block_of<kDense>(params_, index);
}

bool MaskMatrix::visible(const kernel::Block& block, int i, int j) const {
  const kernel::Window window = varlen_ ? kernel::window_of_block<kVarlen>(params_, block) : params_.window;
  const bool left = left_ == Edge::bounded;
  const bool right = right_ == Edge::bounded;
  if (left && right) return kernel::visible<kBoth>(window, block.len_k, i, j);
  if (left) return kernel::visible<kLeft>(window, block.len_k, i, j);
  if (right) return kernel::visible<kRight>(window, block.len_k, i, j);
  return kernel::visible<kOpen>(window, block.len_k, i, j);
}

int MaskMatrix::key_row(const kernel::Block& block, int j) const {
  return paged_ ? kernel::key_row<kPaged>(params_, block, j) : kernel::key_row<kVarlen>(params_, block, j);
}

std::vector<bool> MaskMatrix::dense(int batch_entry) const {
  std::vector<bool> seen(static_cast<std::size_t>(params_.len_q) * static_cast<std::size_t>(params_.len_k));
  for (const kernel::Block& block : blocks_) {
    if (block.batch != batch_entry) continue;
    for (int i = 0; i < block.len_q; ++i) {
      const std::size_t row =
          static_cast<std::size_t>(block.q_begin + i) * static_cast<std::size_t>(params_.len_k);
      for (int j = 0; j < block.len_k; ++j) {
        if (visible(block, i, j)) seen[row + static_cast<std::size_t>(key_row(block, j))] = true;
      }
    }
  }
  return seen;
}

}  // namespace attune::runtime
