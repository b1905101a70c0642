#include "runtime/sequence_tables.h"

#include "attune/semantics.h"
#include "runtime/raise.h"

#include <algorithm>
#include <vector>

namespace attune::runtime {
namespace {

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

void check_counts(std::string_view name, const SeqLens& q_seqlen, const SeqLens& kv_seqlen) {
  if (q_seqlen.size() == kv_seqlen.size()) return;
  refuse("{}: q_seqlen has {} entries and kv_seqlen {}; queries and keys have equally many blocks", name,
         q_seqlen.size(), kv_seqlen.size());
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

}  // namespace

Sequences contiguous(std::string_view name, const SeqLens& q_seqlen, const SeqLens& kv_seqlen) {
  check_counts(name, q_seqlen, kv_seqlen);
  const Int32Table q_starts = starts_of(name, "q_seqlen", q_seqlen);
  if (q_seqlen == kv_seqlen) return contiguous(name, q_starts, q_starts);  // one copy on each device
  return contiguous(name, q_starts, starts_of(name, "kv_seqlen", kv_seqlen));
}

Sequences contiguous(std::string_view name, Int32Table q_starts, Int32Table k_starts) {
  check_starts(name, "q_starts", q_starts);
  check_starts(name, "k_starts", k_starts);
  if (q_starts.size() != k_starts.size()) {
    refuse("{}: q_starts has {} entries and k_starts {}; queries and keys have equally many blocks", name,
           q_starts.size(), k_starts.size());
  }
  const std::int64_t count = q_starts.size() - 1;
  const std::int64_t key_rows = k_starts.on_host() ? k_starts.host().back() : -1;
  return {
      .count = count, .q_starts = std::move(q_starts), .k_starts = std::move(k_starts), .key_rows = key_rows};
}

Sequences padded(std::string_view name, const SeqLens& q_seqlen, std::int64_t padding,
                 const SeqLens& kv_seqlen) {
  check_counts(name, q_seqlen, kv_seqlen);
  return padded(name, starts_of(name, "q_seqlen", q_seqlen), padding,
                numbers_of(name, "kv_seqlen", kv_seqlen));
}

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

Sequences gappy(std::string_view name, const SeqLens& q_seqlen, const SeqLens& kv_seqstarts,
                const SeqLens& kv_seqlen) {
  check_counts(name, q_seqlen, kv_seqlen);
  return gappy(name, starts_of(name, "q_seqlen", q_seqlen), numbers_of(name, "kv_seqstarts", kv_seqstarts),
               numbers_of(name, "kv_seqlen", kv_seqlen));
}

Sequences gappy(std::string_view name, Int32Table q_starts, Int32Table k_starts, Int32Table k_lens) {
  const std::int64_t count = count_of(name, q_starts, k_lens);
  if (count == 0) refuse("No elements: {} needs one block at least", name);
  if (k_starts.size() != count + 1) {
    refuse(
        "{}: kv_seqstarts has {} entries and kv_seqlen {}; expected one start more than lengths, the last "
        "being the number of key rows",
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

Sequences paged(std::string_view name, const SeqLens& q_seqlen, const SeqLens& kv_seqstarts,
                const SeqLens& kv_seqlen, const BlockTables& tables) {
  check_counts(name, q_seqlen, kv_seqlen);
  return paged(name, starts_of(name, "q_seqlen", q_seqlen), numbers_of(name, "kv_seqstarts", kv_seqstarts),
               numbers_of(name, "kv_seqlen", kv_seqlen), tables);
}

Sequences paged(std::string_view name, Int32Table q_starts, Int32Table k_starts, Int32Table k_lens,
                const BlockTables& tables) {
  const std::int64_t count = count_of(name, q_starts, k_lens);
  check_tables(name, tables, count);
  if (k_starts.size() != count) {
    refuse("{}: kv_seqstarts has {} entries and kv_seqlen {}; expected equally many", name, k_starts.size(),
           count);
  }
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

Sequences paged(std::string_view name, const SeqLens& q_seqlen, const SeqLens& kv_seqlen,
                const BlockTables& tables) {
  return paged(name, q_seqlen, SeqLens(kv_seqlen.size()), kv_seqlen, tables);
}

Sequences paged(std::string_view name, Int32Table q_starts, Int32Table kv_seqlen, const BlockTables& tables) {
  std::vector<std::int32_t> zeros(static_cast<std::size_t>(kv_seqlen.size()));
  return paged(name, std::move(q_starts), std::move(zeros), std::move(kv_seqlen), tables);
}

Sequences paged_cells(std::string_view name, const Sequences& gappy, const BlockTables& tables,
                      std::int64_t notional_padding) {
  check_tables(name, tables, gappy.count);
  if (notional_padding < 0 || notional_padding % tables.page_size != 0) {
    refuse(
        "Notional padding should be divisible by the page size: {} got notional_padding={} and page_size={}",
        name, notional_padding, tables.page_size);
  }
  if (!gappy.k_starts.on_host()) {
    refuse(
        "{}: make_paged moves kv_seqstarts, which are on a device alone; subtract block * notional_padding "
        "there "
        "and use PagedBlockDiagonalGappyKeysMask::from_seqstarts",
        name);
  }
  const std::int64_t keys = tables.width * tables.page_size;
  std::vector<std::int32_t> k_starts;
  for (std::int64_t b = 0; b < gappy.count; ++b) {
    const std::int64_t cell = b * notional_padding;
    const std::int64_t start = gappy.k_starts.host()[b];
    if (start < cell || start - cell >= keys) {
      refuse(
          "{}: block #{} starts at {}, but with notional_padding {} and {} pages of {} it must start in [{}, "
          "{})",
          name, b, start, notional_padding, tables.width, tables.page_size, cell, cell + keys);
    }
    k_starts.push_back(static_cast<std::int32_t>(start - cell));
  }
  return paged(name, gappy.q_starts, std::move(k_starts), *gappy.k_lens, tables);
}

}  // namespace attune::runtime
