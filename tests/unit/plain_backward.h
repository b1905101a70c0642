// A backward pass in float64, as plainly as attune/backward.h has it, over tensors in poisoned surroundings:
// whatever lies around rows, between them and in rows of no block is NaN.
#pragma once

#include "attune/backward.h"
#include "attune/params.h"
#include "codegen/problem.h"
#include "tests/support/random.h"

#include <cstddef>
#include <vector>

namespace attune::test {

using codegen::Problem;
using kernel::Anchor;
using kernel::BackwardParams;
using kernel::Bias;
using kernel::BiasStrides;
using kernel::DType;
using kernel::ForwardParams;
using kernel::i32;
using kernel::i64;
using kernel::Strides;

using Table = std::vector<int>;

/// Elements of a type in memory, all of them one number at first.
class Tensor {
 public:
  Tensor(DType dtype, i64 count, double filling) : dtype_(dtype), bytes_(count * size_of(dtype)) {
    for (i64 at = 0; at < count; ++at) set(at, filling);
  }
  i64 count() const { return static_cast<i64>(bytes_.size()) / size_of(dtype_); }
  DType dtype() const { return dtype_; }
  std::byte* data() { return bytes_.data(); }
  const std::byte* data() const { return bytes_.data(); }
  std::size_t bytes() const { return bytes_.size(); }

  void set(i64 at, double number);
  double get(i64 at) const;

 private:
  DType dtype_;
  std::vector<std::byte> bytes_;
};

double rounded_to(DType dtype, double number);

/// Which heads and batch entries share a tensor.
struct Shared {
  bool batch = false, group = false, head = false, query = false;
};

/// What a problem is made from. A reach that is negative is none.
struct Setup {
  Problem problem;
  int batch = 1, groups = 1, heads = 1, len_q = 1, len_k = 1;
  Anchor anchor = Anchor::top_left;
  int left = -1, right = -1;
  Table q_start = {}, k_start = {}, k_len = {}, pages = {};  // varlen
  int page_size = 0;
  double drops = 0;
  Shared keys = {}, values = {}, bias = {};
  bool bias_columns_apart = false;
  i64 grad_column = 1;
  bool padded_lse = false;
  int nan_block = -1;  // whose queries are NaN: what is NaN then is not compared
  float scale = 0.25f;
};

/// A block of the attention matrix: its query rows are neighbours, its keys lie anywhere.
struct PlainBlock {
  int index, batch, q_begin, len_q;
  Table key_rows;
};

std::vector<PlainBlock> blocks_of(const Setup& setup);

/// [batch, rows, groups, heads, dim] with gaps behind each row of a head; axes that are shared have stride 0.
Strides strides_of(const Setup& setup, int rows, int dim, Shared shared = {});

/// A key that a query sees: P Z, dS, and the sum of the magnitudes that dS was added up from.
struct Pair {
  int j;
  double weight;
  double grad_score;
  double magnitude;
};

/// Random inputs, the forward pass, and what the gradients are made of.
class PlainBackward {
 public:
  PlainBackward(const Setup& setup, Random& random);

 protected:
  const Problem& problem() const { return s_.problem; }
  ForwardParams& p() { return params_.forward; }
  const ForwardParams& p() const { return params_.forward; }
  /// Does delta copy grad_output?
  bool copies() const { return s_.grad_column != 1 || problem().output_dtype != problem().dtype; }

  static i64 at(const Strides& strides, const PlainBlock& block, int row, int group, int head) {
    return block.batch * strides.batch + row * strides.seq + group * strides.group + head * strides.head;
  }
  i64 bias_at(const BiasStrides& strides, const PlainBlock& block, int group, int head, int i, int j) const {
    return block.batch * strides.batch + group * strides.group + head * strides.head +
           (block.q_begin + i) * strides.query + block.key_rows[j] * strides.key;
  }

  template <typename Visit>
  void for_each_query(Visit&& visit) const {
    for (const PlainBlock& block : blocks_of(s_)) {
      for (int group = 0; group < s_.groups; ++group) {
        for (int head = 0; head < s_.heads; ++head) {
          for (int i = 0; i < block.len_q; ++i) visit(block, group, head, i);
        }
      }
    }
  }

  /// The keys that a query sees.
  std::vector<Pair> pairs_of(const PlainBlock& block, int group, int head, int i) const;
  /// An element of grad_output, as delta copies it.
  double grad_output(const PlainBlock& block, int group, int head, int i, int c) const;

  Setup s_;
  BackwardParams params_;  // without results and what delta writes; data of inputs is in the tensors
  Tensor query_, key_, value_, output_, grad_output_, bias_;
  std::vector<float> lse_, grad_lse_;

 private:
  Tensor input(DType dtype, int rows, int dim, Shared shared, Strides& strides);
  Tensor gradient_input();
  Tensor bias_input();
  bool visible(const PlainBlock& block, int i, int j) const;
  /// Where the lse of a query is.
  i64 number_at(const PlainBlock& block, int group, int head, int i) const;
  /// Numbers for all that is looked at.
  void fill(Random& random);
  void attend(const PlainBlock& block, int group, int head, int i);
  /// With scale and bias; -inf where the query does not see the key.
  double score(const PlainBlock& block, int group, int head, int i, int j) const;
};

}  // namespace attune::test
