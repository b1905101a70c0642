// The CPU kernels on their own, as the backend calls them: against the formula, and against each other where
// two problems are the same arithmetic.
#include "tests/unit/cpu_kernels.h"

#include "attune/blocks.h"
#include "attune/merge.h"
#include "attune/num.h"
#include "attune/philox.h"
#include "attune/semantics.h"
#include "codegen/choose.h"
#include "codegen/names.h"
#include "tests/support/random.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

using namespace attune;
using namespace attune::kernel;
using codegen::Problem;
using test::AtTheEnd;
using test::kernel_of;
using test::on_every_isa;
using test::Random;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kUntouched = -12345.0f;

using Floats = std::vector<float>;
using Table = std::vector<int>;

Floats random_floats(std::int64_t count, Random& random) {
  Floats values(count);
  for (float& x : values) x = static_cast<float>(random.normal());
  return values;
}

Strides dense(int rows, int groups, int heads, int dim) {
  const i64 row = i64{groups} * heads * dim;
  return {.batch = row * rows, .seq = row, .group = i64{heads} * dim, .head = dim};
}

struct Shape {
  int batch, groups, heads, len_q, len_k;
};

/// A problem of float32 tensors [batch, len, groups, heads, dim] of normal numbers, dense.
struct Attention {
  Problem problem;
  ForwardParams params;
  Floats query, key, value, output, lse;

  Attention(const Problem& wanted, Shape s, Random& random) : problem(wanted) {
    problem.lse = Lse::write;
    const int k = problem.head_dim, v = problem.head_dim_v;
    const std::int64_t heads = std::int64_t{s.batch} * s.groups * s.heads;
    query = random_floats(heads * s.len_q * k, random);
    key = random_floats(heads * s.len_k * k, random);
    value = random_floats(heads * s.len_k * v, random);
    output.resize(heads * s.len_q * v);
    lse.resize(heads * s.len_q);
    params.query_strides = dense(s.len_q, s.groups, s.heads, k);
    params.key_strides = dense(s.len_k, s.groups, s.heads, k);
    params.value_strides = dense(s.len_k, s.groups, s.heads, v);
    params.output_strides = dense(s.len_q, s.groups, s.heads, v);
    params.batch = s.batch;
    params.groups = s.groups;
    params.heads = s.heads;
    params.len_q = s.len_q;
    params.len_k = s.len_k;
    params.scale = 1 / std::sqrt(static_cast<float>(k));
    see(Anchor::top_left, -1, -1);
  }

  void see(Anchor anchor, int left, int right) {
    problem.window_left = left < 0 ? Edge::open : Edge::bounded;
    problem.window_right = right < 0 ? Edge::open : Edge::bounded;
    params.reach = make_reach(anchor, left, right);
    params.window = window_of(params.reach, params.len_q, params.len_k);
  }
  void drop(double p) {
    problem.dropout = Dropout::on;
    params.dropout = make_dropout(p, 77, 3);
  }

  void run(const codegen::Arch& arch) {
    params.query = query.data();
    params.key = key.data();
    params.value = value.data();
    launch(arch);
  }
  /// With query, key and value where params has them.
  void launch(const codegen::Arch& arch) {
    params.output = output.data();
    params.lse = lse.data();
    std::ranges::fill(output, kUntouched);
    std::ranges::fill(lse, kUntouched);
    REQUIRE(kernel_of(problem, arch).forward(params, nullptr).ok());
  }

  /// A row of query, key, value or output.
  template <typename T>
  static T* row(std::vector<T>& tensor, const Strides& s, int batch, int seq, int head, int heads) {
    return tensor.data() + batch * s.batch + seq * s.seq + head / heads * s.group + head % heads * s.head;
  }
  float* output_row(int batch, int i, int head) {
    return row(output, params.output_strides, batch, i, head, params.heads);
  }
};

bool sees(const Attention& a, Window window, int len_k, int i, int j) {
  const bool left = a.problem.window_left == Edge::open || j >= i + window.lower;
  const bool right = a.problem.window_right == Edge::open || j <= i + window.upper;
  return j < len_k && left && right;
}

