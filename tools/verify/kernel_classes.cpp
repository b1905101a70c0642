#include "tools/verify/kernel_classes.h"

#include "codegen/names.h"
#include "runtime/split_keys.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <numeric>
#include <optional>
#include <utility>

namespace attune::verify {
namespace {

using codegen::Extent;
using codegen::Problem;
using kernel::DType;
using kernel::Family;
using kernel::kMaxHeadDim;
using kernel::Operation;
using kernel::QueryGradient;

constexpr int kMergeEvery = 12;  // one class in so many merges
constexpr int kAttempts = 400;   // to draw a problem that a family has a kernel for
constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};

int well_known_head_dim(Random& random) {
  return random.pick({8, 16, 32, 40, 48, 64, 64, 72, 80, 96, 128, 128, 160, 192, 256, 512});
}

/// 1 to kMaxHeadDim: every third one from the models that people run, the others from equal strata.
std::vector<int> random_head_dims(Random& random, int count) {
  std::vector<int> dims(count);
  for (int i = 0; i < count; ++i) {
    const int first = i * kMaxHeadDim / count + 1;
    const int last = std::max(first, (i + 1) * kMaxHeadDim / count);
    dims[i] = i % 3 == 2 ? well_known_head_dim(random) : random.integer(first, last);
  }
  random.shuffle(dims);
  return dims;
}

/// What a class is sure to combine with what.
struct Combination {
  const MaskClass* mask;
  DType dtype;
  Family family;
};

/// Deals combinations: every mask comes before any comes again, and with every type and family before one of
/// these comes again. So a run of few classes sees every mask.
class Combinations {
 public:
  explicit Combinations(std::span<const Family> families)
      : masks_(numbered(mask_classes().size())),
        others_(mask_classes().size(), Deck(types_and_families(families))),
        size_(mask_classes().size() * std::size(kDTypes) * families.size()) {}

  Combination deal(Random& random) {
    const std::size_t mask = masks_.deal(random);
    const auto& [dtype, family] = others_[mask].deal(random);
    return {&mask_classes()[mask], dtype, family};
  }
  std::size_t size() const { return size_; }

 private:
  using Other = std::pair<DType, Family>;

  static std::vector<std::size_t> numbered(std::size_t count) {
    std::vector<std::size_t> numbers(count);
    std::iota(numbers.begin(), numbers.end(), 0);
    return numbers;
  }
  static std::vector<Other> types_and_families(std::span<const Family> families) {
    std::vector<Other> all;
    for (const DType dtype : kDTypes) {
      for (const Family family : families) all.emplace_back(dtype, family);
    }
    return all;
  }

