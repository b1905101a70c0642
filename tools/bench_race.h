// Which of several contenders is the fastest.
#pragma once

#include "base/result.h"

#include <cstddef>
#include <functional>
#include <vector>

namespace attune::tools {

/// Microseconds of one of so many calls of a contender.
using Stopwatch = std::function<Result<double>(std::size_t contender, int calls)>;

/// The median of each contender's turns, taken in alternation: what heats or slows a device meets them all.
/// Whoever is far behind after one turn takes no other.
Result<std::vector<double>> race(std::size_t contenders, const Stopwatch& stopwatch);

/// The fastest, or the first, which is the usual choice, where no other is faster by more than two runs
/// differ.
std::size_t winner_of(const std::vector<double>& microseconds);

}  // namespace attune::tools