/// A dense problem by the formula. `bias` of (head, i, j) is added to the scores.
double worst_error(Attention& a, const std::function<double(int, int, int)>& bias) {
  const ForwardParams& p = a.params;
  double worst = 0;
  for (int b = 0; b < p.batch; ++b) {
    for (int head = 0; head < p.groups * p.heads; ++head) {
      for (int i = 0; i < p.len_q; ++i) {
        const float* query = a.row(a.query, p.query_strides, b, i, head, p.heads);
        std::vector<double> sum(a.problem.head_dim_v);
        double total = 0;
        for (int j = 0; j < p.len_k; ++j) {
          if (!sees(a, p.window, p.len_k, i, j)) continue;
          const float* key = a.row(a.key, p.key_strides, b, j, head, p.heads);
          const float* value = a.row(a.value, p.value_strides, b, j, head, p.heads);
          double score = 0;
          for (int c = 0; c < a.problem.head_dim; ++c) score += double{query[c]} * key[c];
          const double weight = std::exp(score * p.scale + bias(head, i, j));
          total += weight;
          for (int c = 0; c < a.problem.head_dim_v; ++c) sum[c] += weight * value[c];
        }
        const float* output = a.output_row(b, i, head);
        for (int c = 0; c < a.problem.head_dim_v; ++c) {
          worst = std::max(worst, std::abs(output[c] - (total == 0 ? 0 : sum[c] / total)));
        }
        const float lse = a.lse[(b * p.groups * p.heads + head) * p.len_q + i];
        if (total == 0) {
          if (lse != -kInf) worst = kInf;
        } else {
          worst = std::max(worst, std::abs(lse - std::log(total)) / std::max(1.0, std::abs(std::log(total))));
        }
      }
    }
  }
  return worst;
}

}  // namespace

TEST_CASE("head dims from 1 to 512, in every pair") {
  on_every_isa([](const codegen::Arch& arch) {
    Random random(test::test_seed());
    for (const auto& [k, v] : {std::pair{1, 1}, {7, 19}, {16, 8}, {257, 5}, {20, 300}, {512, 512}}) {
      CAPTURE(k);
      CAPTURE(v);
      Attention a({.head_dim = k, .head_dim_v = v}, {2, 2, 1, 101, 131}, random);
      a.see(Anchor::bottom_right, 60, 7);
      a.run(arch);
      CHECK(worst_error(a, [](int, int, int) { return 0; }) < 1e-5);
    }
  });
}

