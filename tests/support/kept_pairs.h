// Which pairs a kernel's dropout kept, seen from outside.
#pragma once

#include "attune/attune.h"
#include "tools/verify/arena.h"

#include <string>
#include <vector>

namespace attune::test {

/// A problem for its dropout alone: every weight is equal, and a column of the output is one key's.
struct DropoutProblem {
  DType dtype = DType::f32;
  Family family = Family::cpu;
  int batch = 1, heads = 1, len_q = 1, len_k = 1;
  int head_dim = 8;
  int head_dim_v = 0;  // the keys that one run shows; 0: all
  double p = 0.5;
  DropoutState state;
};

/// Runs it with the bias, as often as it takes to see every key. kept[((b * len_q + i) * heads + h) * len_k +
/// j]: did the output of query row i hold anything of key row j?
std::vector<bool> kept_pairs(const DropoutProblem& problem, const AttentionBias& bias, verify::Arena& arena);

/// Compares a family's kernels with dropout_keeps over several p, batch entries, heads, lengths and head
/// dims, whole and packed, with and without a window. "" when every pair is as defined, else the first that
/// is not.
std::string wrong_dropout(Device device, Family family, const std::vector<DType>& dtypes);

}  // namespace attune::test
