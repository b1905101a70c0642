// Random numbers that are the same on every machine, from one printed seed.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <numbers>
#include <random>

namespace attune::test {

/// The seed of this run: ATTUNE_TEST_SEED where it is set, else a new one each time. Printed at first use, so
/// that any failure can be run again.
std::uint64_t test_seed();

class Random {
 public:
  /// Different streams of one seed are independent.
  explicit Random(std::uint64_t seed, std::uint64_t stream = 0) {
    std::seed_seq sequence{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32),
                           static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)};
    engine_.seed(sequence);
  }

  std::uint64_t bits() { return engine_(); }
  /// Uniform in [first, last], both included.
  int integer(int first, int last) {
    return first + static_cast<int>(engine_() % (static_cast<std::uint64_t>(last - first) + 1));
  }
  /// Uniform in [0, 1).
  double unit() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  double normal() { return std::sqrt(-2 * std::log(1 - unit())) * std::cos(2 * std::numbers::pi * unit()); }
  bool chance(double probability) { return unit() < probability; }
  template <typename T>
  T pick(std::initializer_list<T> options) {
    return *(options.begin() + integer(0, static_cast<int>(options.size()) - 1));
  }
  template <typename Container>
  void shuffle(Container& items) {
    for (int i = static_cast<int>(std::size(items)) - 1; i > 0; --i)
      std::swap(items[i], items[integer(0, i)]);
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace attune::test