TEST_CASE("dropout keeps the pairs that philox.h says") {
  // Scores are 0 and values the identity: the output is the matrix of probabilities.
  constexpr int kKeys = 141;
  on_every_isa([](const codegen::Arch& arch) {
    Random random(test::test_seed());
    Attention a({.head_dim = 3, .head_dim_v = kKeys, .blocks = Blocks::varlen}, {1, 2, 2, 113, kKeys + 40},
                random);
    const Table q_start{0, 75, 113}, k_start{0, kKeys, kKeys + 40};
    a.params.sequences = {.count = 2, .q_start = q_start.data(), .k_start = k_start.data()};
    a.see(Anchor::bottom_right, 70, -1);
    a.drop(0.4);
    std::ranges::fill(a.query, 0.0f);
    std::ranges::fill(a.value, 0.0f);
    for (int b = 0; b < 2; ++b) {
      for (int j = 0; j < k_start[b + 1] - k_start[b]; ++j) {
        for (int head = 0; head < 4; ++head)
          a.row(a.value, a.params.value_strides, 0, k_start[b] + j, head, 2)[j] = 1;
      }
    }
    a.run(arch);
    int wrong = 0, kept_pairs = 0;
    for (int b = 0; b < 2; ++b) {
      const int len_q = q_start[b + 1] - q_start[b], len_k = k_start[b + 1] - k_start[b];
      const Window window = window_of(a.params.reach, len_q, len_k);
      for (int head = 0; head < 4; ++head) {
        for (int i = 0; i < len_q; ++i) {
          int visible = 0;
          for (int j = 0; j < len_k; ++j) visible += sees(a, window, len_k, i, j);
          for (int j = 0; j < len_k; ++j) {
            const bool kept = sees(a, window, len_k, i, j) && dropout_keeps(a.params.dropout, b, head, i, j);
            const float expected = kept ? a.params.dropout.rescale / static_cast<float>(visible) : 0;
            const float actual = a.output_row(0, q_start[b] + i, head)[j];
            wrong += kept ? std::abs(actual - expected) > 1e-5f * expected : actual != 0;
            kept_pairs += kept;
          }
          const float lse = a.lse[head * 113 + q_start[b] + i];
          wrong += std::abs(lse - std::log(static_cast<float>(visible))) > 1e-5f;
        }
      }
    }
    CHECK(wrong == 0);
    CHECK(kept_pairs > 10'000);
  });
}

TEST_CASE("dropout of nothing changes nothing, and of everything leaves 0") {
  on_every_isa([](const codegen::Arch& arch) {
    Random random(test::test_seed());
    Attention a({.head_dim = 24, .head_dim_v = 24}, {1, 1, 2, 70, 90}, random);
    a.run(arch);
    const Floats output = a.output, lse = a.lse;
    a.drop(0);
    a.run(arch);
    CHECK(a.output == output);
    CHECK(a.lse == lse);
    a.drop(1);
    a.run(arch);
    CHECK(a.output == Floats(output.size(), 0.0f));
    CHECK(a.lse == lse);
  });
}

TEST_CASE("a sequence among others is computed as it would be alone, bit for bit") {
  const Table q_start{3, 60, 60, 161, 180}, k_start{0, 40, 90, 260, 260};
  constexpr int kLenQ = 190, kLenK = 270, kHeads = 2, kDim = 21;
  on_every_isa([&](const codegen::Arch& arch) {
    Random random(test::test_seed());
    Attention all({.head_dim = kDim, .head_dim_v = kDim, .blocks = Blocks::varlen, .bias = Bias::f32},
                  {1, 1, kHeads, kLenQ, kLenK}, random);
    all.params.sequences = {.count = 4, .q_start = q_start.data(), .k_start = k_start.data()};
    all.see(Anchor::bottom_right, -1, 5);
    all.drop(0.25);
    const Floats bias = random_floats(kHeads * kLenQ * kLenK, random);
    all.params.bias = bias.data();
    all.params.bias_strides = {.head = kLenQ * kLenK, .query = kLenK, .key = 1};
    all.run(arch);

    for (int b = 0; b < 4; ++b) {
      CAPTURE(b);
      const int len_q = q_start[b + 1] - q_start[b], len_k = k_start[b + 1] - k_start[b];
      if (len_q == 0) continue;
      // Dropout counts batch entries as it counts sequences: the last of b + 1 equal ones.
      Attention alone({.head_dim = kDim, .head_dim_v = kDim, .bias = Bias::f32},
                      {b + 1, 1, kHeads, len_q, len_k}, random);
      alone.see(Anchor::bottom_right, -1, 5);
      alone.drop(0.25);
      for (int e = 0; e <= b; ++e) {
        const auto copy = [&](const Floats& from, Floats& to, int rows, int first) {
          std::copy_n(from.begin() + first * kHeads * kDim, rows * kHeads * kDim,
                      to.begin() + e * rows * kHeads * kDim);
        };
        copy(all.query, alone.query, len_q, q_start[b]);
        copy(all.key, alone.key, len_k, k_start[b]);
        copy(all.value, alone.value, len_k, k_start[b]);
      }
      alone.params.bias = bias.data() + q_start[b] * kLenK + k_start[b];
      alone.params.bias_strides = all.params.bias_strides;
      alone.run(arch);
      CHECK(std::equal(alone.output.end() - len_q * kHeads * kDim, alone.output.end(),
                       all.output.begin() + q_start[b] * kHeads * kDim));
      for (int head = 0; head < kHeads; ++head) {
        CHECK(std::equal(alone.lse.end() - (kHeads - head) * len_q,
                         alone.lse.end() - (kHeads - head - 1) * len_q,
                         all.lse.begin() + head * kLenQ + q_start[b]));
      }
    }
    // Rows of no sequence are not written.
    CHECK(std::all_of(all.output.begin(), all.output.begin() + 3 * kHeads * kDim,
                      [](float x) { return x == kUntouched; }));
    CHECK(std::all_of(all.output.end() - 10 * kHeads * kDim, all.output.end(),
                      [](float x) { return x == kUntouched; }));
  });
}

TEST_CASE("a query's result does not depend on the queries beside it, bit for bit") {
  constexpr int kDim = 8, kLenQ = 120, kLenK = 300;
  on_every_isa([](const codegen::Arch& arch) {
    Random random(test::test_seed());
    const Problem problem{.head_dim = kDim, .head_dim_v = kDim};
    const auto last_queries = [&](const Attention& from, int len_q) {
      Attention a(problem, {1, 1, 1, len_q, kLenK}, random);
      a.see(Anchor::bottom_right, 140, 0);
      a.query.assign(from.query.end() - len_q * kDim, from.query.end());
      a.key = from.key;
      a.value = from.value;
      a.run(arch);
      return a;
    };
    Attention all(problem, {1, 1, 1, kLenQ, kLenK}, random);
    // Scores rise with the key: wherever a block of keys ended, the maximum would move and be rounded anew.
    std::ranges::fill(all.query, 1.0f);
    for (int j = 0; j < kLenK; ++j) {
      for (int c = 0; c < kDim; ++c) all.key[j * kDim + c] = 0.01f * static_cast<float>(j) + 0.001f * c;
    }
    all = last_queries(all, kLenQ);
    for (const int len_q : {119, 103, 71, 40, 1}) {
      CAPTURE(len_q);
      const Attention some = last_queries(all, len_q);
      CHECK(std::equal(some.output.begin(), some.output.end(), all.output.end() - len_q * kDim));
      CHECK(std::equal(some.lse.begin(), some.lse.end(), all.lse.end() - len_q));
    }
  });
}

TEST_CASE("pages hold what neighbouring rows hold, bit for bit, and nobody sees the rest") {
  constexpr int kDim = 33, kPage = 5, kPages = 60, kWidth = 25, kLenQ = 120, kGap = 7;
  const Table q_start{0, 50, 51, 120}, k_len{97, 12, 80}, k_start{0, 97 + kGap, 97 + 12 + 2 * kGap};
  const Table first_key{3, 0, 11};  // of each sequence's row of the table
  constexpr int kGappyRows = 97 + 12 + 80 + 3 * kGap;
  on_every_isa([&](const codegen::Arch& arch) {
    Random random(test::test_seed());
    const Problem problem{
        .head_dim = kDim, .head_dim_v = kDim, .blocks = Blocks::varlen, .bias = Bias::boolean};
    Attention gappy(problem, {1, 1, 1, kLenQ, kGappyRows}, random);
    Attention paged(problem, {1, 1, 1, kLenQ, kPages * kPage}, random);
    paged.problem.keys = Keys::paged;
    paged.query = gappy.query;
    for (Attention* a : {&gappy, &paged}) {
      a->see(Anchor::bottom_right, 40, 0);
      a->drop(0.1);
    }
    Table pages(3 * kWidth);
    std::vector<int> free_pages(kPages);
    for (int i = 0; i < kPages; ++i) free_pages[i] = i;
    random.shuffle(free_pages);
    for (int& page : pages) page = 1 << 30;  // past the end: only where no key lies
    gappy.params.sequences = {
        .count = 3, .q_start = q_start.data(), .k_start = k_start.data(), .k_len = k_len.data()};
    paged.params.sequences = {.count = 3,
                              .q_start = q_start.data(),
                              .k_start = first_key.data(),
                              .k_len = k_len.data(),
                              .pages = pages.data(),
                              .table_width = kWidth,
                              .page_size = make_divider(kPage)};

    std::vector<std::uint8_t> gappy_bias(kLenQ * kGappyRows, 1), paged_bias(kLenQ * kPages * kPage, 1);
    Floats key(gappy.key.size(), kNan), value(key);
    std::ranges::fill(paged.key, kNan);
    std::ranges::fill(paged.value, kNan);
    for (int b = 0; b < 3; ++b) {
      for (int t = 0; t < k_len[b]; ++t) {
        const int logical = first_key[b] + t, from = k_start[b] + t;
        int& page = pages[b * kWidth + logical / kPage];
        if (page == 1 << 30) {
          page = free_pages.back();
          free_pages.pop_back();
        }
        const int to = page * kPage + logical % kPage;
        std::copy_n(gappy.key.begin() + from * kDim, kDim, key.begin() + from * kDim);
        std::copy_n(gappy.key.begin() + from * kDim, kDim, paged.key.begin() + to * kDim);
        std::copy_n(gappy.value.begin() + from * kDim, kDim, value.begin() + from * kDim);
        std::copy_n(gappy.value.begin() + from * kDim, kDim, paged.value.begin() + to * kDim);
        for (int i = 0; i < kLenQ; ++i) {
          gappy_bias[i * kGappyRows + from] = paged_bias[i * kPages * kPage + to] = random.chance(0.9);
        }
      }
    }
    gappy.key = key;
    gappy.value = value;
    gappy.params.bias = gappy_bias.data();
    gappy.params.bias_strides = {.query = kGappyRows, .key = 1};
    paged.params.bias = paged_bias.data();
    paged.params.bias_strides = {.query = kPages * kPage, .key = 1};
    gappy.run(arch);
    paged.run(arch);
    CHECK(paged.output == gappy.output);  // holds no NaN: those are not equal to themselves
    CHECK(paged.lse == gappy.lse);
  });
}

TEST_CASE("a bias of any type and any strides is added") {
  constexpr int kHeads = 2, kLenQ = 61, kLenK = 77;
  on_every_isa([](const codegen::Arch& arch) {
    Random random(test::test_seed());
    const Floats numbers = random_floats(kHeads * kLenQ * kLenK, random);
    for (const Bias kind : {Bias::f32, Bias::f16, Bias::bf16, Bias::boolean}) {
      CAPTURE(codegen::name_of(kind));
      Attention a({.head_dim = 16, .head_dim_v = 16, .bias = kind}, {1, kHeads, 1, kLenQ, kLenK}, random);
      a.see(Anchor::top_left, -1, 30);
      // The element (head, query, key) of a bias with these strides, as this type has it. Row 5 hides all.
      const auto number = [&](int head, int i, int j) {
        return i == 5 ? -kInf : numbers[(head * kLenQ + i) * kLenK + j];
      };
      const auto check = [&](BiasStrides strides) {
        const auto offset = [&](int head, int i, int j) {
          return head * strides.group + i * strides.query + j * strides.key;
        };
        const std::int64_t count = offset(kHeads - 1, kLenQ - 1, kLenK - 1) + 1;
        Floats rounded(count);
        std::vector<std::byte> bytes(count * size_of(kind));
        for (int head = 0; head < kHeads; ++head) {
          for (int i = 0; i < kLenQ; ++i) {
            for (int j = 0; j < kLenK; ++j) {
              const std::int64_t at = offset(head, i, j);
              const float x = number(head, i, j);
              const std::uint16_t f16 = float_to_f16(x), bf16 = float_to_bf16(x);
              const std::uint8_t seen = x > -0.5f ? 2 : 0;
              const void* element = kind == Bias::f32    ? static_cast<const void*>(&x)
                                    : kind == Bias::f16  ? &f16
                                    : kind == Bias::bf16 ? &bf16
                                                         : static_cast<const void*>(&seen);
              std::memcpy(bytes.data() + at * size_of(kind), element, size_of(kind));
              rounded[at] = kind == Bias::f32    ? x
                            : kind == Bias::f16  ? f16_to_float(f16)
                            : kind == Bias::bf16 ? bf16_to_float(bf16)
                            : seen != 0          ? 0.0f
                                                 : -kInf;
            }
          }
        }
        a.params.bias = bytes.data();
        a.params.bias_strides = strides;
        a.run(arch);
        CHECK(worst_error(a, [&](int head, int i, int j) { return rounded[offset(head, i, j)]; }) < 1e-5);
        return a.output;
      };
      const Floats by_rows = check({.group = kLenQ * kLenK, .query = kLenK, .key = 1});
      CHECK(check({.group = kLenQ * kLenK, .query = 1, .key = kLenQ}) == by_rows);
      CHECK(check({.group = kLenQ * kLenK * 3, .query = kLenK * 3, .key = 3}) == by_rows);
      check({.group = kLenK, .query = 0, .key = 1});
      check({.group = 0, .query = kLenK, .key = 1});
      check({.group = kLenQ, .query = 1, .key = 0});
    }
  });
}

TEST_CASE("nothing past the end of a tensor is read") {  // or this program ends here
  constexpr int kLenQ = 61, kLenK = 77, kDim = 21, kPage = 7;
  const Table q_start{0, kLenQ}, k_start{0, kLenK}, pages{10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0};
  on_every_isa([&](const codegen::Arch& arch) {
    Random random(test::test_seed());
    const Floats bias = random_floats(kLenQ * kLenK, random);
    const AtTheEnd bias_at_end(bias.data(), bias.size() * sizeof(float));
    const AtTheEnd pages_at_end(pages.data(), pages.size() * sizeof(int));
    for (const Keys keys : {Keys::contiguous, Keys::paged}) {
      CAPTURE(codegen::name_of(keys));
      Attention a({.head_dim = kDim, .head_dim_v = 5, .blocks = Blocks::varlen, .keys = keys},
                  {1, 1, 1, kLenQ, kLenK}, random);
      a.problem.bias = Bias::f32;
      a.params.sequences = {.count = 1,
                            .q_start = q_start.data(),
                            .k_start = k_start.data(),
                            .pages = static_cast<const int*>(pages_at_end.data()),
                            .table_width = kLenK / kPage,
                            .page_size = make_divider(kPage)};
      for (const BiasStrides strides : {BiasStrides{.query = kLenK, .key = 1}, {.query = 1, .key = kLenQ}}) {
        a.params.bias_strides = strides;
        a.params.bias = bias.data();
        a.run(arch);
        const Floats output = a.output;

        const AtTheEnd query(a.query.data(), a.query.size() * sizeof(float));
        const AtTheEnd key(a.key.data(), a.key.size() * sizeof(float));
        const AtTheEnd value(a.value.data(), a.value.size() * sizeof(float));
        a.params.query = query.data();
        a.params.key = key.data();
        a.params.value = value.data();
        a.params.bias = bias_at_end.data();
        a.launch(arch);
        CHECK(a.output == output);
      }
    }
  });
}

TEST_CASE("groups of heads share keys, and the output has a type of its own") {
  on_every_isa([](const codegen::Arch& arch) {
    Random random(test::test_seed());
    Attention a({.head_dim = 40, .head_dim_v = 24}, {2, 2, 3, 55, 66}, random);
    a.params.key_strides = {.batch = 2 * 66 * 40, .seq = 2 * 40, .group = 40, .head = 0};
    a.params.value_strides = {.batch = 2 * 66 * 24, .seq = 2 * 24, .group = 24, .head = 0};
    a.run(arch);
    CHECK(worst_error(a, [](int, int, int) { return 0; }) < 1e-5);

    const Floats wide = a.output;
    a.problem.output_dtype = DType::bf16;
    a.run(arch);
    const auto* narrow = reinterpret_cast<const std::uint16_t*>(a.output.data());
    int wrong = 0;
    for (std::size_t i = 0; i < wide.size(); ++i) wrong += narrow[i] != float_to_bf16(wide[i]);
    CHECK(wrong == 0);
  });
}

TEST_CASE("chunks are merged by their lse; those that saw no key are not read") {
  constexpr int kChunks = 19, kLen = 37, kHeads = 3, kDim = 41, kRows = 2 * kLen * kHeads;
  on_every_isa([](const codegen::Arch& arch) {
    Random random(test::test_seed());
    Problem problem{.operation = Operation::merge, .head_dim_v = kDim, .lse = Lse::write};
    std::vector<Floats> outputs, lses;
    MergeParams p;
    p.batch = 2;
    p.len = kLen;
    p.groups = 1;
    p.heads = kHeads;
    p.chunks = kChunks;
    p.output_strides = dense(kLen, 1, kHeads, kDim);
    for (int n = 0; n < kChunks; ++n) {
      outputs.push_back(random_floats(kRows * kDim, random));
      lses.push_back(random_floats(kRows, random));
      // Large ones and negative ones: only differences count.
      for (int i = 0; i < kRows; ++i) lses.back()[i] = 30 * lses.back()[i] + (i % 2 == 0 ? 1000 : -100);
      p.chunk[n].output_strides = p.output_strides;
      p.chunk[n].lse_strides = {.batch = kLen * kHeads, .seq = 1, .head = kLen};
    }
    // Queries 0: no chunk saw a key. 1: only the last. 2: every other chunk.
    for (int row = 0; row < kRows; ++row) {
      const MergeRow at = merge_row(p, row);
      for (int n = 0; n < kChunks; ++n) {
        if (at.query > 2 || (at.query == 1 && n == kChunks - 1) || (at.query == 2 && n % 2 == 0)) continue;
        lses[n][offset_of(at, p.chunk[n].lse_strides)] = -kInf;
        std::fill_n(outputs[n].begin() + offset_of(at, p.output_strides), kDim, kNan);
      }
    }
    for (int n = 0; n < kChunks; ++n) {
      p.chunk[n].output = outputs[n].data();
      p.chunk[n].lse = lses[n].data();
    }
    Floats output(kRows * kDim, kUntouched), lse(kRows, kUntouched);
    p.output = output.data();
    p.lse = lse.data();
    REQUIRE(kernel_of(problem, arch).merge(p, nullptr).ok());

    double worst = 0;
    int wrong = 0;
    for (int row = 0; row < kRows; ++row) {
      const MergeRow at = merge_row(p, row);
      const i64 first = offset_of(at, p.output_strides);
      const auto lse_of = [&](int n) { return double{lses[n][offset_of(at, p.chunk[n].lse_strides)]}; };
      double largest = -kInf, sum = 0;
      for (int n = 0; n < kChunks; ++n) largest = std::max(largest, lse_of(n));
      for (int n = 0; n < kChunks; ++n) sum += largest == -kInf ? 0 : std::exp(lse_of(n) - largest);
      const float merged_lse = lse[lse_offset(p, at)];
      if (at.query == 0) {
        wrong += merged_lse != -kInf;
      } else {
        worst = std::max(worst, std::abs(merged_lse - largest - std::log(sum)) / 1000);
      }
      for (int c = 0; c < kDim; ++c) {
        double expected = 0;
        for (int n = 0; n < kChunks; ++n) {
          if (lse_of(n) != -kInf) expected += std::exp(lse_of(n) - largest) / sum * outputs[n][first + c];
        }
        worst = std::max(worst, std::abs(output[first + c] - expected));
        if (at.query == 0) wrong += output[first + c] != 0;
        if (at.query == 1) wrong += output[first + c] != outputs[kChunks - 1][first + c];
      }
    }
    CHECK(worst < 1e-5);
    CHECK(wrong == 0);

    problem.output_dtype = DType::f16;
    std::vector<std::uint16_t> halves(kRows * kDim);
    p.output = halves.data();
    REQUIRE(kernel_of(problem, arch).merge(p, nullptr).ok());
    for (std::size_t i = 0; i < halves.size(); ++i) wrong += halves[i] != float_to_f16(output[i]);
    CHECK(wrong == 0);
  });
}

TEST_CASE("a merge gives its chunks their gradients; nothing is read where no key was seen") {
  constexpr int kChunks = kMaxGradChunks, kLen = 13, kHeads = 3, kDim = 41, kRows = 2 * kLen * kHeads;
  on_every_isa([](const codegen::Arch& arch) {
    Random random(test::test_seed());
    GradMergeParams p;
    p.batch = 2;
    p.len = kLen;
    p.groups = 1;
    p.heads = kHeads;
    p.chunks = kChunks;
    const Strides rows = dense(kLen, 1, kHeads, kDim);
    const Strides numbers{.batch = kLen * kHeads, .seq = 1, .head = kLen};
    p.output_strides = rows;
    p.grad_output_strides = {.batch = 1, .seq = 2, .head = 2 * kLen};  // its columns come first
    p.grad_output_column = 2 * kLen * kHeads;
    p.lse_strides = p.grad_lse_strides = numbers;

    // Queries 0: no chunk saw a key. 1: only the last. Others: all but every fifth chunk.
    const auto saw = [&](const MergeRow& at, int n) {
      return at.query > 1 ? n % 5 != 2 : at.query == 1 && n == kChunks - 1;
    };
    std::vector<Floats> outputs, lses, grads, grad_lses;
    Floats output(kRows * kDim), grad_output = random_floats(kRows * kDim, random);
    Floats lse(kRows), grad_lse = random_floats(kRows, random);
    for (int n = 0; n < kChunks; ++n) {
      outputs.push_back(random_floats(kRows * kDim, random));
      lses.push_back(random_floats(kRows, random));
      grads.push_back(Floats(kRows * kDim, kUntouched));
      grad_lses.push_back(Floats(kRows, kUntouched));
      p.chunk[n] = {
          {outputs[n].data(), lses[n].data(), rows, numbers}, grads[n].data(), grad_lses[n].data(), rows};
    }
    for (int row = 0; row < kRows; ++row) {
      const MergeRow at = merge_row(p, row);
      const i64 number = offset_of(at, numbers), first = offset_of(at, rows);
      double sum = 0;
      for (int n = 0; n < kChunks; ++n) {
        if (saw(at, n)) {
          sum += std::exp(double{lses[n][number]});
        } else {
          lses[n][number] = -kInf;
          std::fill_n(outputs[n].begin() + first, kDim, kNan);
        }
      }
      lse[number] = static_cast<float>(std::log(sum));
      for (int c = 0; c < kDim; ++c) {
        double weighted = 0;
        for (int n = 0; n < kChunks; ++n) {
          if (saw(at, n)) weighted += std::exp(double{lses[n][number]}) / sum * outputs[n][first + c];
        }
        output[first + c] = at.query == 0 ? kNan : static_cast<float>(weighted);
        if (at.query == 0)
          grad_output[offset_of(at, p.grad_output_strides) + c * p.grad_output_column] = kNan;
      }
    }
    p.output = output.data();
    p.grad_output = grad_output.data();
    p.lse = lse.data();
    p.grad_lse = grad_lse.data();
    Problem problem{.operation = Operation::grad_merge, .head_dim_v = kDim};
    REQUIRE(kernel_of(problem, arch).grad_merge(p, nullptr).ok());

    double worst = 0;
    int wrong = 0;
    for (int row = 0; row < kRows; ++row) {
      const MergeRow at = merge_row(p, row);
      const i64 number = offset_of(at, numbers), first = offset_of(at, rows);
      const float* grad = grad_output.data() + offset_of(at, p.grad_output_strides);
      for (int n = 0; n < kChunks; ++n) {
        const double weight = saw(at, n) ? std::exp(double{lses[n][number]} - lse[number]) : 0;
        double product = grad_lse[number];
        for (int c = 0; c < kDim; ++c) {
          const double one = weight == 0 ? 0 : grad[c * p.grad_output_column];
          wrong += weight == 0 && grads[n][first + c] != 0;
          worst = std::max(worst, std::abs(grads[n][first + c] - weight * one));
          if (weight != 0) product += (double{outputs[n][first + c]} - output[first + c]) * one;
        }
        wrong += weight == 0 && grad_lses[n][number] != 0;
        worst = std::max(worst, std::abs(grad_lses[n][number] - weight * product));
      }
    }
    CHECK(worst < 1e-5);
    CHECK(wrong == 0);

    // Without a gradient of the lse, and rounded.
    problem.dtype = DType::bf16;
    p.chunks = 1;
    std::vector<std::uint16_t> halves(kRows * kDim), chunk(kRows * kDim);
    for (std::size_t i = 0; i < chunk.size(); ++i) chunk[i] = float_to_bf16(outputs[0][i]);
    p.chunk[0].chunk.output = chunk.data();
    p.chunk[0].grad_output = halves.data();
    p.grad_lse = nullptr;
    Floats without(kRows);
    p.chunk[0].grad_lse = without.data();
    REQUIRE(kernel_of(problem, arch).grad_merge(p, nullptr).ok());
    for (std::size_t i = 0; i < halves.size(); ++i) wrong += halves[i] != float_to_bf16(grads[0][i]);
    CHECK(wrong == 0);
    for (int row = 0; row < kRows; ++row) {
      const i64 number = offset_of(merge_row(p, row), numbers);
      const double weight = std::exp(double{lses[0][number]} - lse[number]);
      const double expected = grad_lses[0][number] - (weight > 0 ? weight * grad_lse[number] : 0);
      CHECK(without[number] == doctest::Approx(expected).epsilon(0.02).scale(1));
    }
  });
}
