// The one tolerance of Attune's numerics:
//
//   |out - ref64| <= 2 * |plain - ref64| + tiny
//
// where ref64 is reference.h and plain is plain.h, applied to the worst element of a tensor and to the mean
// over it. A kernel may be as wrong as twice what an eager framework is in the same type: an absolute bound
// would hide bugs in 16 bit, and a relative one forbids nothing near 0.
//
// tiny = 4 * 2^-23 * magnitude: four float32 ulps of the largest |value| (of the largest |lse|, at least 1).
// It is what a float32 accumulation may lose where the plain implementation happens to be exact, as with one
// visible key. It is 1/2048 of a float16 ulp, so it does not loosen the bound in 16 bit.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace attune::test {

struct Comparison {
  bool ok = false;
  std::size_t worst_index = 0;  // of the actual error, in the flat tensor
  double worst = 0, worst_plain = 0, worst_bound = 0;
  double mean = 0, mean_plain = 0, mean_bound = 0;

  /// "worst 1.2e-3 at 417 (plain 8.0e-4, bound 1.6e-3); mean ..."
  std::string text() const;
};

/// `magnitude` is the largest |value| that the sums are made of. Infinities must be equal; a NaN is an error
/// of infinity.
Comparison compare(std::span<const double> actual, std::span<const double> plain,
                   std::span<const double> reference, double magnitude);

/// The largest finite |x|, at least `floor`.
double largest_magnitude(std::span<const double> values, double floor);

}  // namespace attune::test