  Deck<std::size_t> masks_;
  std::vector<Deck<Other>> others_;
  std::size_t size_;
};

/// Drawn up to what rows of the tensors can be aligned for.
int random_alignment(Random& random, const Problem& p) {
  return std::min(std::max(random.pick({16, 16, 16, 8, 4, 2}), size_of(p.dtype)), contiguous_alignment(p));
}

/// What the sm90 family wants of every problem.
void suit_sm90(Random& random, Problem& problem) {
  const auto suitable = [](int head_dim) { return std::min((head_dim + 7) / 8 * 8, 256); };
  problem.head_dim = suitable(problem.head_dim);
  problem.head_dim_v = suitable(problem.head_dim_v);
  problem.output_dtype = random.chance(0.7) ? problem.dtype : DType::f32;
  problem.align_bytes = 16;
  problem.boxes = 1;
  if (problem.blocks == kernel::Blocks::dense) {
    problem.extent = random.pick({Extent::large, Extent::few_queries, Extent::few_tiles});
  }
}

Problem random_merge(Random& random, int head_dim_v, Pass pass) {
  Problem problem{.operation = Operation::merge,
                  .dtype = random.pick({DType::f32, DType::f16, DType::bf16}),
                  .head_dim_v = head_dim_v,
                  .lse = random.pick({kernel::Lse::skip, kernel::Lse::write})};
  if (pass == Pass::backward) {
    problem.operation = Operation::grad_merge;
    problem.lse = kernel::Lse::skip;
  }
  problem.output_dtype =
      random.chance(0.5) ? problem.dtype : random.pick({DType::f32, DType::f16, DType::bf16});
  problem.align_bytes = random_alignment(random, problem);
  return problem;
}

Problem random_forward(Random& random, const Combination& drawn, int head_dim, int head_dim_v) {
  using enum kernel::Bias;
  Problem problem{.dtype = drawn.dtype,
                  .output_dtype = drawn.dtype,
                  .head_dim = head_dim,
                  .head_dim_v = random.chance(0.3) ? head_dim : head_dim_v,
                  .bias = random.pick({f32, f16, bf16, boolean}),
                  .lse = random.pick({kernel::Lse::skip, kernel::Lse::write})};
  set_mask(*drawn.mask, problem);
  const WithTensor tensor = drawn.mask->tensor;
  if (tensor == WithTensor::never || (tensor == WithTensor::maybe && random.chance(0.5))) problem.bias = none;
  if (random.chance(0.4)) problem.output_dtype = random.pick({DType::f32, DType::f16, DType::bf16});
  if (random.chance(0.3)) problem.dropout = kernel::Dropout::on;
  problem.align_bytes = random_alignment(random, problem);
  if (drawn.family == Family::sm90) suit_sm90(random, problem);
  return problem;
}

/// The main step of a backward pass. Those of sm90 always add up the query's gradient.
Problem backward_of(const Problem& forward, Family family) {
  Problem problem = forward;
  problem.operation = Operation::grad_key_value;
  problem.lse = kernel::Lse::skip;
  if (family != Family::sm90) return problem;
  problem.output_dtype = problem.dtype;
  problem.extent = Extent::large;
  problem.query_gradient = QueryGradient::atomic;
  // The gradient of a bias tensor may be another family's.
  if (problem.bias != kernel::Bias::none) problem.families = problem.families | codegen::only(Family::mma);
  return problem;
}

Problem forward_of(const Problem& backward) {
  Problem problem = backward;
  problem.operation = Operation::forward;
  problem.lse = kernel::Lse::write;
  problem.query_gradient = QueryGradient::apart;
  const bool dense = problem.blocks == kernel::Blocks::dense;
  if (problem.boxes != 0 && dense) problem.extent = Extent::few_tiles;  // as all cases have
  return problem;
}

/// Draws until the family has kernels for it, at first with these head_dims. Nothing: it never has any for
/// the combination.
std::optional<KernelClass> random_class(Random& random, const Combination& drawn, int head_dim,
                                        int head_dim_v, const codegen::Arch& arch, Pass pass) {
  const auto has_kernel = [&](const Problem& problem) {
    return codegen::not_supported_reasons(drawn.family, problem, arch).empty();
  };
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    Problem problem = random_forward(random, drawn, head_dim, head_dim_v);
    problem.families = codegen::only(drawn.family);
    if (pass == Pass::forward && codegen::may_split_keys(problem) && random.chance(0.5)) {
      problem.split = kernel::Split::on;
    }
    if (pass == Pass::backward) problem = backward_of(problem, drawn.family);
    if (has_kernel(problem) && (pass == Pass::forward || codegen::choose(forward_of(problem), arch).ok())) {
      const bool deterministic = problem.query_gradient == QueryGradient::apart ||
                                 codegen::query_gradient_of(problem, arch, true) == QueryGradient::ordered;
      return KernelClass{problem, drawn.family, drawn.mask, deterministic};
    }
    const bool well_known = random.chance(0.5);
    head_dim = well_known ? well_known_head_dim(random) : random.integer(1, kMaxHeadDim);
    head_dim_v = well_known ? well_known_head_dim(random) : random.integer(1, kMaxHeadDim);
  }
  return std::nullopt;
}

/// Many chunks are merged into float32 first, and those into the output.
std::vector<Problem> merges_of(const Problem& problem) {
  Problem group = problem;
  group.output_dtype = DType::f32;
  group.lse = kernel::Lse::write;
  Problem last = problem;
  last.dtype = DType::f32;
  // Rows are aligned for their elements: a narrower type on the other side no longer counts.
  group.align_bytes = std::max(group.align_bytes, size_of(group.dtype));
  last.align_bytes = std::max(last.align_bytes, size_of(last.output_dtype));
  return {problem, group, last};
}

