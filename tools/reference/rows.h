// A problem as the formula sees it, row by row: every query with the keys that it sees. Which those are, what
// is added to their scores and which of them dropout keeps is decided here, for reference.h and plain.h
// alike; the arithmetic is theirs.
#pragma once

#include "tools/reference/reference.h"

#include <cstddef>
#include <functional>
#include <vector>

namespace attune::reference {

/// A key that a query sees.
struct SeenKey {
  const float* key = nullptr;
  const float* value = nullptr;
  float bias = 0;             // added to the score
  bool kept = true;           // by dropout
  std::size_t key_row = 0;    // where its row of GradientValues::key begins
  std::size_t value_row = 0;  // likewise
  std::size_t bias_at = 0;    // where its element of GradientValues::bias is; 0 without a bias tensor
};

/// A query of one head.
struct QueryRow {
  const float* query = nullptr;
  std::vector<SeenKey> keys;
  std::size_t query_row = 0;  // where its row of GradientValues::query begins
  std::size_t output = 0;     // where its row of Values::output begins
  std::size_t lse = 0;        // where its element of Values::lse is
};

void for_each_row(const Inputs& inputs, const std::function<void(const QueryRow&)>& visit);

/// A chunk that saw a key, for one row of a merge.
struct MergedRow {
  struct Chunk {
    const float* output = nullptr;
    float lse = 0;  // finite
  };
  std::vector<Chunk> chunks;
  std::size_t output = 0;
  std::size_t lse = 0;
};

void for_each_row(const MergeInputs& inputs, const std::function<void(const MergedRow&)>& visit);

/// 1 / (1 - p), with p as dropout rounds it; 0 of p = 1.
double rescale_of(const Inputs& inputs);

/// Zeros: the output and lse of a problem of these extents.
Values zeros(const Extents& extents);

/// Elements of a tensor.
std::size_t count_of(const TensorView& tensor);

/// Is there a bias tensor of numbers? A boolean one has no gradient.
bool has_bias_gradient(const Inputs& inputs);

}  // namespace attune::reference
