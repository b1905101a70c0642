// A bias from its class's name, the route that makes it and named arguments: what `attune mask` takes on the
// command line and `attune verify masks` reads from a file.
#pragma once

#include "attune/attn_bias.h"
#include "base/result.h"

#include <nlohmann/json.hpp>

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace attune::verify {

/// One way to make a bias: a constructor of its class, or another class's conversion to it.
struct BiasRoute {
  std::string_view bias;                // the class
  std::string_view via;                 // "constructor", "from_seqlens", "BlockDiagonalMask.make_causal"
  std::vector<std::string_view> takes;  // arguments; those with a '?' behind may be left out
  AttentionBias (*make)(const nlohmann::json& arguments);
};

/// All routes; those of a class are neighbours, and the first is the usual one.
std::span<const BiasRoute> routes();

/// The route of that class and that name; the usual one for an empty name. Fails with invalid_argument, which
/// names the classes or the routes that there are.
Result<const BiasRoute*> find_route(std::string_view bias, std::string_view via = {});

/// `arguments` is an object: numbers, lists of numbers, and block_tables as a list of lists. Fails with
/// invalid_argument when one is missing, unknown or of another type, or when the class refuses it.
Result<AttentionBias> make_bias(const BiasRoute& route, const nlohmann::json& arguments);

/// Query rows that the bias's sequences have together; key rows that they need. Both are -1 for masks of
/// whole attention, which fit any.
struct BiasExtents {
  std::int64_t queries = -1;
  std::int64_t keys = -1;
};
BiasExtents extents_of(const AttentionBias& bias);

}  // namespace attune::verify
