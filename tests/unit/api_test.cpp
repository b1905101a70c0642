// The C++ API on the CPU: what each function returns, in which type and shape, and what a hot call costs.
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#define DOCTEST_CONFIG_IMPLEMENT
#include "attune/attune.h"
#include "tests/unit/allocations.h"
#include "tests/unit/api_tensors.h"

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

using namespace attune;
using namespace attune::test;

namespace {

/// [2, 4, 3, 16] queries over [2, 10, 3, 16] keys and values.
struct Inputs {
  std::vector<float> q = numbers(2 * 4 * 3 * 16, 1);
  std::vector<float> k = numbers(2 * 10 * 3 * 16, 2);
  std::vector<float> v = numbers(2 * 10 * 3 * 16, 3);
  TensorView query{q.data(), DType::f32, {2, 4, 3, 16}};
  TensorView key = rows(k, 0, 10);
  TensorView value = rows(v, 0, 10);

  /// The key or value rows [begin, end).
  static TensorView rows(const std::vector<float>& memory, std::int64_t begin, std::int64_t end) {
    TensorView view(memory.data() + begin * 48, DType::f32, {2, end - begin, 3, 16});
    view.strides[0] = std::int64_t{10} * 48;
    return view;
  }
};

const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.data());
}

/// Are two tensors of `count` floats the same but for rounding? Infinities have to be equal.
void check_near(const Tensor& a, const Tensor& b, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    const float x = floats(a)[i];
    const float y = floats(b)[i];
    REQUIRE_MESSAGE((x == y || std::abs(x - y) < 1e-5f), i, ": ", x, " and ", y);
  }
}

template <typename Call>
std::string refusal(ErrorKind kind, Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    CHECK(error.kind() == kind);
    return error.what();
  }
  return "accepted";
}

using Shape = std::vector<std::int64_t>;

}  // namespace

TEST_CASE_FIXTURE(Inputs, "results have the query's shape and type unless options say otherwise") {
  const Attention both = memory_efficient_attention_forward_requires_grad(query, key, value);
  CHECK(shape_of(both.output) == Shape{2, 4, 3, 16});
  CHECK(shape_of(both.lse) == Shape{2, 3, 4});
  CHECK(both.output.view().dtype == DType::f32);
  const Tensor half = memory_efficient_attention(query, key, value, {}, {.output_dtype = DType::f16});
  CHECK(half.view().dtype == DType::f16);
  const Tensor alone = memory_efficient_attention(query, key, value);
  check_near(alone, both.output, q.size());
}

TEST_CASE_FIXTURE(Inputs, "groups have an lse with groups, one head an lse of one head") {
  const TensorView grouped(q.data(), DType::f32, {2, 4, 3, 2, 8});
  const TensorView shared(k.data(), DType::f32, {2, 10, 3, 1, 8});
  const Attention five = memory_efficient_attention_forward_requires_grad(grouped, shared, shared);
  CHECK(shape_of(five.output) == Shape{2, 4, 3, 2, 8});
  CHECK(shape_of(five.lse) == Shape{2, 3, 2, 4});
  // The same heads in 4-D: key heads serve neighbours.
  const Attention four = memory_efficient_attention_forward_requires_grad(
      {q.data(), DType::f32, {2, 4, 6, 8}}, {k.data(), DType::f32, {2, 10, 3, 8}},
      {k.data(), DType::f32, {2, 10, 3, 8}});
  CHECK(shape_of(four.lse) == Shape{2, 6, 4});
  check_near(five.output, four.output, q.size());
  check_near(five.lse, four.lse, 48);
  const Attention three = memory_efficient_attention_forward_requires_grad(
      {q.data(), DType::f32, {2, 4, 48}}, {k.data(), DType::f32, {2, 10, 48}},
      {v.data(), DType::f32, {2, 10, 48}});
  CHECK(shape_of(three.output) == Shape{2, 4, 48});
  CHECK(shape_of(three.lse) == Shape{2, 1, 4});
}

