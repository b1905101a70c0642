#include "codegen/choose.h"

#include "attune/cuda/shared.h"
#include "codegen/names.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <span>

namespace attune::codegen {
namespace {

using kernel::Edge;
using kernel::Family;
using kernel::KernelSpec;
using kernel::Operation;
using kernel::QueryGradient;

/// The families that do the operation on a backend, the preferred one first.
std::span<const Family> families_of(Operation operation, Backend backend) {
  static constexpr Family kCpu[] = {Family::cpu};
  static constexpr Family kMerge[] = {Family::merge};
  static constexpr Family kRows[] = {Family::rows};
  static constexpr Family kAttention[] = {Family::sm90, Family::mma, Family::simt};
  if (backend == Backend::cpu) return kCpu;
  switch (operation) {
    case Operation::merge:
    case Operation::grad_merge: return kMerge;
    case Operation::delta:
    case Operation::round_query: return kRows;
    case Operation::forward:
    case Operation::grad_query:
    case Operation::grad_key_value:
    case Operation::grad_bias: break;
  }
  return kAttention;
}

Backend backend_of(Family family) {
  return family == Family::cpu ? Backend::cpu : Backend::cuda;
}

const Candidate* first_fit(Family family, const Problem& problem, const Arch& arch) {
  const auto rows = candidates();
  const auto found = std::ranges::find_if(
      rows, [&](const Candidate& row) { return row.family == family && fits(row, problem, arch); });
  return found == rows.end() ? nullptr : &*found;
}

/// All rows of a family that fit, those with the spec of an earlier one left out.
std::vector<const Candidate*> contenders_of(Family family, const Problem& problem, const Arch& arch) {
  std::vector<const Candidate*> found;
  for (const Candidate& row : candidates()) {
    if (row.family != family || !fits(row, problem, arch)) continue;
    const KernelSpec spec = spec_of(row, problem);
    if (std::ranges::none_of(found, [&](const Candidate* other) { return spec_of(*other, problem) == spec; }))
      found.push_back(&row);
  }
  return found;
}

/// Is it in a set of bits 1 << value?
template <typename Enum>
bool in_set(unsigned set, Enum value) {
  return (set >> static_cast<int>(value) & 1u) != 0;
}

std::string compute_capability(int sm) {
  return fmt::format("{}.{}", sm / 10, sm % 10);
}

/// The rows of a family that do the problem's operation.
std::vector<const Candidate*> rows_of(Family family, Operation operation) {
  std::vector<const Candidate*> rows;
  for (const Candidate& row : candidates()) {
    if (row.family == family && row.operation == operation) rows.push_back(&row);
  }
  return rows;
}

void append(std::vector<std::string>& texts, const std::vector<std::string>& more) {
  texts.insert(texts.end(), more.begin(), more.end());
}

/// What the sm90 family leaves to mma, besides features.
std::vector<std::string> sm90_lacks(const Problem& problem) {
  std::vector<std::string> lacks;
  if (problem.head_dim % 8 != 0 || problem.head_dim_v % 8 != 0) {
    lacks.push_back(fmt::format("head_dim {} and head_dim_v {} should be multiples of 8", problem.head_dim,
                                problem.head_dim_v));
  }
  const bool writes_f32 =
      problem.operation == Operation::forward && problem.output_dtype == kernel::DType::f32;
  if (problem.output_dtype != problem.dtype && !writes_f32) {
    lacks.push_back("the output should have the inputs' dtype, or be float32");
  }
  if (problem.operation == Operation::forward && problem.blocks == kernel::Blocks::varlen &&
      problem.bias != kernel::Bias::none) {
    lacks.push_back(
        "no kernels with a bias tensor of packed sequences: their columns begin anywhere, the copy "
        "engine's at multiples of 16 bytes");
  }
  if (problem.boxes == 0) {
    const char* const pages = problem.operation == Operation::forward
                                  ? ", pages and where sequences begin in them multiples of 8 keys"
                                  : "";
    lacks.push_back(fmt::format(
        "the copy engine cannot take the tensors: strides should be multiples of 16 bytes and not 0{}",
        pages));
  }
  if (problem.operation == Operation::grad_key_value && problem.query_gradient == QueryGradient::apart) {
    lacks.push_back("adds up the query's gradient: not for calls without it");
  }
  return lacks;
}

/// What of a problem no row of a family does, whatever the rest of the problem is; the most useful first.
std::vector<std::string> lacks_of(const std::vector<const Candidate*>& rows, const Problem& problem,
                                  const Arch& arch) {
  std::vector<std::string> lacks;
  const auto none = [&](auto&& serves) { return std::ranges::none_of(rows, serves); };
  const int oldest = std::ranges::min(rows, {}, &Candidate::sm_min)->sm_min;
  if (arch.backend == Backend::cuda && arch.sm < oldest) {
    lacks.push_back(fmt::format("needs compute capability {} or later, this GPU has {}",
                                compute_capability(oldest), compute_capability(arch.sm)));
  }
  const int newest = std::ranges::max(rows, {}, &Candidate::sm_max)->sm_max;
  if (arch.backend == Backend::cuda && arch.sm > newest) {
    lacks.push_back(fmt::format("is for compute capability {} and before, this GPU has {}",
                                compute_capability(newest), compute_capability(arch.sm)));
  }
  if (none([&](const Candidate* row) { return in_set(row->dtypes, problem.dtype); })) {
    lacks.push_back(fmt::format("no {} kernels", name_of(problem.dtype)));
  }
  for (const auto& [feature, name] : {std::pair{kVarlen, "packed sequences"},
                                      {kPaged, "paged keys"},
                                      {kBias, "a bias tensor"},
                                      {kDropout, "dropout"},
                                      {kAtomic, "sums of the query's gradient"},
                                      {kOrdered, "sums of the query's gradient in a fixed order"},
                                      {kSplit, "keys shared out over blocks"}}) {
    const unsigned wanted = features_of(problem) & feature;
    if (wanted != 0 && none([&](const Candidate* row) { return (row->features & wanted) != 0; })) {
      lacks.push_back(fmt::format("no kernels with {}", name));
    }
  }
  const int widest = std::ranges::max(rows, {}, &Candidate::head_dim_max)->head_dim_max;
  for (const auto& [name, value] : {std::pair{"head_dim", merges(problem.operation) ? 1 : problem.head_dim},
                                    {"head_dim_v", problem.head_dim_v}}) {
    if (value < 1 || value > widest) {
      lacks.push_back(fmt::format("{} {} is outside 1 to {}", name, value, widest));
    }
  }
  if (rows.front()->family == Family::sm90) append(lacks, sm90_lacks(problem));
  return lacks;
}

Failure no_family(const Problem& problem, const Arch& arch, const std::vector<Verdict>& verdicts) {
  // The most general of the families that the call allows comes last: its reason is the one to act on.
  const auto allowed = std::ranges::find_if(verdicts.rbegin(), verdicts.rend(), [&](const Verdict& verdict) {
    return contains(problem.families, verdict.family);
  });
  const Verdict& first = allowed == verdicts.rend() ? verdicts.front() : *allowed;
  std::string text =
      fmt::format("no kernel for {} on {}: {}", to_string(problem), arch.target, first.reasons.front());
  for (const Verdict& verdict : verdicts) {
    text += fmt::format("\n  {}: {}", name_of(verdict.family), fmt::join(verdict.reasons, "; "));
  }
  return unsupported(std::move(text));
}

/// Columns of the result that a block computes, in as few parts as the row allows. Forward's are whole 16
/// columns wide. Those of a gradient take turns (ColumnShare in mma_tile.cuh), for which there has to be a
/// power of two of them.
int block_v_of(const Candidate& row, const Problem& problem) {
  const int columns = kernel::result_columns(problem.operation, problem.head_dim, problem.head_dim_v);
  if (row.block_v == 0 || columns <= row.block_v) return columns;
  const int parts = kernel::ceil_div(columns, row.block_v);
  if (problem.operation != Operation::forward) return kernel::ceil_div(columns, kernel::bit_ceil(parts));
  return kernel::round_up(kernel::ceil_div(columns, parts), 16);
}

}  // namespace

KernelSpec spec_of(const Candidate& row, const Problem& problem) {
  return {.operation = problem.operation,
          .family = row.family,
          .dtype = problem.dtype,
          .output_dtype = problem.output_dtype,
          .head_dim = problem.head_dim,
          .head_dim_v = problem.head_dim_v,
          .window_left = problem.window_left,
          .window_right = problem.window_right,
          .blocks = problem.blocks,
          .keys = problem.keys,
          .bias = problem.bias,
          .dropout = problem.dropout,
          .lse = problem.lse,
          .query_gradient = problem.query_gradient,
          .split = problem.split,
          .block_m = row.block_m,
          .block_n = row.block_n,
          .block_v = block_v_of(row, problem),
          .tile_m = row.tile_m,
          .tile_n = row.tile_n,
          .warps = row.warps,
          .stages = row.stages,
          .query_stages = row.query_stages,
          .query_registers = row.query_registers,
          .ping_pong = row.ping_pong,
          .cluster = row.cluster,
          .copy_bytes = row.family == Family::cpu ? 0 : problem.align_bytes,
          .lanes = row.lanes};
}

/// Blocks of a cluster and their warpgroups share out four panels of 64 columns. Under a mask, where blocks
/// tell each other of their tiles, the producer spills if the last panel has no more than 16.
bool suits_clusters(const Problem& problem) {
  const auto [narrower, wider] = std::minmax(problem.head_dim, problem.head_dim_v);
  const bool masked = problem.window_left == Edge::bounded || problem.window_right == Edge::bounded;
  return narrower > 192 && (!masked || wider > 208);
}

/// Hopper's warpgroups that have all columns of wide heads' gradients have no registers left.
bool suits_laden(const Candidate& row, const Problem& problem) {
  if (row.operation != Operation::grad_key_value || row.family != Family::sm90) return true;
  const KernelSpec spec = spec_of(row, problem);
  return !kernel::is_laden(spec) || kernel::wider_dim(spec) <= 64 || kernel::shares_columns(spec);
}

/// mma's widest tile of keys spills 12 to 20 bytes where both gradients are over 96 columns wide, that of the
/// keys by a share of 16 less, and rows are copied piecemeal.
bool suits_shares(const Candidate& row, const Problem& problem) {
  return row.operation != Operation::grad_key_value || row.family != Family::mma || row.head_dim_max != 128 ||
         row.block_m * row.block_n < 64 * 128 || problem.query_gradient != QueryGradient::apart ||
         problem.align_bytes == 16 || kernel::round_up(problem.head_dim, 16) != 112 ||
         kernel::round_up(problem.head_dim_v, 16) != 128;
}

bool fits(const Candidate& row, const Problem& problem, const Arch& arch) {
  if (row.operation != problem.operation || backend_of(row.family) != arch.backend) return false;
  if (!in_set(row.dtypes, problem.dtype) || !in_set(row.extents, problem.extent)) return false;
  if ((features_of(problem) & ~row.features) != 0) return false;
  if (std::max(problem.head_dim, problem.head_dim_v) > row.head_dim_max) return false;
  if (row.family == Family::sm90 && !sm90_lacks(problem).empty()) return false;
  if (row.cluster != 0 && !suits_clusters(problem)) return false;
  if (!suits_laden(row, problem) || !suits_shares(row, problem)) return false;
  if (arch.backend == Backend::cpu) return row.isa == arch.isa;
  return row.sm_min <= arch.sm && arch.sm <= row.sm_max &&
         kernel::shared_bytes(spec_of(row, problem)) <= arch.shared_bytes;
}

std::vector<std::string> not_supported_reasons(Family family, const Problem& problem, const Arch& arch) {
  if (backend_of(family) != arch.backend) {
    return {fmt::format("{} kernels do not run on {} tensors", name_of(family), name_of(arch.backend))};
  }
  const auto rows = rows_of(family, problem.operation);
  if (rows.empty()) return {fmt::format("no {} kernels for {}", name_of(family), name_of(problem.operation))};
  std::vector<std::string> reasons = lacks_of(rows, problem, arch);
  if (reasons.empty() && first_fit(family, problem, arch) == nullptr) {
    reasons.push_back(
        fmt::format("no tile fits the {} bytes of shared memory of {}", arch.shared_bytes, arch.target));
  }
  if (!contains(problem.families, family)) {
    reasons.push_back(fmt::format("the call allows {} alone", text_of(problem.families)));
  }
  return reasons;
}

std::optional<KernelSpec> key_value_spec(Problem problem, const Arch& arch, bool deterministic) {
  const QueryGradient sums = deterministic ? QueryGradient::ordered : QueryGradient::atomic;
  for (const Family family : families_of(problem.operation, arch.backend)) {
    if (!contains(problem.families, family)) continue;
    for (const QueryGradient way : {sums, QueryGradient::apart}) {
      problem.query_gradient = way;
      if (const Candidate* row = first_fit(family, problem, arch)) return spec_of(*row, problem);
    }
  }
  return std::nullopt;
}

QueryGradient query_gradient_of(const Problem& problem, const Arch& arch, bool deterministic) {
  const auto spec = key_value_spec(problem, arch, deterministic);
  return spec ? spec->query_gradient : QueryGradient::apart;
}

bool may_split_keys(const Problem& problem) {
  constexpr int kWidest = 256;
  return problem.operation == Operation::forward && problem.dtype != kernel::DType::f32 &&
         problem.bias == kernel::Bias::none && problem.dropout == kernel::Dropout::off &&
         contains(problem.families, Family::mma) && std::max(problem.head_dim, problem.head_dim_v) <= kWidest;
}

std::vector<const Candidate*> contenders(const Problem& problem, const Arch& arch) {
  const auto families = families_of(problem.operation, arch.backend);
  const auto chosen = std::ranges::find_if(
      families, [&](Family family) { return not_supported_reasons(family, problem, arch).empty(); });
  if (chosen == families.end()) return {};
  return contenders_of(*chosen, problem, arch);
}

Result<Choice> choose(const Problem& problem, const Arch& arch, std::string_view tuned) {
  Choice choice;
  for (const Family family : families_of(problem.operation, arch.backend)) {
    choice.verdicts.push_back({family, not_supported_reasons(family, problem, arch)});
  }
  const auto verdict =
      std::ranges::find_if(choice.verdicts, [](const Verdict& one) { return one.reasons.empty(); });
  if (verdict == choice.verdicts.end()) return no_family(problem, arch, choice.verdicts);
  choice.candidate = first_fit(verdict->family, problem, arch);
  if (!tuned.empty()) {
    const auto rows = contenders_of(verdict->family, problem, arch);
    const auto named = std::ranges::find(rows, tuned, &Candidate::name);
    if (named != rows.end()) choice.candidate = *named;
  }
  choice.spec = spec_of(*choice.candidate, problem);
  return choice;
}

}  // namespace attune::codegen