/// Any gradients may be wanted, in deterministic mode or not; if the class always adds up the query's, that
/// and another's.
std::vector<Problem> steps_of(const Problem& backward, const codegen::Arch& arch) {
  std::vector<Problem> steps{forward_of(backward), step_of(backward, Operation::delta)};
  if (backward.query_gradient == QueryGradient::apart) {
    steps.push_back(step_of(backward, Operation::grad_key_value));
    steps.push_back(step_of(backward, Operation::grad_query));
  }
  bool sums = false;
  for (const bool deterministic : {false, true}) {
    const auto keys = step_of(backward, Operation::grad_key_value);
    const auto query = codegen::query_gradient_of(keys, arch, deterministic);
    if (query == QueryGradient::apart) continue;
    steps.push_back(step_of(backward, Operation::grad_key_value, query));
    sums = true;
  }
  if (sums) steps.push_back(step_of(backward, Operation::round_query));
  if (backward.bias != kernel::Bias::none && backward.bias != kernel::Bias::boolean) {
    steps.push_back(step_of(backward, Operation::grad_bias));
  }
  return steps;
}

}  // namespace

void set_mask(const MaskClass& mask, Problem& problem) {
  const auto edge = [](bool bound) { return bound ? kernel::Edge::bounded : kernel::Edge::open; };
  problem.window_left = edge(mask.left);
  problem.window_right = edge(mask.right);
  if (mask.keys == Addressing::whole) return;
  problem.blocks = kernel::Blocks::varlen;
  if (mask.keys == Addressing::paged || mask.keys == Addressing::paged_gappy) {
    problem.keys = kernel::Keys::paged;
  }
}

int contiguous_alignment(const Problem& p) {
  int alignment = row_alignment(std::int64_t{p.head_dim_v} * size_of(p.dtype));
  alignment = std::min(alignment, row_alignment(std::int64_t{p.head_dim_v} * size_of(p.output_dtype)));
  if (p.head_dim > 0) {
    alignment = std::min(alignment, row_alignment(std::int64_t{p.head_dim} * size_of(p.dtype)));
  }
  return alignment;
}

int row_alignment(std::int64_t bytes) {
  return 1 << std::countr_zero(static_cast<std::uint64_t>(bytes) | 16u);
}

Result<std::vector<KernelClass>> random_classes(Random& random, int count, const codegen::Arch& arch,
                                                std::span<const Family> families, Pass pass) {
  const std::vector<int> head_dims = random_head_dims(random, count);
  const std::vector<int> head_dims_v = random_head_dims(random, count);
  Combinations combinations(families);
  std::vector<KernelClass> classes;
  for (std::size_t barren = 0; static_cast<int>(classes.size()) < count;) {
    const std::size_t i = classes.size();
    if (i % kMergeEvery == kMergeEvery - 1) {
      const Problem problem = random_merge(random, head_dims_v[i], pass);
      ATTUNE_ASSIGN(choice, codegen::choose(problem, arch));
      classes.push_back({problem, choice.spec.family, nullptr});
      continue;
    }
    const auto drawn =
        random_class(random, combinations.deal(random), head_dims[i], head_dims_v[i], arch, pass);
    if (drawn) classes.push_back(*drawn);
    barren = drawn ? 0 : barren + 1;
    if (barren == 2 * combinations.size()) {  // which hold each of them
      return unsupported(fmt::format("the families of this run have no kernels on {}", arch.target));
    }
  }
  return classes;
}

Problem step_of(const Problem& backward, Operation operation, QueryGradient query_gradient) {
  Problem step = backward;
  step.operation = operation;
  step.output_dtype = step.dtype;
  step.query_gradient = query_gradient;
  if (operation != Operation::delta && operation != Operation::round_query) return step;
  // Both go by rows, and know of no keys.
  const bool delta = operation == Operation::delta;
  return {.operation = operation,
          .dtype = step.dtype,
          .output_dtype = delta ? backward.output_dtype : step.dtype,
          .head_dim = step.head_dim,
          .head_dim_v = delta ? step.head_dim_v : step.head_dim,
          .blocks = step.blocks,
          .align_bytes = step.align_bytes};
}

std::vector<Problem> problems_of(const KernelClass& kernel_class, const codegen::Arch& arch) {
  const Problem& problem = kernel_class.problem;
  switch (problem.operation) {
    case Operation::forward:
      if (problem.split == kernel::Split::off) return {problem};
      return {runtime::problem_of_parts(problem), runtime::problem_of_merge(problem)};
    case Operation::grad_merge: return {problem};
    case Operation::merge: return merges_of(problem);
    default: return steps_of(problem, arch);
  }
}

}  // namespace attune::verify
