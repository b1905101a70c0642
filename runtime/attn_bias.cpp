// The bias classes: each checks its arguments and reduces to a window, tables and, perhaps, a tensor.
#include "attune/attn_bias.h"

#include "attune/semantics.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>

namespace attune {
namespace {

using Anchor = Window::Anchor;

constexpr Window kEverything{};
constexpr Window kCausal{.anchor = Anchor::top_left, .right = 0};
constexpr Window kCausalFromBottomRight{.anchor = Anchor::bottom_right, .right = 0};

template <typename... Args>
[[noreturn]] void refuse(fmt::format_string<Args...> text, Args&&... args) {
  throw Error(ErrorKind::invalid_argument, fmt::format(text, std::forward<Args>(args)...));
}

/// window_size keys, of which the last is the query's own position.
Window last_keys(std::string_view name, Anchor anchor, std::int64_t window_size) {
  if (window_size <= 0) {
    refuse(
        "Expected `window_size > 0`, but window_size={} in {}; it counts the query's own position, so 1 is "
        "the "
        "narrowest",
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

// ---- Tables from lists of the host ----

std::int32_t checked_number(std::string_view name, std::string_view what, std::size_t index,
                            std::int64_t number) {
  if (number < 0) refuse("{}: {}[{}] is {}; expected 0 or more", name, what, index, number);
  if (number > kernel::kMaxLength) refuse("{}: {}[{}] is {}; the limit is 2^29", name, what, index, number);
  return static_cast<std::int32_t>(number);
}

std::vector<std::int32_t> numbers_of(std::string_view name, std::string_view what, const SeqLens& list) {
  std::vector<std::int32_t> numbers;
  numbers.reserve(list.size());
  for (std::size_t i = 0; i < list.size(); ++i) numbers.push_back(checked_number(name, what, i, list[i]));
  return numbers;
}

/// [0, n0, n0 + n1, ...]
std::vector<std::int32_t> starts_of(std::string_view name, std::string_view what, const SeqLens& lens) {
  std::vector<std::int32_t> starts{0};
  starts.reserve(lens.size() + 1);
  for (std::size_t i = 0; i < lens.size(); ++i) {
    const std::int64_t end = std::int64_t{starts.back()} + checked_number(name, what, i, lens[i]);
    if (end > kernel::kMaxLength)
      refuse("{}: the lengths in {} add up to more than the limit, 2^29", name, what);
    starts.push_back(static_cast<std::int32_t>(end));
  }
  return starts;
}

void check_count(std::string_view name, std::string_view what, std::size_t count, std::size_t queries) {
  if (count == queries) return;
  refuse("{}: {} has {} entries, but q_seqlen has {}: queries and keys have equally many blocks", name, what,
         count, queries);
}

// ---- Checks of tables. What a device alone knows passes. ----

void check_starts(std::string_view name, std::string_view what, const Int32Table& starts) {
  if (starts.size() < 1) refuse("{}: {} is empty; expected count + 1 cumulative starts", name, what);
  if (!starts.on_host()) return;
  const std::vector<std::int32_t>& list = starts.host();
  if (list.front() != 0 || !std::is_sorted(list.begin(), list.end())) {
    refuse("{}: {} must begin with 0 and never fall", name, what);
  }
  if (list.back() > kernel::kMaxLength)
    refuse("{}: {} ends at {}; the limit is 2^29", name, what, list.back());
}

/// Are the keys of every block within its `limit` rows or logical keys? `room` says what those are.
void check_keys(std::string_view name, const Int32Table& starts, const Int32Table& lens, std::int64_t limit,
                std::string_view room) {
  if (!starts.on_host() || !lens.on_host()) return;
  for (std::size_t b = 0; b < lens.host().size(); ++b) {
    const std::int64_t begin = starts.host()[b];
    const std::int64_t end = begin + lens.host()[b];
    if (begin < 0 || end < begin)
      refuse("{}: block #{} has {} keys from {} on; expected 0 or more", name, b, end - begin, begin);
    if (end > limit)
      refuse("{}: block #{} has the keys [{}, {}), but {} holds {}", name, b, begin, end, room, limit);
  }
}

/// The number of blocks that these tables have, which must agree.
std::int64_t count_of(std::string_view name, const Int32Table& q_starts, const Int32Table& k_lens) {
  check_starts(name, "q_starts", q_starts);
  if (q_starts.size() != k_lens.size() + 1) {
    refuse("{}: q_starts has {} entries and kv_seqlen {}; expected one start more than lengths", name,
           q_starts.size(), k_lens.size());
  }
  return k_lens.size();
}

void check_tables(std::string_view name, const BlockTables& tables, std::int64_t count) {
  if (tables.page_size < 1) refuse("{}: page_size is {}; expected 1 or more", name, tables.page_size);
  if (tables.width < 0 || tables.table.size() != count * tables.width) {
    refuse("{}: block_tables has {} entries, expected {} rows (one per sequence) of {} pages", name,
           tables.table.size(), count, tables.width);
  }
  if (tables.width > kernel::kMaxLength / tables.page_size) {
    refuse("{}: {} pages of {} keys are more than the limit, 2^29 keys of a sequence", name, tables.width,
           tables.page_size);
  }
}

// ---- The sequences of each kind of key addressing ----

Sequences padded(std::string_view name, Int32Table q_starts, std::int64_t padding, Int32Table k_lens) {
  const std::int64_t count = count_of(name, q_starts, k_lens);
  if (padding < 0) refuse("{}: kv_padding is {}; expected 0 or more", name, padding);
  if (padding > 0 && count > kernel::kMaxLength / padding) {
    refuse("{}: {} blocks of kv_padding {} are more than the limit, 2^29 key rows", name, count, padding);
  }
  check_keys(name, std::vector<std::int32_t>(static_cast<std::size_t>(count)), k_lens, padding, "kv_padding");
  std::vector<std::int32_t> k_starts;
  for (std::int64_t b = 0; b <= count; ++b) k_starts.push_back(static_cast<std::int32_t>(b * padding));
  return {.count = count,
          .q_starts = std::move(q_starts),
          .k_starts = std::move(k_starts),
          .k_lens = std::move(k_lens),
          .key_rows = count * padding};
}

Sequences gappy(std::string_view name, Int32Table q_starts, Int32Table k_starts, Int32Table k_lens) {
  const std::int64_t count = count_of(name, q_starts, k_lens);
  if (count == 0) refuse("No elements: {} needs one block at least", name);
  if (k_starts.size() != count + 1) {
    refuse(
        "{}: kv_seqstarts has {} entries and kv_seqlen {}; expected one start more than lengths, the last "
        "being "
        "the number of key rows",
        name, k_starts.size(), count);
  }
  const std::int64_t key_rows = k_starts.on_host() ? k_starts.host().back() : -1;
  check_keys(name, k_starts, k_lens, key_rows, "the key tensor (the last of kv_seqstarts)");
  return {.count = count,
          .q_starts = std::move(q_starts),
          .k_starts = std::move(k_starts),
          .k_lens = std::move(k_lens),
          .key_rows = key_rows};
}

Sequences paged(std::string_view name, Int32Table q_starts, Int32Table k_starts, Int32Table k_lens,
                const BlockTables& tables) {
  const std::int64_t count = count_of(name, q_starts, k_lens);
  if (k_starts.size() != count) {
    refuse("{}: kv_seqstarts has {} entries and kv_seqlen {}; expected equally many", name, k_starts.size(),
           count);
  }
  check_tables(name, tables, count);
  check_keys(name, k_starts, k_lens, tables.width * tables.page_size,
             fmt::format("its row of block_tables ({} pages of {})", tables.width, tables.page_size));
  return {.count = count,
          .q_starts = std::move(q_starts),
          .k_starts = std::move(k_starts),
          .k_lens = std::move(k_lens),
          .block_tables = tables.table,
          .table_width = tables.width,
          .page_size = tables.page_size};
}

/// Logical keys from 0 on.
Sequences paged_padded(std::string_view name, Int32Table q_starts, Int32Table k_lens,
                       const BlockTables& tables) {
  std::vector<std::int32_t> zeros(static_cast<std::size_t>(k_lens.size()));
  return paged(name, std::move(q_starts), std::move(zeros), std::move(k_lens), tables);
}

AttentionBias padded_bias(const char* name, Window window, const SeqLens& q_seqlen, std::int64_t kv_padding,
                          const SeqLens& kv_seqlen) {
  check_count(name, "kv_seqlen", kv_seqlen.size(), q_seqlen.size());
  return sequence_bias(name, window,
                       padded(name, starts_of(name, "q_seqlen", q_seqlen), kv_padding,
                              numbers_of(name, "kv_seqlen", kv_seqlen)));
}

AttentionBias gappy_bias(const char* name, Window window, const SeqLens& q_seqlen,
                         const SeqLens& kv_seqstarts, const SeqLens& kv_seqlen) {
  check_count(name, "kv_seqlen", kv_seqlen.size(), q_seqlen.size());
  return sequence_bias(
      name, window,
      gappy(name, starts_of(name, "q_seqlen", q_seqlen), numbers_of(name, "kv_seqstarts", kv_seqstarts),
            numbers_of(name, "kv_seqlen", kv_seqlen)));
}

AttentionBias paged_padded_bias(const char* name, Window window, const SeqLens& q_seqlen,
                                const SeqLens& kv_seqlen, const BlockTables& tables) {
  check_count(name, "kv_seqlen", kv_seqlen.size(), q_seqlen.size());
  return sequence_bias(name, window,
                       paged_padded(name, starts_of(name, "q_seqlen", q_seqlen),
                                    numbers_of(name, "kv_seqlen", kv_seqlen), tables));
}

AttentionBias paged_gappy_bias(const char* name, Window window, const SeqLens& q_seqlen,
                               const SeqLens& kv_seqstarts, const SeqLens& kv_seqlen,
                               const BlockTables& tables) {
  check_count(name, "kv_seqlen", kv_seqlen.size(), q_seqlen.size());
  return sequence_bias(
      name, window,
      paged(name, starts_of(name, "q_seqlen", q_seqlen), numbers_of(name, "kv_seqstarts", kv_seqstarts),
            numbers_of(name, "kv_seqlen", kv_seqlen), tables));
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
  const Int32Table q_starts = starts_of(kName, "q_seqlen", q_seqlen);
  if (kv_seqlen.empty() || kv_seqlen == q_seqlen) return from_seqstarts(q_starts, q_starts);
  check_count(kName, "kv_seqlen", kv_seqlen.size(), q_seqlen.size());
  return from_seqstarts(q_starts, starts_of(kName, "kv_seqlen", kv_seqlen));
}

BlockDiagonalMask BlockDiagonalMask::from_seqstarts(Int32Table q_starts, Int32Table k_starts) {
  constexpr const char* kName = "BlockDiagonalMask";
  check_starts(kName, "q_starts", q_starts);
  check_starts(kName, "k_starts", k_starts);
  if (q_starts.size() != k_starts.size()) {
    refuse("{}: q_starts has {} entries, but k_starts has {}: queries and keys have equally many blocks",
           kName, q_starts.size(), k_starts.size());
  }
  const std::int64_t key_rows = k_starts.on_host() ? k_starts.host().back() : -1;
  const std::int64_t count = q_starts.size() - 1;
  return {sequence_bias(kName, kEverything,
                        {.count = count,
                         .q_starts = std::move(q_starts),
                         .k_starts = std::move(k_starts),
                         .key_rows = key_rows}),
          {}};
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
  return BlockDiagonalPaddedKeysMask(
      padded_bias("BlockDiagonalPaddedKeysMask", kEverything, q_seqlen, kv_padding, kv_seqlen));
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
      sequence_bias(name, bias_.window, paged_padded(name, s.q_starts, *s.k_lens, tables)));
}

BlockDiagonalCausalWithOffsetPaddedKeysMask BlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqlens(
    const SeqLens& q_seqlen, std::int64_t kv_padding, const SeqLens& kv_seqlen) {
  return BlockDiagonalCausalWithOffsetPaddedKeysMask(
      padded_bias("BlockDiagonalCausalWithOffsetPaddedKeysMask", kCausalFromBottomRight, q_seqlen, kv_padding,
                  kv_seqlen));
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
  return BlockDiagonalLocalAttentionPaddedKeysMask(
      padded_bias(kName, both_sides(kName, window_left, window_right), q_seqlen, kv_padding, kv_seqlen));
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
  return BlockDiagonalCausalLocalAttentionPaddedKeysMask(padded_bias(
      kName, last_keys(kName, Anchor::bottom_right, window_size), q_seqlen, kv_padding, kv_seqlen));
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
  return BlockDiagonalGappyKeysMask(
      gappy_bias("BlockDiagonalGappyKeysMask", kEverything, q_seqlen, kv_seqstarts, kv_seqlen));
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
  const Sequences& s = sequences();
  check_tables(name, tables, s.count);
  if (notional_padding < 0 || notional_padding % tables.page_size != 0) {
    refuse(
        "Notional padding should be divisible by the page size: {} got notional_padding={} and page_size={}",
        name, notional_padding, tables.page_size);
  }
  if (!s.k_starts.on_host()) {
    refuse(
        "{}: make_paged moves kv_seqstarts, which are on a device alone; subtract block * notional_padding "
        "there "
        "and use PagedBlockDiagonalGappyKeysMask::from_seqstarts",
        name);
  }
  std::vector<std::int32_t> k_starts;
  for (std::int64_t b = 0; b < s.count; ++b) {
    const std::int64_t start = s.k_starts.host()[b] - b * notional_padding;
    if (start < 0 || start >= tables.width * tables.page_size) {
      refuse(
          "{}: block #{} starts at {}, outside its cell of logical keys: with notional_padding {} it must "
          "start in "
          "[{}, {})",
          name, b, s.k_starts.host()[b], notional_padding, b * notional_padding,
          b * notional_padding + tables.width * tables.page_size);
    }
    k_starts.push_back(static_cast<std::int32_t>(start));
  }
  return PagedBlockDiagonalGappyKeysMask(
      sequence_bias(name, bias_.window, paged(name, s.q_starts, std::move(k_starts), *s.k_lens, tables)));
}

BlockDiagonalCausalWithOffsetGappyKeysMask BlockDiagonalCausalWithOffsetGappyKeysMask::from_seqlens(
    const SeqLens& q_seqlen, const SeqLens& kv_seqstarts, const SeqLens& kv_seqlen) {
  return BlockDiagonalCausalWithOffsetGappyKeysMask(gappy_bias("BlockDiagonalCausalWithOffsetGappyKeysMask",
                                                               kCausalFromBottomRight, q_seqlen, kv_seqstarts,
                                                               kv_seqlen));
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
  return PagedBlockDiagonalPaddedKeysMask(
      paged_padded_bias("PagedBlockDiagonalPaddedKeysMask", kEverything, q_seqlen, kv_seqlen, tables));
}

PagedBlockDiagonalPaddedKeysMask PagedBlockDiagonalPaddedKeysMask::from_seqstarts(Int32Table q_starts,
                                                                                  Int32Table kv_seqlen,
                                                                                  const BlockTables& tables) {
  constexpr const char* kName = "PagedBlockDiagonalPaddedKeysMask";
  return PagedBlockDiagonalPaddedKeysMask(sequence_bias(
      kName, kEverything, paged_padded(kName, std::move(q_starts), std::move(kv_seqlen), tables)));
}

PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
PagedBlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqlens(const SeqLens& q_seqlen,
                                                               const SeqLens& kv_seqlen,
                                                               const BlockTables& tables) {
  return PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(
      paged_padded_bias("PagedBlockDiagonalCausalWithOffsetPaddedKeysMask", kCausalFromBottomRight, q_seqlen,
                        kv_seqlen, tables));
}

PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
PagedBlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqstarts(Int32Table q_starts, Int32Table kv_seqlen,
                                                                 const BlockTables& tables) {
  constexpr const char* kName = "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask";
  return PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(sequence_bias(
      kName, kCausalFromBottomRight, paged_padded(kName, std::move(q_starts), std::move(kv_seqlen), tables)));
}

PagedBlockDiagonalGappyKeysMask PagedBlockDiagonalGappyKeysMask::from_seqlens(const SeqLens& q_seqlen,
                                                                              const SeqLens& kv_seqstarts,
                                                                              const SeqLens& kv_seqlen,
                                                                              const BlockTables& tables) {
  return PagedBlockDiagonalGappyKeysMask(paged_gappy_bias("PagedBlockDiagonalGappyKeysMask", kEverything,
                                                          q_seqlen, kv_seqstarts, kv_seqlen, tables));
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
  return PagedBlockDiagonalCausalWithOffsetGappyKeysMask(
      paged_gappy_bias("PagedBlockDiagonalCausalWithOffsetGappyKeysMask", kCausalFromBottomRight, q_seqlen,
                       kv_seqstarts, kv_seqlen, tables));
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
