// Problem: what a caller asks for, as far as a kernel can be specialised on it. Plain integers without any
// run-time extent: the engine's hot table is keyed by its bytes.
#pragma once

#include "attune/spec.h"
#include "base/result.h"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace attune::codegen {

/// Which kernel family must run; automatic lets the registry choose.
enum class Force : int { automatic = -1, cpu = 0, simt = 1, mma = 2 };

struct Problem {
  kernel::Operation operation = kernel::Operation::forward;
  kernel::DType dtype = kernel::DType::f32;
  int head_dim = 0;
  int head_dim_v = 0;
  kernel::Edge window_left = kernel::Edge::open;
  kernel::Edge window_right = kernel::Edge::open;
  kernel::Lse lse = kernel::Lse::skip;
  int align_bytes = 16;  // what every row of query, key, value and output is aligned for: 16, 8, 4 or 2
  Force force = Force::automatic;

  bool operator==(const Problem&) const = default;
};
static_assert(sizeof(Problem) == 9 * sizeof(int),
              "Problem is hashed as bytes: no padding, and update for_each_field");

template <typename P, typename Visit>
constexpr void for_each_problem_field(P& problem, Visit&& visit) {
  visit("operation", problem.operation);
  visit("dtype", problem.dtype);
  visit("head_dim", problem.head_dim);
  visit("head_dim_v", problem.head_dim_v);
  visit("window_left", problem.window_left);
  visit("window_right", problem.window_right);
  visit("lse", problem.lse);
  visit("align_bytes", problem.align_bytes);
  visit("force", problem.force);
}

/// "dtype=f16 head_dim=64 head_dim_v=64 window_right=bounded lse=write": fields at their default are left
/// out. The line format of `attune precompile` lists.
std::string to_string(const Problem& problem);

/// Parses what to_string prints. head_dim_v defaults to head_dim. Fails with invalid_argument naming the
/// word.
Result<Problem> parse_problem(std::string_view text);

}  // namespace attune::codegen
