// Random numbers that are the same on every machine, from one seed.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <numbers>
#include <random>
#include <utility>
#include <vector>

namespace attune::verify {

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
  template <typename T>
  const T& pick(const std::vector<T>& options) {
    return options[integer(0, static_cast<int>(options.size()) - 1)];
  }
  template <typename Container>
  void shuffle(Container& items) {
    for (int i = static_cast<int>(std::size(items)) - 1; i > 0; --i)
      std::swap(items[i], items[integer(0, i)]);
  }

 private:
  std::mt19937_64 engine_;
};

/// Deals items in random order, each as often as any other: a small sample of a deck holds many kinds.
template <typename T>
class Deck {
 public:
  explicit Deck(std::vector<T> items) : items_(std::move(items)), next_(items_.size()) {}

  const T& deal(Random& random) {
    if (next_ == items_.size()) {
      random.shuffle(items_);
      next_ = 0;
    }
    return items_[next_++];
  }

 private:
  std::vector<T> items_;
  std::size_t next_;
};

}  // namespace attune::verify
