#include "tools/presets.h"

#include "codegen/embedded.h"
#include "codegen/names.h"
#include "codegen/problem.h"
#include "tools/preset_files.h"
#include "tools/verify/kernel_classes.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>

namespace attune::tools {
namespace {

using codegen::Problem;
using nlohmann::json;

const verify::MaskClass* find_mask(std::string_view name) {
  const auto classes = verify::mask_classes();
  const auto found = std::ranges::find(classes, name, &verify::MaskClass::name);
  return found == classes.end() ? nullptr : &*found;
}

kernel::DType dtype_of(std::string_view name) {
  kernel::DType dtype{};
  codegen::parse_text(name, dtype);  // parse_presets() has seen that it is one
  return dtype;
}

std::pair<int, int> head_dims_of(const json& value) {
  if (value.is_number()) return {value.get<int>(), value.get<int>()};
  return value.get<std::pair<int, int>>();
}

Preset preset_of(const json& row) {
  Preset preset{.name = row.at("name"),
                .models = row.at("models"),
                .dtypes = row.at("dtypes"),
                .inference = row.value("inference", std::vector<std::string>()),
                .training = row.value("training", std::vector<std::string>()),
                .partial = row.value("partial", std::vector<std::string>()),
                .dropout = row.value("dropout", false),
                .sources = row.at("sources")};
  for (const json& value : row.at("head_dims")) preset.head_dims.push_back(head_dims_of(value));
  return preset;
}

/// What is wrong with the row; empty: nothing.
std::string defect_of(const Preset& preset) {
  for (const std::string& dtype : preset.dtypes) {
    kernel::DType parsed{};
    if (!codegen::parse_text(dtype, parsed)) return fmt::format("unknown type {}", dtype);
  }
  for (const auto& masks : {preset.inference, preset.training, preset.partial}) {
    for (const std::string& mask : masks) {
      if (find_mask(mask) == nullptr) return fmt::format("unknown class {}", mask);
    }
  }
  std::vector<const char*> facts{"head_dims", "dtypes", "masks"};
  if (preset.dropout) facts.push_back("dropout");
  for (const char* fact : facts) {
    if (!preset.sources.contains(fact)) return fmt::format("no source for {}", fact);
  }
  return {};
}

// ---- The list ----

/// A call on contiguous tensors.
Problem forward_problem(const std::string& mask, std::string_view dtype, std::pair<int, int> head_dims) {
  Problem problem{.dtype = dtype_of(dtype),
                  .output_dtype = dtype_of(dtype),
                  .head_dim = head_dims.first,
                  .head_dim_v = head_dims.second};
  const verify::MaskClass& mask_class = *find_mask(mask);
  verify::set_mask(mask_class, problem);
  if (mask_class.tensor == verify::WithTensor::always) {
    codegen::parse_text(dtype, problem.bias);  // a tensor of the same type
  }
  problem.align_bytes = verify::contiguous_alignment(problem);
  problem.boxes = problem.dtype != kernel::DType::f32 && problem.align_bytes == 16 ? 1 : 0;
  return problem;
}

/// Lines, each once.
class List {
 public:
  void add(Problem problem) {
    using codegen::Extent;
    const bool dense = problem.blocks == kernel::Blocks::dense;
    add_operation("", problem);
    for (const Extent extent : {Extent::few_queries, Extent::few_tiles}) {
      problem.extent = extent;
      if (dense && problem.boxes != 0) add_operation("", problem);
    }
    problem.extent = Extent::large;
    if (codegen::may_split_keys(problem)) add_operation("operation=split ", problem);
  }

  void add_training(Problem problem) {
    add_operation("operation=backward ", problem);
    problem.lse = kernel::Lse::write;
    add(problem);
  }

  /// Partial attention gives float32, and a merge may keep that or not.
  void add_partial(Problem problem) {
    const kernel::DType dtype = problem.dtype;
    problem.output_dtype = kernel::DType::f32;
    problem.lse = kernel::Lse::write;
    problem.align_bytes = verify::contiguous_alignment(problem);
    add(problem);
    for (const kernel::DType output : {kernel::DType::f32, dtype}) {
      Problem merge{.operation = kernel::Operation::merge,
                    .output_dtype = output,
                    .head_dim_v = problem.head_dim_v,
                    .lse = kernel::Lse::write};
      merge.align_bytes = verify::contiguous_alignment(merge);
      add(merge);
    }
  }

  std::string text() const { return text_; }

 private:
  /// Whether a copy engine takes a bias tensor depends on the number of keys, so both may be wanted.
  void add_operation(const std::string& operation, Problem problem) {
    add_line(operation + codegen::to_string(problem));
    if (problem.bias == kernel::Bias::none || problem.boxes == 0) return;
    problem.boxes = 0;
    problem.extent = codegen::Extent::large;
    add_line(operation + codegen::to_string(problem));
  }

  void add_line(const std::string& line) {
    if (std::ranges::find(lines_, line) != lines_.end()) return;
    lines_.push_back(line);
    text_ += line + '\n';
  }

  std::vector<std::string> lines_;
  std::string text_;
};

}  // namespace

Result<std::vector<Preset>> parse_presets(std::string_view text) {
  std::vector<Preset> presets;
  try {
    for (const json& row : json::parse(text)) {
      presets.push_back(preset_of(row));
      const std::string defect = defect_of(presets.back());
      if (!defect.empty()) {
        return internal_failure(fmt::format("preset {}: {}", presets.back().name, defect));
      }
    }
  } catch (const json::exception& error) {
    return internal_failure(fmt::format("preset {}: {}", presets.size(), error.what()));
  }
  return presets;
}

Result<std::vector<Preset>> presets() {
  return parse_presets(preset_files().front().text);
}

std::string problem_list_of(const Preset& preset) {
  List list;
  for (const std::string& dtype : preset.dtypes) {
    for (const auto& head_dims : preset.head_dims) {
      const auto problem = [&](const std::string& mask) { return forward_problem(mask, dtype, head_dims); };
      for (const std::string& mask : preset.inference) list.add(problem(mask));
      for (const std::string& mask : preset.training) {
        Problem trained = problem(mask);
        list.add_training(trained);
        if (!preset.dropout) continue;
        trained.dropout = kernel::Dropout::on;
        list.add_training(trained);
      }
      for (const std::string& mask : preset.partial) list.add_partial(problem(mask));
    }
  }
  return list.text();
}

}  // namespace attune::tools
