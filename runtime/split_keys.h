// Keys split over blocks, where there are too few queries to keep a GPU busy, as in decoding: every part
// gives float32 results and their log-sum-exp, which a second launch merges (templates/attune/merge.h).
#pragma once

#include "codegen/arch.h"
#include "runtime/engine.h"

#include <cstddef>
#include <vector>

namespace attune::runtime {

/// Has it kernels whose blocks share keys?
bool splits_keys(const codegen::Arch& arch);

/// How many parts the keys are split into, told from shapes alone: 1 where they are not.
int splits_of(const Call& call, const codegen::Arch& arch, int multiprocessors);

/// What a planned call needs between its two launches, the results of every part; 0 where it has one.
std::size_t workspace_bytes(const Call& call);

/// The problems of the two launches of a call that is split. What parts give is float32 with a log-sum-exp,
/// whatever the caller wants of the whole.
codegen::Problem problem_of_parts(const codegen::Problem& whole);
codegen::Problem problem_of_merge(const codegen::Problem& whole);

/// The two launches of a call, in this order.
struct SplitCall {
  Call attention;
  MergeCall merge;
};

/// Into a new one: the launches of a planned call, with pointers into call.workspace.
void split_keys(const Call& call, SplitCall& split);

/// The problems of a planned call's launches.
std::vector<codegen::Problem> problems_of(const Call& call);

}  // namespace attune::runtime
