#include "tools/bench_race.h"

#include <algorithm>
#include <iterator>

namespace attune::tools {
namespace {

constexpr int kTurns = 9;
constexpr double kTurnMicroseconds = 2000;
constexpr int kMostCalls = 20;  // of a turn: a device is kept busy while so many are queued
constexpr double kFarBehind = 1.5;
constexpr double kNoise = 0.02;

double median(std::vector<double> turns) {
  const auto middle = turns.begin() + static_cast<std::ptrdiff_t>(turns.size() / 2);
  std::ranges::nth_element(turns, middle);
  return *middle;
}

int calls_of_turn(double microseconds) {
  return static_cast<int>(
      std::clamp(kTurnMicroseconds / std::max(microseconds, 1e-3), 1.0, double{kMostCalls}));
}

}  // namespace

Result<std::vector<double>> race(std::size_t contenders, const Stopwatch& stopwatch) {
  std::vector<std::vector<double>> turns(contenders);
  std::vector<int> calls(contenders);
  std::vector<double> quickest(contenders);
  for (std::size_t i = 0; i < contenders; ++i) {
    ATTUNE_ASSIGN(warm_up, stopwatch(i, 1));
    calls[i] = calls_of_turn(warm_up);
    ATTUNE_ASSIGN(first, stopwatch(i, calls[i]));
    turns[i].push_back(first);
    quickest[i] = std::min(warm_up, first);
  }
  const double best = contenders == 0 ? 0 : std::ranges::min(quickest);
  for (int turn = 1; turn < kTurns; ++turn) {
    for (std::size_t i = 0; i < contenders; ++i) {
      if (quickest[i] > kFarBehind * best) continue;
      ATTUNE_ASSIGN(microseconds, stopwatch(i, calls[i]));
      turns[i].push_back(microseconds);
    }
  }
  std::vector<double> medians;
  std::ranges::transform(turns, std::back_inserter(medians), median);
  return medians;
}

std::size_t winner_of(const std::vector<double>& microseconds) {
  const auto fastest = std::ranges::min_element(microseconds);
  if (*fastest >= (1 - kNoise) * microseconds.front()) return 0;
  return static_cast<std::size_t>(fastest - microseconds.begin());
}

}  // namespace attune::tools
