// Problem: what a caller asks for, as far as a kernel can be specialised on it. Plain integers without any
// run-time extent, but for a class of them: the engine's hot table is keyed by its bytes.
#pragma once

#include "attune/spec.h"
#include "base/result.h"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace attune::codegen {

/// A set of kernel families: bit 1 << Family. Which may run.
enum class Families : int { any = -1 };

constexpr Families only(kernel::Family family) {
  return static_cast<Families>(1 << static_cast<int>(family));
}
constexpr Families operator|(Families a, Families b) {
  return static_cast<Families>(static_cast<int>(a) | static_cast<int>(b));
}
constexpr bool contains(Families families, kernel::Family family) {
  return (static_cast<int>(families) >> static_cast<int>(family) & 1) != 0;
}

/// How much there is to do, where rows of candidates are meant for less than much. Few tiles do not fill a
/// GPU, so small ones are faster; few queries leave much of a tall tile empty, and what every tile costs at
/// its beginning and end is not spread over many keys. The kernels themselves take any lengths.
enum class Extent : int { large, few_queries, few_tiles };
inline constexpr int kFewQueries = 1024;  // of a batch entry: at most
inline constexpr int kFewTiles = 128;     // of 128 queries of one head, over all: at most

constexpr Extent extent_of(std::int64_t heads, std::int64_t queries) {
  if (heads * ((queries + 127) / 128) <= kFewTiles) return Extent::few_tiles;
  return queries <= kFewQueries ? Extent::few_queries : Extent::large;
}

struct Problem {
  kernel::Operation operation = kernel::Operation::forward;
  kernel::DType dtype = kernel::DType::f32;
  kernel::DType output_dtype = kernel::DType::f32;
  int head_dim = 0;  // 0 for merge and grad_merge
  int head_dim_v = 0;
  kernel::Edge window_left = kernel::Edge::open;
  kernel::Edge window_right = kernel::Edge::open;
  kernel::Blocks blocks = kernel::Blocks::dense;
  kernel::Keys keys = kernel::Keys::contiguous;
  kernel::Bias bias = kernel::Bias::none;
  kernel::Dropout dropout = kernel::Dropout::off;
  kernel::Lse lse = kernel::Lse::skip;
  kernel::QueryGradient query_gradient = kernel::QueryGradient::apart;
  kernel::Split split = kernel::Split::off;
  int align_bytes = 16;  // what every row of query, key, value and output is aligned for: 16, 8, 4 or 2
  int boxes = 0;         // 1: they can be described to a tensor copy engine (runtime/boxes.h)
  Extent extent = Extent::large;  // less only of dense forward problems with boxes: others have no such rows
  Families families = Families::any;

  bool operator==(const Problem&) const = default;
};
static_assert(sizeof(Problem) == 18 * sizeof(int),
              "Problem is hashed as bytes: no padding, and update for_each_field");

/// Is it about chunks of a merge? They have no keys, so no head_dim.
constexpr bool merges(kernel::Operation operation) {
  return operation == kernel::Operation::merge || operation == kernel::Operation::grad_merge;
}

template <typename P, typename Visit>
constexpr void for_each_problem_field(P& problem, Visit&& visit) {
  visit("operation", problem.operation);
  visit("dtype", problem.dtype);
  visit("output_dtype", problem.output_dtype);
  visit("head_dim", problem.head_dim);
  visit("head_dim_v", problem.head_dim_v);
  visit("window_left", problem.window_left);
  visit("window_right", problem.window_right);
  visit("blocks", problem.blocks);
  visit("keys", problem.keys);
  visit("bias", problem.bias);
  visit("dropout", problem.dropout);
  visit("lse", problem.lse);
  visit("query_gradient", problem.query_gradient);
  visit("split", problem.split);
  visit("align_bytes", problem.align_bytes);
  visit("boxes", problem.boxes);
  visit("extent", problem.extent);
  visit("families", problem.families);
}

/// "dtype=f16 head_dim=64 window_right=bounded lse=write": fields at their default are left out, where
/// head_dim_v defaults to head_dim and output_dtype to dtype. The line format of `attune precompile` lists.
std::string to_string(const Problem& problem);

/// Parses what to_string prints. Fails with invalid_argument naming the word.
Result<Problem> parse_problem(std::string_view text);

}  // namespace attune::codegen