TEST_CASE_FIXTURE(Inputs, "partial attention over parts of the keys merges to the whole") {
  const Attention whole = memory_efficient_attention_forward_requires_grad(query, key, value);
  std::vector<Attention> parts;
  for (const auto& [begin, end] : {std::pair{0, 1}, {1, 7}, {7, 7}, {7, 10}}) {
    parts.push_back(memory_efficient_attention_partial(query, rows(k, begin, end), rows(v, begin, end)));
    CHECK(parts.back().output.view().dtype == DType::f32);
  }
  std::vector<TensorView> attn, lse;
  for (const Attention& part : parts) {
    attn.push_back(part.output.view());
    lse.push_back(part.lse.view());
  }
  const Attention merged = merge_attentions(attn, lse);
  check_near(merged.output, whole.output, q.size());
  check_near(merged.lse, whole.lse, 24);

  const Attention without_lse = merge_attentions(attn, lse, false, {.output_dtype = DType::bf16});
  CHECK(without_lse.output.view().dtype == DType::bf16);
  CHECK(without_lse.lse.data() == nullptr);
  CHECK(refusal(ErrorKind::invalid_argument, [&] { merge_attentions(attn, std::vector<TensorView>{}); }) ==
        "merge_attentions: 4 attention chunks and 0 lse chunks, expected equally many, at least one");
}

TEST_CASE_FIXTURE(Inputs, "partial attention takes 16-bit inputs to float32, and no dropout") {
  const std::vector<std::uint16_t> ones(2 * 10 * 3 * 16, 0x3c00);
  const TensorView half_query(ones.data(), DType::f16, {2, 4, 3, 16});
  const TensorView half_key(ones.data(), DType::f16, {2, 10, 3, 16});
  const Attention part = memory_efficient_attention_partial(half_query, half_key, half_key);
  CHECK(part.output.view().dtype == DType::f32);
  CHECK(floats(part.output)[7] == doctest::Approx(1));
  CHECK(floats(part.lse)[5] == doctest::Approx(4 + std::log(10.0)));
  CHECK(refusal(ErrorKind::unsupported, [&] {
          memory_efficient_attention_partial(query, key, value, {}, {.p = 0.5});
        }) == "memory_efficient_attention_partial: dropout is not supported. p is 0.5, expected 0");
}

TEST_CASE("more chunks than a kernel takes are merged in rounds, and stacked ones by their parts") {
  constexpr std::int64_t kChunks = 120;
  std::vector<float> attn = numbers(kChunks * 6, 5);  // [chunks, 1, 3, 1, 2]
  std::vector<float> lse = numbers(kChunks * 3, 6);   // [chunks, 1, 1, 3]
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (std::size_t i = 0; i < static_cast<std::size_t>(kChunks); i += 3) {  // chunks that saw no key, or NaN
    lse[i * 3 + 1] = -kInfinity;
    attn[i * 6 + 2] = std::numeric_limits<float>::quiet_NaN();
  }
  for (std::size_t i = 0; i < static_cast<std::size_t>(kChunks); ++i) lse[i * 3 + 2] = -kInfinity;

  const Attention merged = merge_attentions(TensorView(attn.data(), DType::f32, {kChunks, 1, 3, 1, 2}),
                                            TensorView(lse.data(), DType::f32, {kChunks, 1, 1, 3}));
  for (std::size_t row = 0; row < 2; ++row) {
    double sum = 0, weighted[2] = {};
    for (std::size_t i = 0; i < static_cast<std::size_t>(kChunks); ++i) {
      const double weight = std::exp(static_cast<double>(lse[i * 3 + row]));
      if (weight == 0) continue;
      sum += weight;
      for (std::size_t j = 0; j < 2; ++j) {
        weighted[j] += weight * static_cast<double>(attn[i * 6 + row * 2 + j]);
      }
    }
    for (std::size_t j = 0; j < 2; ++j) {
      CHECK(floats(merged.output)[row * 2 + j] == doctest::Approx(weighted[j] / sum).epsilon(1e-5));
    }
    CHECK(floats(merged.lse)[row] == doctest::Approx(std::log(sum)).epsilon(1e-5));
  }
  CHECK(floats(merged.output)[4] == 0);
  CHECK(floats(merged.lse)[2] == -kInfinity);

  CHECK(refusal(ErrorKind::invalid_argument, [&] {
          merge_attentions(TensorView(attn.data(), DType::f32, {6, 2}), TensorView());
        }).starts_with("merge_attentions: stacked attn has shape [6, 2], expected [chunks, ...]"));
}

