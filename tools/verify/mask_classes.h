// Every bias class of the documentation as random problems draw it: what it lets a query see, where its keys
// lie, what its constructor demands, and the routes by which it can be made.
#pragma once

#include "attune/attn_bias.h"
#include "codegen/problem.h"
#include "tools/verify/random.h"

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace attune::verify {

/// Where the keys of a block lie.
enum class Addressing { whole, packed, padded, gappy, paged, paged_gappy };

/// What a class asks of the lengths of every block, beyond not being negative.
enum class Demand {
  nothing,
  enough_keys,          // as many keys as queries or more
  last_query_sees_one,  // queries - window_size < keys
};

/// Does the class come with a dense tensor? Those of which it is no part take one by add_bias.
enum class WithTensor { maybe, never, always };

/// The numbers that make a mask, and the tensors' rows that go with them.
struct MaskPlan {
  int len_q = 0;
  int len_k = 0;
  Window window;  // window_size is left + 1
  std::vector<std::int64_t> q_lens, k_lens;
  std::vector<std::int64_t> k_starts;  // gappy: [count + 1]; paged gappy: [count], logical
  std::int64_t padding = 0;            // padded: keys of a cell; paged gappy: of a notional cell
  std::vector<std::int32_t> pages;     // [count, table_width]
  std::int64_t table_width = 0;
  std::int64_t page_size = 0;

  std::string text() const;
};

/// The numbers as int32 tables, for the interface that takes lengths from a device: starts, lengths, pages.
struct HostTables {
  std::vector<std::int32_t> q_starts, k_starts, k_lens, pages;
};
HostTables tables_of(const MaskPlan& plan);

/// The same on the device where attention runs.
struct MaskTables {
  Int32Table q_starts, k_starts, k_lens, pages;
};

/// How a mask is made: by the class's own constructor from lists of the host, by it from tables, or from
/// another class's mask.
enum class Route { lists, tables, conversion };

struct MaskClass {
  using Make = AttentionBias (*)(const MaskPlan&, const MaskTables&);

  const char* name;  // the documentation's
  Addressing keys;
  bool left, right;  // bounds of the window
  Demand demand;
  Make from_lists;
  Make from_tables = nullptr;  // null: the class takes no lengths
  Make converted = nullptr;    // null: no other class becomes it
  WithTensor tensor = WithTensor::maybe;
};

std::span<const MaskClass> mask_classes();

/// Do the kernels of a problem serve the class?
bool serves(const codegen::Problem& problem, const MaskClass& mask);

/// A plan that the class accepts. Sequences of length 0 and 1, around the edges of tiles, with more queries
/// than keys; windows narrow, wide and beyond every key; blocks with gaps, out of order and overlapping;
/// pages shared, out of order and unused, of sizes that are no power of two. len_q * len_k of all
/// blocks together is at most `most_pairs`, or that of a single short block. The sizes of pages, and where in
/// them sequences begin, are multiples of `granule` keys.
MaskPlan random_plan(Random& random, const MaskClass& mask, std::int64_t most_pairs, int granule = 1);

/// The granule that a copy engine needs.
inline constexpr int kBoxGranule = 8;

/// Without its tensor, if it has one.
AttentionBias make_mask(const MaskClass& mask, Route route, const MaskPlan& plan, const MaskTables& tables);

/// 0, 1, around the edges of tiles, or anything up to 160.
int random_length(Random& random);

}  // namespace attune::verify
