// Masks against goldens: `attune verify masks`. A file of them (tests/golden/masks.json) holds biases, each
// by the arguments that made it, with the mask that another implementation materialized, and arguments that
// it refused.
#pragma once

#include "attune/attune.h"
#include "base/result.h"

#include <nlohmann/json.hpp>

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace attune::verify {

/// A kernel family that the masks are asked of.
struct MaskKernel {
  Family family = Family::cpu;
  DType dtype = DType::f32;
  bool optional = false;  // passed over where it has no kernel for a mask
};

struct MasksOptions {
  Device device;
  std::vector<MaskKernel> kernels;  // each is asked; none: materialize alone is compared
  /// Told the name of every case that was compared.
  std::function<void(const std::string& what)> progress;
};

/// Of one class.
struct MaskTally {
  int cases = 0;
  int materialized = 0;  // materialize gives the golden's mask
  int attended = 0;      // and so does every kernel
};

struct MasksReport {
  std::map<std::string, MaskTally> classes;
  int errors = 0;                        // arguments that the file says are refused
  int refused = 0;                       // that were, with the text that it says
  std::map<std::string, int> ran;        // masks of each kernel, by the kernel's name
  std::vector<std::string> differences;  // in the file's order; masks as pictures side by side

  bool ok() const { return differences.empty(); }
  /// Over all classes.
  MaskTally total() const;
};

/// Which key rows (true) each query row attends to, row-major: queries are zero, so that every visible key
/// has the same weight, and values are unit vectors, a column for each key. What lies in no sequence is NaN.
/// Nothing where an optional kernel does not serve the bias. Throws as memory_efficient_attention does.
std::optional<std::vector<bool>> attended(const AttentionBias& bias, std::int64_t queries, std::int64_t keys,
                                          Device device, MaskKernel kernel);

/// Cases of the file, for progress.
std::size_t count_of_masks(const nlohmann::json& goldens);

/// Fails with invalid_argument when `goldens` is not what such a file holds, and as attention does when no
/// kernel can run.
Result<MasksReport> verify_masks(const nlohmann::json& goldens, const MasksOptions& options);

}  // namespace attune::verify
