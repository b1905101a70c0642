#include "tools/reference/tolerance.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace attune::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double error_of(double actual, double reference) {
  if (actual == reference) return 0;  // infinities too
  const double error = std::abs(actual - reference);
  return std::isnan(error) ? kInfinity : error;
}

}  // namespace

Comparison compare(std::span<const double> actual, std::span<const double> plain,
                   std::span<const double> reference, std::span<const double> tiny) {
  Comparison result;
  const std::size_t size = reference.size();
  if (actual.size() != size || plain.size() != size || tiny.size() != size) return result;
  for (std::size_t i = 0; i < size; ++i) {
    const double error = error_of(actual[i], reference[i]);
    const double plain_error = error_of(plain[i], reference[i]);
    if (error > result.worst) {
      result.worst = error;
      result.worst_index = i;
    }
    result.worst_plain = std::max(result.worst_plain, plain_error);
    result.mean += error;
    result.mean_plain += plain_error;
    result.worst_bound = std::max(result.worst_bound, tiny[i]);
    result.mean_bound += tiny[i];
  }
  const auto count = static_cast<double>(std::max<std::size_t>(1, size));
  result.mean /= count;
  result.mean_plain /= count;
  result.worst_bound += 2 * result.worst_plain;
  result.mean_bound = result.mean_bound / count + 2 * result.mean_plain;
  // A bound that is not finite bounds nothing: the case is ill-posed and must not pass.
  result.ok = std::isfinite(result.worst_bound) && result.worst <= result.worst_bound &&
              result.mean <= result.mean_bound;
  return result;
}

Comparison compare(std::span<const double> actual, std::span<const double> plain,
                   std::span<const double> reference, double tiny) {
  return compare(actual, plain, reference, std::vector<double>(reference.size(), tiny));
}

std::string Comparison::text() const {
  return fmt::format(
      "worst {:.3g} at {} (plain {:.3g}, bound {:.3g}); mean {:.3g} (plain {:.3g}, bound {:.3g})", worst,
      worst_index, worst_plain, worst_bound, mean, mean_plain, mean_bound);
}

double tiny_of(double score, double value) {
  return std::numeric_limits<float>::epsilon() * (4 + 3 * score) * value;
}

double largest_magnitude(std::span<const double> values) {
  double largest = 0;
  for (const double value : values) {
    if (std::isfinite(value)) largest = std::max(largest, std::abs(value));
  }
  return largest;
}

}  // namespace attune::reference
