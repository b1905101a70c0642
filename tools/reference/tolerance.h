// The one tolerance of Attune's numerics:
//
//   |out - ref64| <= 2 * |plain - ref64| + tiny
//
// where ref64 is reference.h and plain is plain.h, applied to the worst element of a tensor and to the mean
// over it. A kernel may be as wrong as twice what an eager framework is in the same type: an absolute bound
// would hide bugs in 16 bit, and a relative one forbids nothing near 0.
//
// tiny = 2^-23 * (4 + 3 * score) * value, for results that the plain implementation happens to hit: four
// float32 ulps that the sums may lose, and what float32 scores cost. Up to six roundings of half an ulp each
// are in proportion to a score: scale, scale * log2(e), its product with the query, the score or the bias
// times log2(e) and their sum, and for the lse its sum and the way back to the natural logarithm. A weight is
// off by as large a fraction as its score is off, and the output by those fractions' mean over the keys,
// weighted as they are: so `score` is that mean of |scale * q.k| + |bias|, of the query where it is largest.
// A key that weighs nothing costs nothing, however far below the others its score lies. `value` is the
// largest |value|, over 1 - p with dropout. The lse is judged alike: |lse| counts as a score, and 1 stands in
// place of the value. A merge's scores are its chunks' lse. In 16 bit, tiny is far below an ulp and does not
// loosen the bound.
//
// An element of a gradient is a sum of terms, one of each pair of a query and a key (attune/backward.h). A
// term's tiny is tiny_of(score, value) with the pair's own score, as a weight is its factor, and its
// magnitude for a value. The weight is taken from the caller's lse, a float32 number, so |lse| counts as a
// score, too; and an error of a row's largest score does not cancel, as it does where the sum of the same
// weights is divided by: that of the K additions in it, half an ulp each, is sqrt(K) / 2 ulps of q.k.
// Roundings are independent of each other and add up like the steps of a random walk: the element's tiny is
// the root of the sum of its terms' squares, and four ulps of itself. dS = P (Z dO V^T - delta) is a
// difference of two sums over columns, whose errors stay where the sums cancel. A sum's error, likewise, is
// in proportion to the sum and to the root of its terms' squares; so the magnitude of dS is that of both sums
// and |dLSE|. Of a tensor, the element with the largest tiny counts against the worst element, and the mean
// of all against the mean.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace attune::reference {

struct Comparison {
  bool ok = false;
  std::size_t worst_index = 0;  // of the actual error, in the flat tensor
  double worst = 0, worst_plain = 0, worst_bound = 0;
  double mean = 0, mean_plain = 0, mean_bound = 0;

  /// "worst 1.2e-3 at 417 (plain 8.0e-4, bound 1.6e-3); mean ..."
  std::string text() const;
};

/// Infinities must be equal; a NaN is an error of infinity.
Comparison compare(std::span<const double> actual, std::span<const double> plain,
                   std::span<const double> reference, double tiny);
/// With a tiny of each element.
Comparison compare(std::span<const double> actual, std::span<const double> plain,
                   std::span<const double> reference, std::span<const double> tiny);

double tiny_of(double score, double value);

/// The largest finite |x|; 0 of nothing.
double largest_magnitude(std::span<const double> values);

}  // namespace attune::reference
