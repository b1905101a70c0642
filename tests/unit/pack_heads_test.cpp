// Heads of a group as queries of one head: every query, result and LSE where it was, every visible key and no
// other.
#include "runtime/pack_heads.h"

#include "attune/semantics.h"
#include "tests/support/random.h"

#include <doctest/doctest.h>

#include <utility>
#include <vector>

using namespace attune;
using kernel::Edge;
using kernel::ForwardParams;
using kernel::i64;
using kernel::KernelSpec;
using runtime::packed_heads;

namespace {

float memory[1 << 16];

constexpr KernelSpec kWindow{.window_left = Edge::bounded, .window_right = Edge::bounded};

ForwardParams grouped(test::Random& random) {
  ForwardParams p;
  p.query = p.output = p.lse = memory;
  p.key = memory + 100;
  p.value = memory + 200;
  p.batch = random.integer(1, 3);
  p.groups = random.integer(1, 3);
  p.heads = random.integer(2, 5);
  p.len_q = 1;
  p.len_k = random.integer(1, 9);
  p.query_strides = p.output_strides = {.batch = 1000, .seq = 7, .group = 80, .head = 8};
  p.key_strides = p.value_strides = {.batch = 1000, .seq = 24, .group = 8, .head = 0};
  p.window = {random.integer(-3, 12), 0};
  p.window.upper = p.window.lower + random.integer(0, 12);
  return p;
}

struct Row {
  const float* query;
  const float* lse;
  std::vector<std::pair<const float*, const float*>> seen;  // keys and values

  bool operator==(const Row&) const = default;
};

/// All rows of a launch, in the order of their addresses.
template <KernelSpec S>
std::vector<Row> rows_of(const ForwardParams& p) {
  std::vector<Row> rows;
  const auto at = [](const void* tensor, i64 offset) { return static_cast<const float*>(tensor) + offset; };
  for (int b = 0; b < p.batch; ++b) {
    for (int g = 0; g < p.groups; ++g) {
      for (int h = 0; h < p.heads; ++h) {
        for (int i = 0; i < p.len_q; ++i) {
          const auto offset = [&](const kernel::Strides& s, int row) {
            return b * s.batch + g * s.group + h * s.head + row * s.seq;
          };
          Row row{at(p.query, offset(p.query_strides, i)),
                  p.lse + ((i64{b} * p.groups + g) * p.heads + h) * p.len_q + i,
                  {}};
          CHECK(offset(p.output_strides, i) == offset(p.query_strides, i));
          for (int j = 0; j < p.len_k; ++j) {
            if (!kernel::visible<S>(p.window, p.len_k, i, j)) continue;
            row.seen.emplace_back(at(p.key, offset(p.key_strides, j)),
                                  at(p.value, offset(p.value_strides, j)));
          }
          rows.push_back(row);
        }
      }
    }
  }
  return rows;
}

template <KernelSpec S>
void check_rows() {
  test::Random random(test::test_seed());
  int packed_cases = 0;
  for (int i = 0; i < 200; ++i) {
    const ForwardParams params = grouped(random);
    const std::vector<Row> rows = rows_of<S>(params);
    const auto packed = packed_heads(S, params);
    CHECK(packed.has_value() == !rows.front().seen.empty());
    if (!packed) continue;
    ++packed_cases;
    CHECK(packed->heads == 1);
    CHECK(rows_of<S>(*packed) == rows);
  }
  CHECK(packed_cases > 50);
}

}  // namespace

TEST_CASE("packed heads see what they saw, and write where they wrote") {
  check_rows<KernelSpec{}>();
  check_rows<KernelSpec{.window_right = Edge::bounded}>();
  check_rows<KernelSpec{.window_left = Edge::bounded}>();
  check_rows<kWindow>();
}

TEST_CASE("what is more than one query of a group's keys stays as it is") {
  test::Random random(test::test_seed());
  const ForwardParams params = grouped(random);
  REQUIRE(packed_heads(KernelSpec{}, params));
  for (const KernelSpec& spec :
       {KernelSpec{.blocks = kernel::Blocks::varlen}, KernelSpec{.bias = kernel::Bias::f32},
        KernelSpec{.dropout = kernel::Dropout::on}}) {
    CHECK_FALSE(packed_heads(spec, params));
  }
  const auto unpacked = [&](auto&& change) {
    ForwardParams changed = params;
    change(changed);
    return !packed_heads(KernelSpec{}, changed);
  };
  CHECK(unpacked([](ForwardParams& p) { p.len_q = 2; }));
  CHECK(unpacked([](ForwardParams& p) { p.heads = 1; }));
  CHECK(unpacked([](ForwardParams& p) { p.key_strides.head = 8; }));
  CHECK(unpacked([](ForwardParams& p) { p.value_strides.head = 8; }));
}
