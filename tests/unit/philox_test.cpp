// Dropout's random numbers: Philox against the vectors that its authors published, and which pairs are
// dropped against what p promises. Seeds are fixed, so a statistical test either always passes or never; each
// bound is the two-sided 1e-6 point of what it tests, so a right generator fails one of them once in a
// million changes.
#include "attune/philox.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

using namespace attune::kernel;

namespace {

constexpr double kOneInAMillion = 4.892;  // standard deviations of a normal distribution, both sides
constexpr double kProbabilities[] = {1.0 / 65536, 0.001, 0.1, 0.3, 0.5, 0.9, 0.999, 65535.0 / 65536};

Philox<u32> philox(std::array<u32, 4> counter, u32 key0, u32 key1) {
  return philox4x32_10<u32>({{counter[0], counter[1], counter[2], counter[3]}}, key0, key1);
}

bool equal(const Philox<u32>& drawn, std::array<u32, 4> expected) {
  return std::equal(expected.begin(), expected.end(), drawn.word);
}

/// Is the count of n trials of this probability within the bound?
bool plausible(double count, double n, double probability) {
  const double deviation = std::sqrt(n * probability * (1 - probability));
  return std::abs(count - n * probability) <= kOneInAMillion * deviation + 1;  // 1: counts are whole
}

double dropped_of(const DropoutParams& p) {
  return p.threshold / 65536.0;
}

}  // namespace

