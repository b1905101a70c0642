#include "tests/support/cases.h"

#include "tools/parallel.h"
#include "tools/reference/judge.h"
#include "tools/reference/mask.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

namespace attune::test {
namespace {

constexpr int kMaxHeadDim = 256;
constexpr std::int64_t kMaxProducts = 2'000'000;  // of one case: what the float64 reference does in 2 ms
constexpr const char* kDTypeNames[] = {"f32", "f16", "bf16"};

/// 1 to 256, one from each of `count` equal strata, in random order.
std::vector<int> stratified_head_dims(Random& random, int count) {
  std::vector<int> dims(count);
  for (int i = 0; i < count; ++i) {
    const int first = i * kMaxHeadDim / count + 1;
    const int last = std::max(first, (i + 1) * kMaxHeadDim / count);
    dims[i] = random.integer(first, last);
  }
  random.shuffle(dims);
  return dims;
}

int random_length(Random& random) {
  const double kind = random.unit();
  if (kind < 0.04) return 0;
  if (kind < 0.12) return 1;
  if (kind < 0.55) return random.pick({16, 32, 48, 64, 96, 128}) + random.integer(-1, 1);
  return random.integer(2, 160);
}

/// A reach of a window: short, about as long as the sequence, or beyond every key.
std::int64_t random_reach(Random& random, int length) {
  const double kind = random.unit();
  if (kind < 0.5) return random.integer(0, 8);
  if (kind < 0.95) return random.integer(0, length + 8);
  return std::int64_t{1} << random.pick({31, 40, 62});
}

AttentionBias random_bias(Random& random, const KernelClass& wanted, int length) {
  if (wanted.window_left) {
    if (random.chance(0.5)) {
      return LowerTriangularFromBottomRightLocalAttentionMask{random_reach(random, length) + 1};
    }
    return LocalAttentionFromBottomRightMask{random_reach(random, length), random_reach(random, length)};
  }
  if (wanted.window_right) {
    if (random.chance(0.5)) return LowerTriangularMask{};
    return LowerTriangularFromBottomRightMask{};
  }
  return {};
}

std::optional<double> random_scale(Random& random) {
  const double kind = random.unit();
  if (kind < 0.6) return std::nullopt;
  if (kind < 0.8) return random.unit() * 0.5;
  if (kind < 0.95) return -random.unit() * 0.5;
  return 0.0;
}

/// Spread of the query's and the key's elements: mostly as after a normalisation, sometimes so wide that one
/// key takes all the weight.
double random_score_spread(Random& random) {
  return random.pick({1.0, 1.0, 1.0, 1.0, 0.01, 3.0});
}

double random_value_spread(Random& random, DType dtype) {
  const double large = dtype == DType::f16 ? 1e4 : 1e30;
  return random.pick({1.0, 1.0, 1.0, 1.0, 1e-2, large});
}

GuardedTensor random_tensor(Random& random, DType dtype, const std::vector<std::int64_t>& shape,
                            int align_bytes, double spread) {
  const int rank = static_cast<int>(shape.size());
  GuardedTensor tensor(dtype, shape, random_layout(random, dtype, rank, align_bytes, Access::read));
  // Cut at 6 standard deviations: 6e4 is finite in float16.
  tensor.fill([&] { return static_cast<float>(spread * std::clamp(random.normal(), -6.0, 6.0)); });
  return tensor;
}

/// A row without a key is exact: compare() would let a small number pass for 0.
std::string check_empty_rows(const AttentionCase& ran, const Values& reference,
                             const std::vector<double>& output) {
  const auto [batch, len_q, len_k, heads, head_dim, head_dim_v] = extents_of(ran.inputs());
  const double nothing = -std::numeric_limits<double>::infinity();
  for (std::size_t row = 0; row < reference.lse.size(); ++row) {
    if (reference.lse[row] != nothing) continue;
    const std::size_t i = row % len_q;
    const std::size_t h = row / len_q % heads;
    const std::size_t b = row / len_q / heads;
    const double* out = output.data() + ((b * len_q + i) * heads + h) * head_dim_v;
    if (std::any_of(out, out + head_dim_v, [](double x) { return x != 0; })) {
      return fmt::format("output: batch {}, query {}, head {} sees no key and is not 0", b, i, h);
    }
  }
  return "";
}

}  // namespace

std::vector<KernelClass> random_classes(Random& random, int count, std::span<const DType> dtypes) {
  const std::vector<int> head_dims = stratified_head_dims(random, count);
  const std::vector<int> head_dims_v = stratified_head_dims(random, count);
  std::vector<KernelClass> classes(count);
  for (int i = 0; i < count; ++i) {
    KernelClass& one = classes[i];
    one.dtype = dtypes[i % dtypes.size()];
    one.head_dim = head_dims[i];
    one.head_dim_v = random.chance(0.3) ? head_dims[i] : head_dims_v[i];
    one.window_right = random.chance(0.7);
    one.window_left = one.window_right && random.chance(0.5);
    one.lse = random.chance(0.5);
    one.align_bytes = random.pick({16, 16, 8, 4, one.dtype == DType::f32 ? 4 : 2});
  }
  return classes;
}

Inputs AttentionCase::inputs() const {
  return {query.view(), key.view(), value.view(), bias, scale};
}

bool AttentionCase::empty() const {
  const Extents e = extents_of(inputs());
  return e.batch == 0 || e.heads == 0 || e.len_q == 0;
}

AttentionCase random_case(Random& random, const KernelClass& wanted) {
  const int len_q = random_length(random);
  const int len_k = random_length(random);
  const std::int64_t products =
      std::max<std::int64_t>(1, std::int64_t{len_q} * len_k * (wanted.head_dim + wanted.head_dim_v));
  const bool has_heads = random.chance(0.9);
  const auto most = static_cast<int>(std::clamp<std::int64_t>(kMaxProducts / products, 1, 3));
  const int heads = has_heads ? random.integer(1, most) : 1;
  const int batch = random.chance(0.03) ? 0 : random.integer(1, std::max(1, most / heads));
  const auto shape = [&](int length, int dim) {
    return has_heads ? std::vector<std::int64_t>{batch, length, heads, dim}
                     : std::vector<std::int64_t>{batch, length, dim};
  };

  AttentionCase result;
  result.with_lse = wanted.lse;
  result.bias = random_bias(random, wanted, std::max(len_q, len_k));
  result.scale = random_scale(random);
  const double score_spread = random_score_spread(random);
  const double value_spread = random_value_spread(random, wanted.dtype);
  result.query =
      random_tensor(random, wanted.dtype, shape(len_q, wanted.head_dim), wanted.align_bytes, score_spread);
  result.key =
      random_tensor(random, wanted.dtype, shape(len_k, wanted.head_dim), wanted.align_bytes, score_spread);
  result.value =
      random_tensor(random, wanted.dtype, shape(len_k, wanted.head_dim_v), wanted.align_bytes, value_spread);
  const auto output_shape = shape(len_q, wanted.head_dim_v);
  const int rank = static_cast<int>(output_shape.size());
  result.output = GuardedTensor(wanted.dtype, output_shape,
                                random_layout(random, wanted.dtype, rank, wanted.align_bytes, Access::write));
  result.lse = GuardedTensor(DType::f32, {batch, heads, len_q}, Layout{});
  result.name =
      fmt::format("{} B{} Mq{} Mkv{} H{}{} K{} Kv{} {} scale {} align {} spreads {} {}{}",
                  kDTypeNames[static_cast<int>(wanted.dtype)], batch, len_q, len_k, heads,
                  has_heads ? "" : " (BMK)", wanted.head_dim, wanted.head_dim_v, to_string(result.bias),
                  result.scale ? fmt::format("{}", *result.scale) : "default", wanted.align_bytes,
                  score_spread, value_spread, wanted.lse ? " lse" : "");
  return result;
}

std::vector<AttentionCase> random_cases(Random& random, std::span<const KernelClass> classes, int count) {
  std::vector<AttentionCase> cases;
  for (int i = 0; i < count; ++i) cases.push_back(random_case(random, classes[i % classes.size()]));
  return cases;
}

std::string verdict(const AttentionCase& ran) {
  for (const auto& [name, tensor, access] :
       {std::tuple{"query", &ran.query, Access::read}, std::tuple{"key", &ran.key, Access::read},
        std::tuple{"value", &ran.value, Access::read}, std::tuple{"output", &ran.output, Access::write},
        std::tuple{"lse", &ran.lse, ran.with_lse ? Access::write : Access::read}}) {
    if (const std::string damage = tensor->damage(access); !damage.empty()) {
      return fmt::format("{}: {}", name, damage);
    }
  }
  const Values reference = reference_attention(ran.inputs());
  const std::vector<double> output = ran.output.values();
  if (std::string text = check_empty_rows(ran, reference, output); !text.empty()) return text;
  const std::vector<double> lse = ran.with_lse ? ran.lse.values() : std::vector<double>();
  const Judgement judged = judge(ran.inputs(), reference, output, lse);
  if (!judged.output.ok) return "output: " + judged.output.text();
  if (!judged.lse.ok) return "lse: " + judged.lse.text();
  return "";
}

std::vector<std::string> failures_of(std::span<const AttentionCase> ran) {
  std::vector<std::string> verdicts(ran.size());
  tools::parallel_for(ran.size(), tools::default_jobs(),
                      [&](std::size_t i) { verdicts[i] = verdict(ran[i]); });
  std::vector<std::string> failures;
  for (std::size_t i = 0; i < ran.size(); ++i) {
    if (!verdicts[i].empty()) failures.push_back(fmt::format("case {}: {}: {}", i, ran[i].name, verdicts[i]));
  }
  return failures;
}

}  // namespace attune::test
