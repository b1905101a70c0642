// Problems on the command line, and lists of them for `attune precompile`.
#pragma once

#include "base/result.h"
#include "codegen/arch.h"
#include "codegen/problem.h"

#include <string>
#include <string_view>
#include <vector>

namespace attune::tools {

/// What a --problem is, with every field's name; for help.
std::string problem_help();

/// A problem, or with operation=backward in place of an operation those of every kernel of a backward pass on
/// the architecture: of one that gives the same bits in every run, if query_gradient=ordered is asked for.
/// With operation=split those of a call whose keys are split over blocks, none where the architecture
/// doesn't.
Result<std::vector<codegen::Problem>> parse_problems(std::string_view text, const codegen::Arch& arch);

/// A list's text. Fails with invalid_argument.
Result<std::string> read_list(const std::string& path);

/// The lines of such a list (below), or its elements as lines, without comments.
Result<std::vector<std::string>> problem_lines(std::string_view text, const std::string& origin);

/// Text is one of these a line, "dtype=f16 head_dim=64", with '#' before a comment; or a JSON array whose
/// elements are such lines or objects, {"dtype": "f16", "head_dim": 64}. Repeated problems are dropped. Fails
/// with invalid_argument; the message has `origin` and the line or element.
Result<std::vector<codegen::Problem>> parse_problem_list(std::string_view text, const std::string& origin,
                                                         const codegen::Arch& arch);

}  // namespace attune::tools
