// The bias classes: each checks its arguments and reduces to a window, tables and, perhaps, a tensor.
#include "attune/attn_bias.h"

#include "runtime/raise.h"
#include "runtime/sequence_tables.h"

#include <string_view>

namespace attune {
namespace {

using runtime::contiguous;
using runtime::gappy;
using runtime::padded;
using runtime::paged;
using runtime::refuse;
using Anchor = Window::Anchor;

constexpr Window kEverything{};
constexpr Window kCausal{.anchor = Anchor::top_left, .right = 0};
constexpr Window kCausalFromBottomRight{.anchor = Anchor::bottom_right, .right = 0};

/// window_size keys, of which the last is the query's own position.
Window last_keys(std::string_view name, Anchor anchor, std::int64_t window_size) {
  if (window_size <= 0) {
    refuse(
        "Expected `window_size > 0`, but window_size={} in {}; it counts the query's own position, so 1 is "
        "the narrowest",
        window_size, name);
  }
  return {anchor, window_size - 1, 0};
}

Window both_sides(std::string_view name, std::int64_t window_left, std::int64_t window_right) {
  if (window_left < 0 || window_right < 0) {
    refuse("{}: expected `window_left >= 0` and `window_right >= 0`, but window_left={} and window_right={}",
           name, window_left, window_right);
  }
  return {Anchor::bottom_right, window_left, window_right};
}

AttentionBias window_bias(std::string name, Window window) {
  AttentionBias bias;
  bias.name = std::move(name);
  bias.window = window;
  return bias;
}

/// The same blocks under another window.
AttentionBias with_window(AttentionBias bias, const char* name, Window window) {
  bias.name = name;
  bias.window = window;
  return bias;
}

AttentionBias sequence_bias(std::string name, Window window, Sequences sequences) {
  AttentionBias bias = window_bias(std::move(name), window);
  bias.sequences = std::make_shared<const Sequences>(std::move(sequences));
  return bias;
}

/// Calls check(block, queries, keys) for every block of a BlockDiagonalMask that the host knows.
template <typename Check>
void for_each_block(const Sequences& s, Check&& check) {
  if (!s.q_starts.on_host() || !s.k_starts.on_host()) return;
  for (std::int64_t b = 0; b < s.count; ++b) {
    check(b, s.q_starts.host()[b + 1] - s.q_starts.host()[b],
          s.k_starts.host()[b + 1] - s.k_starts.host()[b]);
  }
}

void check_keys_suffice(std::string_view name, const Sequences& sequences) {
  for_each_block(sequences, [&](std::int64_t b, std::int32_t queries, std::int32_t keys) {
    if (keys >= queries) return;
    refuse(
        "Block #{} has num_keys={} and num_queries={}. Expected `num_keys >= num_queries`: {} lets the last "
        "query "
        "see the last key, so the first {} queries would see none",
        b, keys, queries, name, queries - keys);
  });
}

}  // namespace

AttentionBias AttentionBias::add_bias(const TensorView& bias) const {
  if (tensor) refuse("{}: add_bias was given a second tensor; add the two and give their sum", name);
  AttentionBias with_tensor = *this;
  with_tensor.name = name == "None" ? "Tensor" : name + "WithTensorBias";
  with_tensor.tensor = bias;
  return with_tensor;
}

// ---- Masks of whole attention ----

LowerTriangularMaskWithTensorBias LowerTriangularMask::add_bias(const TensorView& bias) const {
  return {bias};
}

LowerTriangularMask::operator AttentionBias() const {
  return window_bias("LowerTriangularMask", kCausal);
}

LowerTriangularMaskWithTensorBias::operator AttentionBias() const {
  return AttentionBias(LowerTriangularMask{}).add_bias(bias);
}

LowerTriangularFromBottomRightLocalAttentionMask LowerTriangularFromBottomRightMask::make_local_attention(
    std::int64_t window_size) const {
  return {window_size};
}

LowerTriangularFromBottomRightMask::operator AttentionBias() const {
  return window_bias("LowerTriangularFromBottomRightMask", kCausalFromBottomRight);
}

LowerTriangularFromBottomRightLocalAttentionMask::operator AttentionBias() const {
  constexpr const char* kName = "LowerTriangularFromBottomRightLocalAttentionMask";
  return window_bias(kName, last_keys(kName, Anchor::bottom_right, window_size));
}

LocalAttentionFromBottomRightMask::operator AttentionBias() const {
  constexpr const char* kName = "LocalAttentionFromBottomRightMask";
  return window_bias(kName, both_sides(kName, window_left, window_right));
}

// ---- Packed sequences ----

BlockDiagonalMask BlockDiagonalMask::from_seqlens(const SeqLens& q_seqlen, const SeqLens& kv_seqlen) {
  constexpr const char* kName = "BlockDiagonalMask";
  return {sequence_bias(kName, kEverything,
                        contiguous(kName, q_seqlen, kv_seqlen.empty() ? q_seqlen : kv_seqlen)),
          {}};
}

BlockDiagonalMask BlockDiagonalMask::from_seqstarts(Int32Table q_starts, Int32Table k_starts) {
  constexpr const char* kName = "BlockDiagonalMask";
  return {sequence_bias(kName, kEverything, contiguous(kName, std::move(q_starts), std::move(k_starts))), {}};
}

BlockDiagonalCausalMask BlockDiagonalMask::make_causal() const {
  return {with_window(bias_, "BlockDiagonalCausalMask", kCausal), batch_sizes_};
}

BlockDiagonalCausalMask BlockDiagonalCausalMask::from_seqlens(const SeqLens& q_seqlen,
                                                              const SeqLens& kv_seqlen) {
  return BlockDiagonalMask::from_seqlens(q_seqlen, kv_seqlen).make_causal();
}

BlockDiagonalCausalMask BlockDiagonalCausalMask::from_seqstarts(Int32Table q_starts, Int32Table k_starts) {
  return BlockDiagonalMask::from_seqstarts(std::move(q_starts), std::move(k_starts)).make_causal();
}

BlockDiagonalCausalFromBottomRightMask BlockDiagonalMask::make_causal_from_bottomright() const {
  constexpr const char* kName = "BlockDiagonalCausalFromBottomRightMask";
  check_keys_suffice(kName, sequences());
  return {with_window(bias_, kName, kCausalFromBottomRight), batch_sizes_};
}

BlockDiagonalCausalFromBottomRightMask BlockDiagonalCausalFromBottomRightMask::from_seqlens(
    const SeqLens& q_seqlen, const SeqLens& kv_seqlen) {
  return BlockDiagonalMask::from_seqlens(q_seqlen, kv_seqlen).make_causal_from_bottomright();
}

BlockDiagonalCausalFromBottomRightMask BlockDiagonalCausalFromBottomRightMask::from_seqstarts(
    Int32Table q_starts, Int32Table k_starts) {
  return BlockDiagonalMask::from_seqstarts(std::move(q_starts), std::move(k_starts))
      .make_causal_from_bottomright();
}

BlockDiagonalCausalLocalAttentionMask BlockDiagonalMask::make_local_attention(
    std::int64_t window_size) const {
  constexpr const char* kName = "BlockDiagonalCausalLocalAttentionMask";
  const Window window = last_keys(kName, Anchor::top_left, window_size);
  for_each_block(sequences(), [&](std::int64_t b, std::int32_t queries, std::int32_t keys) {
    if (queries - window_size < keys) return;
    refuse(
        "No keys are attended in q_seqlen {} k_seqlen {} with sliding window {}: the window of block #{}'s "
        "last "
        "query begins behind its keys; give it more keys, or anchor the window at the last key with "
        "make_local_attention_from_bottomright",
        queries, keys, window_size, b);
  });
  return {with_window(bias_, kName, window), batch_sizes_};
}

BlockDiagonalCausalLocalAttentionFromBottomRightMask BlockDiagonalMask::make_local_attention_from_bottomright(
    std::int64_t window_size) const {
  constexpr const char* kName = "BlockDiagonalCausalLocalAttentionFromBottomRightMask";
  const Window window = last_keys(kName, Anchor::bottom_right, window_size);
  check_keys_suffice(kName, sequences());
  return {with_window(bias_, kName, window), batch_sizes_};
}

// ---- Padded keys ----

BlockDiagonalPaddedKeysMask BlockDiagonalPaddedKeysMask::from_seqlens(const SeqLens& q_seqlen,
                                                                      std::int64_t kv_padding,
                                                                      const SeqLens& kv_seqlen) {
  constexpr const char* kName = "BlockDiagonalPaddedKeysMask";
  return BlockDiagonalPaddedKeysMask(
      sequence_bias(kName, kEverything, padded(kName, q_seqlen, kv_padding, kv_seqlen)));
}

BlockDiagonalPaddedKeysMask BlockDiagonalPaddedKeysMask::from_seqstarts(Int32Table q_starts,
                                                                        std::int64_t kv_padding,
                                                                        Int32Table kv_seqlen) {
  constexpr const char* kName = "BlockDiagonalPaddedKeysMask";
  return BlockDiagonalPaddedKeysMask(sequence_bias(
      kName, kEverything, padded(kName, std::move(q_starts), kv_padding, std::move(kv_seqlen))));
}

PagedBlockDiagonalPaddedKeysMask BlockDiagonalPaddedKeysMask::make_paged(const BlockTables& tables) const {
  const std::string name = "Paged" + bias_.name;
  const Sequences& s = sequences();
  return PagedBlockDiagonalPaddedKeysMask(
      sequence_bias(name, bias_.window, paged(name, s.q_starts, *s.k_lens, tables)));
}

BlockDiagonalCausalWithOffsetPaddedKeysMask BlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqlens(
    const SeqLens& q_seqlen, std::int64_t kv_padding, const SeqLens& kv_seqlen) {
  constexpr const char* kName = "BlockDiagonalCausalWithOffsetPaddedKeysMask";
  return BlockDiagonalCausalWithOffsetPaddedKeysMask(
      sequence_bias(kName, kCausalFromBottomRight, padded(kName, q_seqlen, kv_padding, kv_seqlen)));
}

BlockDiagonalCausalWithOffsetPaddedKeysMask BlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqstarts(
    Int32Table q_starts, std::int64_t kv_padding, Int32Table kv_seqlen) {
  constexpr const char* kName = "BlockDiagonalCausalWithOffsetPaddedKeysMask";
  return BlockDiagonalCausalWithOffsetPaddedKeysMask(sequence_bias(
      kName, kCausalFromBottomRight, padded(kName, std::move(q_starts), kv_padding, std::move(kv_seqlen))));
}

BlockDiagonalLocalAttentionPaddedKeysMask BlockDiagonalLocalAttentionPaddedKeysMask::from_seqlens_local(
    const SeqLens& q_seqlen, std::int64_t kv_padding, const SeqLens& kv_seqlen, std::int64_t window_left,
    std::int64_t window_right) {
  constexpr const char* kName = "BlockDiagonalLocalAttentionPaddedKeysMask";
  return BlockDiagonalLocalAttentionPaddedKeysMask(sequence_bias(
      kName, both_sides(kName, window_left, window_right), padded(kName, q_seqlen, kv_padding, kv_seqlen)));
}

BlockDiagonalLocalAttentionPaddedKeysMask BlockDiagonalLocalAttentionPaddedKeysMask::from_seqstarts_local(
    Int32Table q_starts, std::int64_t kv_padding, Int32Table kv_seqlen, std::int64_t window_left,
    std::int64_t window_right) {
  constexpr const char* kName = "BlockDiagonalLocalAttentionPaddedKeysMask";
  return BlockDiagonalLocalAttentionPaddedKeysMask(
      sequence_bias(kName, both_sides(kName, window_left, window_right),
                    padded(kName, std::move(q_starts), kv_padding, std::move(kv_seqlen))));
}

BlockDiagonalCausalLocalAttentionPaddedKeysMask
BlockDiagonalCausalLocalAttentionPaddedKeysMask::from_seqlens_local(const SeqLens& q_seqlen,
                                                                    std::int64_t kv_padding,
                                                                    const SeqLens& kv_seqlen,
                                                                    std::int64_t window_size) {
  constexpr const char* kName = "BlockDiagonalCausalLocalAttentionPaddedKeysMask";
  return BlockDiagonalCausalLocalAttentionPaddedKeysMask(
      sequence_bias(kName, last_keys(kName, Anchor::bottom_right, window_size),
                    padded(kName, q_seqlen, kv_padding, kv_seqlen)));
}

BlockDiagonalCausalLocalAttentionPaddedKeysMask
BlockDiagonalCausalLocalAttentionPaddedKeysMask::from_seqstarts_local(Int32Table q_starts,
                                                                      std::int64_t kv_padding,
                                                                      Int32Table kv_seqlen,
                                                                      std::int64_t window_size) {
  constexpr const char* kName = "BlockDiagonalCausalLocalAttentionPaddedKeysMask";
  return BlockDiagonalCausalLocalAttentionPaddedKeysMask(
      sequence_bias(kName, last_keys(kName, Anchor::bottom_right, window_size),
                    padded(kName, std::move(q_starts), kv_padding, std::move(kv_seqlen))));
}

// ---- Keys with gaps ----

BlockDiagonalGappyKeysMask BlockDiagonalGappyKeysMask::from_seqlens(const SeqLens& q_seqlen,
                                                                    const SeqLens& kv_seqstarts,
                                                                    const SeqLens& kv_seqlen) {
  constexpr const char* kName = "BlockDiagonalGappyKeysMask";
  return BlockDiagonalGappyKeysMask(
      sequence_bias(kName, kEverything, gappy(kName, q_seqlen, kv_seqstarts, kv_seqlen)));
}

BlockDiagonalGappyKeysMask BlockDiagonalGappyKeysMask::from_seqstarts(Int32Table q_starts,
                                                                      Int32Table kv_seqstarts,
                                                                      Int32Table kv_seqlen) {
  constexpr const char* kName = "BlockDiagonalGappyKeysMask";
  return BlockDiagonalGappyKeysMask(sequence_bias(
      kName, kEverything, gappy(kName, std::move(q_starts), std::move(kv_seqstarts), std::move(kv_seqlen))));
}

PagedBlockDiagonalGappyKeysMask BlockDiagonalGappyKeysMask::make_paged(const BlockTables& tables,
                                                                       std::int64_t notional_padding) const {
  const std::string name = "Paged" + bias_.name;
  return PagedBlockDiagonalGappyKeysMask(
      sequence_bias(name, bias_.window, runtime::paged_cells(name, sequences(), tables, notional_padding)));
}

BlockDiagonalCausalWithOffsetGappyKeysMask BlockDiagonalCausalWithOffsetGappyKeysMask::from_seqlens(
    const SeqLens& q_seqlen, const SeqLens& kv_seqstarts, const SeqLens& kv_seqlen) {
  constexpr const char* kName = "BlockDiagonalCausalWithOffsetGappyKeysMask";
  return BlockDiagonalCausalWithOffsetGappyKeysMask(
      sequence_bias(kName, kCausalFromBottomRight, gappy(kName, q_seqlen, kv_seqstarts, kv_seqlen)));
}

BlockDiagonalCausalWithOffsetGappyKeysMask BlockDiagonalCausalWithOffsetGappyKeysMask::from_seqstarts(
    Int32Table q_starts, Int32Table kv_seqstarts, Int32Table kv_seqlen) {
  constexpr const char* kName = "BlockDiagonalCausalWithOffsetGappyKeysMask";
  return BlockDiagonalCausalWithOffsetGappyKeysMask(
      sequence_bias(kName, kCausalFromBottomRight,
                    gappy(kName, std::move(q_starts), std::move(kv_seqstarts), std::move(kv_seqlen))));
}

// ---- Paged keys ----

PagedBlockDiagonalPaddedKeysMask PagedBlockDiagonalPaddedKeysMask::from_seqlens(const SeqLens& q_seqlen,
                                                                                const SeqLens& kv_seqlen,
                                                                                const BlockTables& tables) {
  constexpr const char* kName = "PagedBlockDiagonalPaddedKeysMask";
  return PagedBlockDiagonalPaddedKeysMask(
      sequence_bias(kName, kEverything, paged(kName, q_seqlen, kv_seqlen, tables)));
}

PagedBlockDiagonalPaddedKeysMask PagedBlockDiagonalPaddedKeysMask::from_seqstarts(Int32Table q_starts,
                                                                                  Int32Table kv_seqlen,
                                                                                  const BlockTables& tables) {
  constexpr const char* kName = "PagedBlockDiagonalPaddedKeysMask";
  return PagedBlockDiagonalPaddedKeysMask(
      sequence_bias(kName, kEverything, paged(kName, std::move(q_starts), std::move(kv_seqlen), tables)));
}

PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
PagedBlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqlens(const SeqLens& q_seqlen,
                                                               const SeqLens& kv_seqlen,
                                                               const BlockTables& tables) {
  constexpr const char* kName = "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask";
  return PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(
      sequence_bias(kName, kCausalFromBottomRight, paged(kName, q_seqlen, kv_seqlen, tables)));
}

PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
PagedBlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqstarts(Int32Table q_starts, Int32Table kv_seqlen,
                                                                 const BlockTables& tables) {
  constexpr const char* kName = "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask";
  return PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(sequence_bias(
      kName, kCausalFromBottomRight, paged(kName, std::move(q_starts), std::move(kv_seqlen), tables)));
}

PagedBlockDiagonalGappyKeysMask PagedBlockDiagonalGappyKeysMask::from_seqlens(const SeqLens& q_seqlen,
                                                                              const SeqLens& kv_seqstarts,
                                                                              const SeqLens& kv_seqlen,
                                                                              const BlockTables& tables) {
  constexpr const char* kName = "PagedBlockDiagonalGappyKeysMask";
  return PagedBlockDiagonalGappyKeysMask(
      sequence_bias(kName, kEverything, paged(kName, q_seqlen, kv_seqstarts, kv_seqlen, tables)));
}

PagedBlockDiagonalGappyKeysMask PagedBlockDiagonalGappyKeysMask::from_seqstarts(Int32Table q_starts,
                                                                                Int32Table kv_seqstarts,
                                                                                Int32Table kv_seqlen,
                                                                                const BlockTables& tables) {
  constexpr const char* kName = "PagedBlockDiagonalGappyKeysMask";
  return PagedBlockDiagonalGappyKeysMask(sequence_bias(
      kName, kEverything,
      paged(kName, std::move(q_starts), std::move(kv_seqstarts), std::move(kv_seqlen), tables)));
}

PagedBlockDiagonalCausalWithOffsetGappyKeysMask PagedBlockDiagonalCausalWithOffsetGappyKeysMask::from_seqlens(
    const SeqLens& q_seqlen, const SeqLens& kv_seqstarts, const SeqLens& kv_seqlen,
    const BlockTables& tables) {
  constexpr const char* kName = "PagedBlockDiagonalCausalWithOffsetGappyKeysMask";
  return PagedBlockDiagonalCausalWithOffsetGappyKeysMask(
      sequence_bias(kName, kCausalFromBottomRight, paged(kName, q_seqlen, kv_seqstarts, kv_seqlen, tables)));
}

PagedBlockDiagonalCausalWithOffsetGappyKeysMask
PagedBlockDiagonalCausalWithOffsetGappyKeysMask::from_seqstarts(Int32Table q_starts, Int32Table kv_seqstarts,
                                                                Int32Table kv_seqlen,
                                                                const BlockTables& tables) {
  constexpr const char* kName = "PagedBlockDiagonalCausalWithOffsetGappyKeysMask";
  return PagedBlockDiagonalCausalWithOffsetGappyKeysMask(sequence_bias(
      kName, kCausalFromBottomRight,
      paged(kName, std::move(q_starts), std::move(kv_seqstarts), std::move(kv_seqlen), tables)));
}

}  // namespace attune