TEST_CASE("Philox 4x32-10 equals the known answers of Random123") {
  CHECK(equal(philox({0, 0, 0, 0}, 0, 0), {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr u32 kOnes = 0xffffffff;
  CHECK(equal(philox({kOnes, kOnes, kOnes, kOnes}, kOnes, kOnes),
              {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK(equal(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0xa4093822, 0x299f31d0),
              {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST_CASE("the keys of a group share four calls, and no two of them the same bits") {
  std::set<std::array<int, 3>> places;
  for (int j = 0; j < kDropoutGroup; ++j) {
    CHECK(dropout_call(j) / 4 == 0);
    places.insert({dropout_call(j), dropout_word(j), j % 2});
    CHECK(dropout_call(5 * kDropoutGroup + j) == 5 * 4 + dropout_call(j));
    CHECK(dropout_word(5 * kDropoutGroup + j) == dropout_word(j));
  }
  CHECK(places.size() == kDropoutGroup);
}

TEST_CASE("the first pairs of a seed stay what they are") {
  const DropoutParams half = make_dropout(0.5, 42, 7);
  std::string kept;
  for (int j = 0; j < 64; ++j) kept += dropout_keeps(half, 1, 2, 3, j) ? '#' : '.';
  CHECK(kept == "...###.##...##...#.#######...###....#.........#####.####..###..#");
}

TEST_CASE("p is rounded to a multiple of 2^-16, and only 0 and 1 are certain") {
  CHECK(make_dropout(0.0, 1, 2).threshold == 0);
  CHECK(make_dropout(0.0, 1, 2).rescale == 1);
  CHECK(make_dropout(1.0, 1, 2).threshold == 65536);
  CHECK(make_dropout(1.0, 1, 2).rescale == 0);
  CHECK(make_dropout(0.5, 1, 2).threshold == 32768);
  CHECK(make_dropout(0.5, 1, 2).rescale == 2);
  CHECK(make_dropout(0.1, 1, 2).threshold == 6554);
  CHECK(make_dropout(1 - 1e-9, 1, 2).threshold == 65535);
  CHECK(make_dropout(0x1p-18, 1, 2).threshold == 0);
  for (const double p : kProbabilities) CHECK(std::abs(dropped_of(make_dropout(p, 1, 2)) - p) <= 0x1p-17);

  const DropoutParams all = make_dropout(1.0, 1, 2), none = make_dropout(0.0, 1, 2);
  for (int j = 0; j < 1000; ++j) {
    REQUIRE_FALSE(dropout_keeps(all, 0, 0, 0, j));
    REQUIRE(dropout_keeps(none, 0, 0, 0, j));
  }
}

TEST_CASE("what is made ready for a launch draws the same bits and tells them apart alike") {
  for (const double probability : {0.0, 0.001, 0.1, 0.5, 0.5 + 0x1p-16, 0.9, 65535.0 / 65536, 1.0}) {
    const DropoutParams p = make_dropout(probability, 42, 7);
    const ReadyDropout r = ready(p);
    for (int call = 0; call < 100; ++call) {
      const Philox<u32> expected = dropout_bits<u32>(p, 1, 2, 3, call),
                        drawn = dropout_bits<u32>(r, 1, 2, 3, call);
      REQUIRE(std::equal(expected.word, expected.word + 4, drawn.word));
    }
    const DropBounds b = r.bounds;
    REQUIRE(b.bound == b.bound % 0x10000u * 0x10001u);
    REQUIRE(b.negative_bound == b.negative_bound % 0x10000u * 0x10001u);
    for (u32 x = 0; x < 0x10000u; ++x) {  // as cuda/dropout.cuh does it, one half at a time
      const u32 least = std::min((x ^ b.flip) % 0x10000u, b.bound % 0x10000u);
      const bool below = static_cast<std::int16_t>(least + b.negative_bound) < 0;
      REQUIRE((below == (b.flip != 0)) == kept(p, x, 0));
    }
  }
}

TEST_CASE("a larger p drops the same pairs and more") {
  for (int j = 0; j < 10'000; ++j) {
    bool kept = true;
    for (const double p : kProbabilities) {
      const bool still = dropout_keeps(make_dropout(p, 3, 4), 0, 1, 2, j);
      REQUIRE(static_cast<int>(still) <= static_cast<int>(kept));
      kept = still;
    }
  }
}

TEST_CASE("as many pairs are dropped as p says, p-value 1e-6") {
  for (const double p : kProbabilities) {
    CAPTURE(p);
    const DropoutParams params = make_dropout(p, 20260101, 5);
    double dropped = 0;
    for (int i = 0; i < 1024; ++i) {
      for (int j = 0; j < 1024; ++j) dropped += !dropout_keeps(params, 0, 0, i, j);
    }
    CHECK(plausible(dropped, 1024.0 * 1024, dropped_of(params)));
  }
}

TEST_CASE("no key, query, head or block is dropped more than others, chi-square p-value 1e-6") {
  const DropoutParams params = make_dropout(0.3, 99, 0);
  constexpr int kBlocks = 4, kHeads = 8, kQueries = 64, kKeys = 256;
  std::vector<std::vector<double>> dropped{std::vector<double>(kBlocks), std::vector<double>(kHeads),
                                           std::vector<double>(kQueries), std::vector<double>(kKeys)};
  for (int b = 0; b < kBlocks; ++b) {
    for (int h = 0; h < kHeads; ++h) {
      for (int i = 0; i < kQueries; ++i) {
        for (int j = 0; j < kKeys; ++j) {
          if (dropout_keeps(params, b, h, i, j)) continue;
          ++dropped[0][b];
          ++dropped[1][h];
          ++dropped[2][i];
          ++dropped[3][j];
        }
      }
    }
  }
  constexpr double kPairs = double{kBlocks} * kHeads * kQueries * kKeys;
  const double p = dropped_of(params);
  for (const std::vector<double>& axis : dropped) {
    const auto cells = static_cast<double>(axis.size());
    CAPTURE(cells);
    double chi_square = 0;
    for (const double count : axis) {
      const double expected = kPairs / cells * p;
      chi_square += (count - expected) * (count - expected) / (expected * (1 - p));
    }
    // Wilson and Hilferty: the cube root of chi-square over its degrees is nearly normal.
    const double spread = 2 / (9 * cells);
    const double normal = (std::cbrt(chi_square / cells) - (1 - spread)) / std::sqrt(spread);
    CHECK(std::abs(normal) <= kOneInAMillion);
  }
}

TEST_CASE("pairs are dropped independently of their neighbours on every axis, p-value 1e-6") {
  struct Step {
    const char* name;
    int block, head, query, key;
    u64 seed, offset;
  };
  constexpr Step kSteps[] = {
      {"next key", 0, 0, 0, 1, 0, 0},
      {"other half", 0, 0, 0, 2, 0, 0},
      {"other word", 0, 0, 0, 8, 0, 0},
      {"next group", 0, 0, 0, 32, 0, 0},
      {"next query", 0, 0, 1, 0, 0, 0},
      {"far query", 0, 0, 1 << 20, 0, 0, 0},
      {"next head", 0, 1, 0, 0, 0, 0},
      {"next block", 1, 0, 0, 0, 0, 0},
      {"next seed", 0, 0, 0, 0, 1, 0},
      {"next offset", 0, 0, 0, 0, 0, 1},
      {"far offset", 0, 0, 0, 0, 0, 1ull << 32},
      {"far seed", 0, 0, 0, 0, 1ull << 32, 0},
      {"transposed", 0, 0, 1, -1, 0, 0},
  };
  for (const double p : {0.1, 0.5}) {
    const DropoutParams params = make_dropout(p, 7, 0);
    for (const Step& step : kSteps) {
      CAPTURE(step.name);
      const DropoutParams other = make_dropout(p, 7 + step.seed, step.offset);
      double both = 0;
      constexpr int kSide = 512;
      for (int i = 0; i < kSide; ++i) {
        for (int j = 1; j <= kSide; ++j) {
          both += !dropout_keeps(params, 0, 0, i, j) &&
                  !dropout_keeps(other, step.block, step.head, i + step.query, j + step.key);
        }
      }
      const double dropped = dropped_of(params);
      CHECK(plausible(both, double{kSide} * kSide, dropped * dropped));
    }
  }
}
