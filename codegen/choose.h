// The operator registry: which families can run a problem on an architecture, every reason why the others
// cannot (the most useful first), and the spec of the one that is chosen.
#pragma once

#include "attune/spec.h"
#include "codegen/arch.h"
#include "codegen/candidates.h"
#include "codegen/problem.h"

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace attune::codegen {

/// Why a family cannot run the problem there; empty when it can.
std::vector<std::string> not_supported_reasons(kernel::Family family, const Problem& problem,
                                               const Arch& arch);

struct Verdict {
  kernel::Family family;
  std::vector<std::string> reasons;  // empty: could run
};

struct Choice {
  kernel::KernelSpec spec;
  const Candidate* candidate = nullptr;
  std::vector<Verdict> verdicts;  // every family of the backend in order of preference
};

/// The spec to run: that of the candidate named `tuned` where it is among the contenders, else of the first
/// of them. Fails with unsupported: the first reason of the most general family that the call allows, and
/// then all.
Result<Choice> choose(const Problem& problem, const Arch& arch, std::string_view tuned = {});

/// The candidates that could run the problem, of the family that choose() takes: rows that give the same spec
/// count once, the first is the usual choice. Empty when no family can.
std::vector<const Candidate*> contenders(const Problem& problem, const Arch& arch);

/// The kernel that would run this grad_key_value, and how it is told to compute the query's gradient: by sums
/// where its family can, in an order if the bits are to be the same in every run.
std::optional<kernel::KernelSpec> key_value_spec(Problem problem, const Arch& arch, bool deterministic);
kernel::QueryGradient query_gradient_of(const Problem& problem, const Arch& arch, bool deterministic);

/// Has the problem kernels whose blocks share the keys of a tile, on GPUs that run mma? They are there for
/// decoding: for any masks and pages, without bias tensors and dropout.
bool may_split_keys(const Problem& problem);

/// The spec of one candidate row for a problem, whether or not choose() would take it. For tuning and tests.
kernel::KernelSpec spec_of(const Candidate& candidate, const Problem& problem);

/// Does the row fit the problem and the architecture, its shared memory included?
bool fits(const Candidate& candidate, const Problem& problem, const Arch& arch);

}  // namespace attune::codegen
