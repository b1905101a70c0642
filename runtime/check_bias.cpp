#include "runtime/check_bias.h"

#include "attune/blocks.h"
#include "attune/semantics.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <span>

namespace attune::runtime {
namespace {

using kernel::i32;

static_assert(static_cast<int>(Window::Anchor::top_left) == static_cast<int>(kernel::Anchor::top_left) &&
              static_cast<int>(Window::Anchor::bottom_right) ==
                  static_cast<int>(kernel::Anchor::bottom_right));

Failure refuse(const AttentionBias& bias, std::string_view what) {
  return invalid_argument(fmt::format("{}: {}", bias.name, what));
}

// ---- The tensor ----

kernel::Bias kind_of(DType dtype) {
  switch (dtype) {
    case DType::f16: return kernel::Bias::f16;
    case DType::bf16: return kernel::Bias::bf16;
    case DType::boolean: return kernel::Bias::boolean;
    default: return kernel::Bias::f32;
  }
}

/// The axes that a bias tensor may have, from its rank and the query's: [Mq, Mkv] and [B, Mq, Mkv] always,
/// and all of [B, H, Mq, Mkv] or, for a query with groups, [B, G, H, Mq, Mkv].
struct BiasAxes {
  int batch = -1;
  int group = -1;
  int head = -1;
};

std::optional<BiasAxes> bias_axes(int rank, int query_rank) {
  if (rank == 2) return BiasAxes{};
  if (rank == 3) return BiasAxes{.batch = 0};
  if (rank == 4 && query_rank <= 4) return BiasAxes{.batch = 0, .head = 1};
  if (rank == 5 && query_rank == 5) return BiasAxes{.batch = 0, .group = 1, .head = 2};
  return std::nullopt;
}

/// What a dense bias must look like, for messages: "[2 or 1, 8 or 1, 5 or 1, 7]".
std::string expected_shapes(const TensorView& query, const kernel::ForwardParams& p) {
  const std::string rows = fmt::format("{} or 1, {}", p.len_q, p.len_k);
  const std::string heads = query.rank == 5 ? fmt::format("{} or 1, {} or 1", p.groups, p.heads)
                                            : fmt::format("{} or 1", p.groups * p.heads);
  return fmt::format("[{} or 1, {}, {}], or the same without heads or without batch and heads", p.batch,
                     heads, rows);
}

/// Of a tensor that fits, which axes it has; nothing when it does not.
std::optional<BiasAxes> fitting_axes(const TensorView& t, const TensorView& query,
                                     const kernel::ForwardParams& p) {
  const auto axes = bias_axes(t.rank, query.rank);
  if (!axes || t.shape[t.rank - 1] != p.len_k) return std::nullopt;
  const auto is = [&](int axis, std::int64_t size) {
    return axis < 0 || t.shape[axis] == size || t.shape[axis] == 1;
  };
  const bool grouped = axes->group >= 0;
  const std::int64_t heads = grouped ? p.heads : std::int64_t{p.groups} * p.heads;
  if (!is(axes->batch, p.batch) || !is(axes->group, p.groups) || !is(axes->head, heads) ||
      !is(t.rank - 2, p.len_q)) {
    return std::nullopt;
  }
  return axes;
}

kernel::BiasStrides strides_of(const TensorView& t, const BiasAxes& axes, const kernel::ForwardParams& p) {
  const auto stride = [&](int axis) { return axis < 0 ? 0 : stride_of(t, axis); };
  kernel::BiasStrides strides{.batch = stride(axes.batch),
                              .group = stride(axes.group),
                              .head = stride(axes.head),
                              .query = stride(t.rank - 2),
                              .key = stride(t.rank - 1)};
  if (axes.group < 0) strides.group = strides.head * p.heads;
  return strides;
}

// ---- Sequences ----

/// The tables of a bias, as far as the host knows them, and what they are checked against.
struct Host {
  const AttentionBias& bias;
  const Sequences& s;
  std::int64_t query_rows;
  std::int64_t key_rows;

