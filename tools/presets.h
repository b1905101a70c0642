// Presets: families of models, by what their attention asks of kernels. The facts, each with its source, are
// data: tools/presets.json, which is part of the command.
#pragma once

#include "base/result.h"

#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace attune::tools {

struct Preset {
  std::string name;
  std::string models;
  std::vector<std::pair<int, int>> head_dims;  // of query and key, of value
  std::vector<std::string> dtypes;
  // Biases by their classes. Several may share kernels: only their traits matter.
  std::vector<std::string> inference;
  std::vector<std::string> training;  // forward with lse, and backward
  std::vector<std::string> partial;   // memory_efficient_attention_partial, and the merge
  bool dropout = false;               // in training
  std::map<std::string, std::string> sources;
};

/// The families of the text. Fails with internal, naming the row, when one is not as described above, names
/// an unknown type or class, or gives no source for something that it says.
Result<std::vector<Preset>> parse_presets(std::string_view json);

/// Those of the command.
Result<std::vector<Preset>> presets();

/// What a family needs on any architecture, as a list for parse_problem_list: contiguous tensors whose output
/// has the inputs' type, and for partial attention, whose output is float32, the merges that follow it.
std::string problem_list_of(const Preset& preset);

}  // namespace attune::tools