TEST_CASE_FIXTURE(Inputs,
                  "reasons against a family: what is wrong with the call first, then the family's own") {
  CHECK(not_supported_reasons(Family::cpu, query, key, value).empty());
  CHECK(not_supported_reasons(Family::automatic, query, key, value).empty());
  CHECK(not_supported_reasons(Family::mma, query, key, value) ==
        std::vector<std::string>{"mma kernels do not run on cpu tensors"});
  CHECK(not_supported_reasons(Family::cpu, query, key, value, {}, {.p = 7}) ==
        std::vector<std::string>{"Invalid dropout probability: p=7, expected 0 to 1"});
  const auto forced = not_supported_reasons(Family::automatic, query, key, value, {},
                                            {.families = {Family::mma, Family::simt}});
  REQUIRE(forced.size() == 1);
  CHECK(forced[0].find("the call allows simt|mma alone") != std::string::npos);
  CHECK(refusal(ErrorKind::invalid_argument, [&] {
          not_supported_reasons(static_cast<Family>(50), query, key, value);
        }) == "unknown family 50");
}

TEST_CASE_FIXTURE(Inputs, "explain tells of every trait, and prepare loads the kernel that the call uses") {
  const AttentionOptions options{.p = 0.5, .output_dtype = DType::bf16};
  const auto mask = BlockDiagonalMask::from_seqlens({8}, {20});
  const TensorView packed_query(q.data(), DType::f32, {1, 8, 3, 16});
  const TensorView packed_key(k.data(), DType::f32, {1, 20, 3, 16});
  const auto explained = [&] {
    return nlohmann::json::parse(explain(packed_query, packed_key, packed_key, true, mask, options));
  };
  const auto object = explained();
  CHECK(object["problem"] == "dtype=f32 output_dtype=bf16 head_dim=16 blocks=varlen dropout=on lse=write");
  CHECK(object["spec"]["blocks"] == "varlen");
  CHECK(object["spec"]["dropout"] == "on");
  CHECK(object["spec"]["output_dtype"] == "bf16");
  prepare(packed_query, packed_key, packed_key, true, mask, options);
  CHECK(explained()["state"] == "loaded");
  const std::uint64_t loads = counters().loads;
  memory_efficient_attention_forward_requires_grad(packed_query, packed_key, packed_key, mask, options);
  CHECK(counters().loads == loads);
}

TEST_CASE_FIXTURE(Inputs, "the same dropout state drops the same pairs; a generator's states differ") {
  Generator generator(42);
  const DropoutState first = generator.next();
  const DropoutState second = generator.next();
  CHECK(first.seed == 42);
  CHECK(second.offset == first.offset + 1);
  generator.manual_seed(42);
  CHECK(generator.next().offset == first.offset);
  const auto sum_with = [&](DropoutState state) {
    const Tensor output = memory_efficient_attention(query, key, value, {}, {.p = 0.5, .dropout = state});
    double sum = 0;
    for (std::size_t i = 0; i < q.size(); ++i) sum += static_cast<double>(floats(output)[i]);
    return sum;
  };
  CHECK(sum_with(first) == sum_with(first));
  CHECK(sum_with(first) != sum_with(second));
}

TEST_CASE_FIXTURE(Inputs, "a hot call allocates nothing, with sequences or without") {
  std::vector<float> memory(q.size());
  const MutableTensorView output(memory.data(), DType::f32, {1, 8, 3, 16});
  const TensorView packed_query(q.data(), DType::f32, {1, 8, 3, 16});
  const TensorView packed_key(k.data(), DType::f32, {1, 20, 3, 16});
  const AttentionBias biases[] = {
      {}, LowerTriangularMask{}, BlockDiagonalMask::from_seqlens({3, 5}, {12, 8})};
  for (const AttentionBias& bias : biases) {
    const auto call = [&] {
      memory_efficient_attention_forward(packed_query, packed_key, packed_key, output, nullptr, bias);
    };
    call();
    const long before = test::allocations();
    call();
    CHECK(test::allocations() == before);
  }
}

int main(int argc, char** argv) {
#if !ATTUNE_HAVE_LLVM
  std::puts("[SKIP] built without LLVM: there is no compiler for CPU kernels");
  return 77;
#endif
  return doctest::Context(argc, argv).run();
}