  bool paged() const { return s.block_tables.has_value(); }
  /// Logical keys of one sequence's row of pages, or all key rows.
  std::int64_t keys() const { return paged() ? s.table_width * s.page_size : key_rows; }
  bool knows_keys() const { return s.k_starts.on_host() && (!s.k_lens || s.k_lens->on_host()); }
  std::int64_t start(std::size_t b) const { return s.k_starts.host()[b]; }
  std::int64_t length(std::size_t b) const {
    return s.k_lens ? std::int64_t{s.k_lens->host()[b]} : std::int64_t{s.k_starts.host()[b + 1]} - start(b);
  }
};

Result<void> check_size(const AttentionBias& bias, const char* name, const Int32Table& table,
                        std::int64_t expected) {
  if (table.size() == expected) return done();
  return refuse(bias, fmt::format("{} has {} entries, expected {}", name, table.size(), expected));
}

Result<void> check_sizes(const AttentionBias& bias, const Sequences& s) {
  if (s.count < 0 || s.count > kernel::kMaxLength) {
    return refuse(bias, fmt::format("{} sequences, expected 0 to 2^29", s.count));
  }
  ATTUNE_TRY(check_size(bias, "q_starts", s.q_starts, s.count + 1));
  if (s.k_lens) {
    ATTUNE_TRY(check_size(bias, "k_lens", *s.k_lens, s.count));
    if (s.k_starts.size() < s.count) {
      return refuse(bias, fmt::format("k_starts has {} entries, expected {}", s.k_starts.size(), s.count));
    }
  } else {
    ATTUNE_TRY(check_size(bias, "k_starts", s.k_starts, s.count + 1));
  }
  if (!s.block_tables) return done();
  if (s.page_size < 1 || s.page_size > kernel::kMaxLength) {
    return refuse(bias, fmt::format("page_size {}, expected 1 to 2^29", s.page_size));
  }
  if (s.table_width < 0 || s.table_width > kernel::kMaxLength / s.page_size) {
    return refuse(bias, fmt::format("{} pages of {} keys for each sequence, the limit is 2^29 keys",
                                    s.table_width, s.page_size));
  }
  return check_size(bias, "block_tables", *s.block_tables, s.count * s.table_width);
}

/// Starts ascend from 0 to all the rows of a tensor.
Result<void> check_starts(const AttentionBias& bias, const char* table, const std::vector<i32>& starts,
                          const char* tensor, std::int64_t rows) {
  if (starts.front() != 0) {
    return refuse(bias, fmt::format("{}[0] is {}, expected 0", table, starts.front()));
  }
  if (const auto falls = std::ranges::adjacent_find(starts, std::ranges::greater{}); falls != starts.end()) {
    const auto b = falls - starts.begin();
    return refuse(bias, fmt::format("{}[{}] is {}, less than {} before it", table, b + 1, falls[1], *falls));
  }
  if (starts.back() != rows) {
    return refuse(
        bias, fmt::format("the sequences have {} rows together, but {} has {}", starts.back(), tensor, rows));
  }
  return done();
}

/// Each sequence's keys lie within the key rows, or within its row of pages.
Result<void> check_key_ranges(const Host& h) {
  for (std::size_t b = 0; b < static_cast<std::size_t>(h.s.count); ++b) {
    if (h.length(b) >= 0 && h.start(b) >= 0 && h.start(b) + h.length(b) <= h.keys()) continue;
    return refuse(h.bias,
                  fmt::format("sequence {} has {} keys from {} on, outside the {} {}", b, h.length(b),
                              h.start(b), h.keys(), h.paged() ? "of its row of pages" : "rows of key"));
  }
  return done();
}

/// The pages that hold some sequence's keys are pages of the key tensor; other entries are never read.
Result<void> check_pages(const Host& h) {
  const std::int64_t pages = h.key_rows / h.s.page_size;
  const auto& table = h.s.block_tables->host();
  for (std::size_t b = 0; b < static_cast<std::size_t>(h.s.count); ++b) {
    if (h.length(b) == 0) continue;
    const auto row = table.begin() + static_cast<std::ptrdiff_t>(b) * h.s.table_width;
    const auto used =
        std::span(row + h.start(b) / h.s.page_size, row + (h.start(b) + h.length(b) - 1) / h.s.page_size + 1);
    const auto bad = std::ranges::find_if(used, [&](i32 page) { return page < 0 || page >= pages; });
    if (bad == used.end()) continue;
    return refuse(h.bias, fmt::format("block_tables[{}, {}] is page {}, but key has {} pages of {} rows", b,
                                      &*bad - &*row, *bad, pages, h.s.page_size));
  }
  return done();
}

Result<void> check_contents(const Host& h) {
  if (h.s.q_starts.on_host()) {
    ATTUNE_TRY(check_starts(h.bias, "q_starts", h.s.q_starts.host(), "query", h.query_rows));
  }
  if (!h.s.k_lens && !h.paged() && h.s.k_starts.on_host()) {
    ATTUNE_TRY(check_starts(h.bias, "k_starts", h.s.k_starts.host(), "key", h.key_rows));
  }
  if (!h.knows_keys()) return done();
  ATTUNE_TRY(check_key_ranges(h));
  if (h.paged() && h.s.block_tables->on_host()) ATTUNE_TRY(check_pages(h));
  return done();
}

Result<void> check_rows(const Arguments& a, const Sequences& s) {
  const std::int64_t batch = a.query.shape[0];
  const std::int64_t query_rows = a.query.shape[1];
  const std::int64_t key_rows = a.key.shape[1];
  if (batch != 1) {
    return refuse(a.bias,
                  fmt::format("expected batch_size=1, got {}: query, key and value hold all sequences "
                              "on the sequence axis; reshape them to [1, B * M, ...]",
                              batch));
  }
  if (s.count == 0 && query_rows > 0) {
    return refuse(a.bias, fmt::format("no sequences, but query has {} rows", query_rows));
  }
  if (s.key_rows >= 0 && key_rows != s.key_rows) {
    return refuse(a.bias, fmt::format("key and value have {} rows, expected {}", key_rows, s.key_rows));
  }
  if (s.block_tables && key_rows % s.page_size != 0) {
    return refuse(
        a.bias, fmt::format("key and value have {} rows, expected whole pages of {}", key_rows, s.page_size));
  }
  return done();
}

/// How many keys, counted from where any sequence begins, are sure to be neighbours in memory.
i32 page_run(const Sequences& s) {
  if (s.page_run > 0) return static_cast<i32>(std::gcd(s.page_run, s.page_size));
  if (!s.k_starts.on_host()) return 1;
  const auto& starts = s.k_starts.host();
  return std::accumulate(starts.begin(), starts.end(), static_cast<i32>(s.page_size), std::gcd<i32, i32>);
}

/// The tables in the device's memory; on() throws, since it is public.
Result<void> place_tables(const Sequences& s, Call& call) {
  kernel::Sequences& placed = call.params.sequences;
  const auto on_device = [&](const Int32Table& table) { return table.on(call.device, call.stream); };
  try {
    placed.q_start = on_device(s.q_starts);
    placed.k_start = on_device(s.k_starts);
    if (s.k_lens) placed.k_len = on_device(*s.k_lens);
    if (s.block_tables) placed.pages = on_device(*s.block_tables);
  } catch (const Error& error) {
    return Failure{error.kind(), error.what()};
  }
  return done();
}

}  // namespace

Result<Memory> add_bias(const Arguments& a, Call& call) {
  kernel::ForwardParams& p = call.params;
  const Window& window = a.bias.window;
  if (static_cast<unsigned>(window.anchor) > static_cast<unsigned>(Window::Anchor::bottom_right)) {
    return refuse(a.bias, fmt::format("unknown anchor {}", static_cast<int>(window.anchor)));
  }
  p.reach = kernel::make_reach(static_cast<kernel::Anchor>(window.anchor), window.left, window.right);
  p.window = kernel::window_of(p.reach, p.len_q, p.len_k);
  call.problem.window_left = window.left < 0 ? kernel::Edge::open : kernel::Edge::bounded;
  call.problem.window_right = window.right < 0 ? kernel::Edge::open : kernel::Edge::bounded;

  if (!a.bias.tensor) return Memory();
  const TensorView& tensor = *a.bias.tensor;
  ATTUNE_TRY(check_kind("attn_bias", tensor, DTypes::bias));
  if (!(tensor.device == a.query.device)) {
    return invalid_argument(
        fmt::format("query is on {} but attn_bias is on {}: all should be on the same device",
                    text_of(a.query.device), text_of(tensor.device)));
  }
  if (tensor.rank < 2 || tensor.rank > 5) {
    return invalid_argument(
        fmt::format("attn_bias: rank {}, expected {}", tensor.rank, expected_shapes(a.query, p)));
  }
  const auto axes = fitting_axes(tensor, a.query, p);
  if (!axes) {
    return invalid_argument(
        fmt::format("attn_bias: shape {}, expected {}", shape_text(tensor), expected_shapes(a.query, p)));
  }
  ATTUNE_ASSIGN(memory, check_memory("attn_bias", tensor, LastStride::any));
  p.bias = tensor.data;
  p.bias_strides = strides_of(tensor, *axes, p);
  call.problem.bias = kind_of(tensor.dtype);
  return memory;
}

Result<void> add_bias_gradient(const TensorView& query, const TensorView& bias,
                               const MutableTensorView& gradient, kernel::BackwardParams& p) {
  if (bias.dtype == DType::boolean) {
    return invalid_argument("grad_bias: attn_bias is boolean, which has no gradient; leave grad_bias out");
  }
  if (gradient.dtype != bias.dtype || !(gradient.device == bias.device)) {
    return invalid_argument(fmt::format("grad_bias: is {} on {}, expected {} on {} as attn_bias",
                                        text_of(gradient.dtype), text_of(gradient.device),
                                        text_of(bias.dtype), text_of(bias.device)));
  }
  const TensorView view = gradient;
  if (view.rank != bias.rank ||
      !std::equal(view.shape.begin(), view.shape.begin() + view.rank, bias.shape.begin())) {
    const bool printable = view.rank >= 0 && view.rank <= kMaxRank;
    return invalid_argument(fmt::format("grad_bias: shape {}, expected {} as attn_bias",
                                        printable ? shape_text(view) : "of an unknown rank",
                                        shape_text(bias)));
  }
  const kernel::ForwardParams& f = p.forward;
  const auto axes = fitting_axes(view, query, f);  // as the bias's, which have been checked
  const auto is_single = [&](int axis) { return axis < 0 || view.shape[axis] == 1; };
  const bool single_head = is_single(axes->head);
  p.bias_batch = is_single(axes->batch) ? 1 : f.batch;
  p.bias_groups = (axes->group < 0 ? single_head : is_single(axes->group)) ? 1 : f.groups;
  p.bias_heads = single_head ? 1 : f.heads;
  p.bias_rows = static_cast<i32>(view.shape[view.rank - 2]);
  p.grad_bias = gradient.data;
  p.grad_bias_strides = strides_of(view, *axes, f);
  return done();
}

Result<void> add_sequences(const Arguments& a, Call& call) {
  if (a.bias.sequences == nullptr) return done();
  const Sequences& s = *a.bias.sequences;
  ATTUNE_TRY(check_sizes(a.bias, s));
  ATTUNE_TRY(check_rows(a, s));
  const std::int64_t key_rows = a.key.shape[1];
  ATTUNE_TRY(check_contents({a.bias, s, a.query.shape[1], key_rows}));
  call.problem.blocks = kernel::Blocks::varlen;
  kernel::Sequences& placed = call.params.sequences;
  placed.count = static_cast<i32>(s.count);
  if (s.block_tables) {
    call.problem.keys = kernel::Keys::paged;
    // Without a key row there is no page that a table of the device could name: its sequences are empty.
    placed.table_width = key_rows == 0 ? 0 : static_cast<i32>(s.table_width);
    placed.page_size = kernel::make_divider(static_cast<i32>(s.page_size));
    placed.page_run = page_run(s);
  }
  return a.output == nullptr && !a.places_tables ? done() : place_tables(s, call);
}

}  // namespace attune::runtime
