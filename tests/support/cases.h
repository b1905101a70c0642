// Random attention problems for differential tests, and the verdict on what a kernel made of them. The CPU's
// and the GPU's tests draw from here.
#pragma once

#include "tests/support/guarded_tensor.h"
#include "tests/support/random.h"
#include "tools/reference/reference.h"

#include <optional>
#include <span>
#include <string>
#include <vector>

namespace attune::test {

using namespace attune::reference;  // NOLINT: cases speak of references and plain values all the time

/// How the kernel for a case is specialised. Cases of one class share a kernel, whatever their lengths.
struct KernelClass {
  DType dtype = DType::f32;
  int head_dim = 1;
  int head_dim_v = 1;
  bool window_left = false;  // never without window_right: no bias has only a left bound
  bool window_right = false;
  bool lse = false;
  int align_bytes = 16;
};

/// `count` classes whose head_dims, and head_dim_vs, spread evenly over 1 to 256: with 256 classes every one
/// occurs.
std::vector<KernelClass> random_classes(Random& random, int count, std::span<const DType> dtypes);

struct AttentionCase {
  std::string name;  // everything that was drawn
  GuardedTensor query, key, value;
  GuardedTensor output;
  GuardedTensor lse;  // contiguous; used when with_lse
  bool with_lse = false;
  AttentionBias bias;
  std::optional<double> scale;

  Inputs inputs() const;
  /// Is there anything to compute?
  bool empty() const;
};

/// Lengths with 0, 1 and the neighbours of tile sizes; permuted, strided, misaligned, broadcast and reversed
/// layouts; every bias of the class, with windows that leave rows empty; default, negative and zero scales;
/// values small and large.
AttentionCase random_case(Random& random, const KernelClass& kernel_class);

/// `count` cases that take turns through the classes: case i is of class i % classes.size().
std::vector<AttentionCase> random_cases(Random& random, std::span<const KernelClass> classes, int count);

/// "" when output and lse are within the tolerance, rows without a key are exactly 0 and -inf, and no byte
/// outside them has changed; else what is wrong. `ran` is what the kernel left in the case's own memory.
std::string verdict(const AttentionCase& ran);
/// One line for every case whose verdict is not "": its name and the verdict. On all cores.
std::vector<std::string> failures_of(std::span<const AttentionCase> ran);

}  // namespace attune::test
