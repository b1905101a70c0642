// Random problems over the whole surface, run through the public API and judged against float64:
// `attune verify numerics`, and what tests/numerics and tests/gpu run.
#pragma once

#include "attune/attune.h"
#include "base/result.h"
#include "tools/verify/kernel_classes.h"

#include <nlohmann/json_fwd.hpp>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace attune::verify {

struct NumericsOptions {
  std::uint64_t seed = 0;
  int cases = 512;
  Pass pass = Pass::forward;
  Device device;
  /// Families that take turns, each forced to run its cases; empty: all that the device has.
  std::vector<Family> families;
  /// Runs this one of the cases alone, to look at a failure again.
  std::optional<int> only;
  /// Told what was just done, after every kernel that was prepared and every case that was judged.
  std::function<void(const std::string& what)> progress;
};

/// A row of the table of what ran.
struct Tally {
  int cases = 0;
  int failed = 0;
};

struct NumericsReport {
  std::uint64_t seed = 0;
  int cases = 0;
  std::vector<std::string> failures;  // "case 17: everything that was drawn: what is wrong"
  /// By aspect ("bias", "bias tensor", "type", "output type", "layout", "operation", "dropout", "scale") and
  /// value.
  std::map<std::string, std::map<std::string, Tally>> tallies;
  /// By "bias", "family" and "type": which class was run by which kernels.
  std::map<std::string, std::map<std::string, std::map<std::string, Tally>>> coverage;
  std::size_t specs = 0;       // distinct kernel specs that the cases need
  std::uint64_t kernels = 0;   // kernels that were loaded for them: no run-time extent needs one of its own
  std::uint64_t compiles = 0;  // of those, compiled now; the others came from the cache
  std::uint64_t launches = 0;
  double seconds = 0;

  bool ok() const { return failures.empty(); }
};

/// Steps that `progress` will be told of.
std::size_t numerics_steps(const NumericsOptions& options);

/// Fails when no case can be run: environment without a device or a compiler, invalid_argument for options
/// that make no sense. Wrong results are no failure of the run; the report has them.
Result<NumericsReport> verify_numerics(const NumericsOptions& options);

/// Tables for a terminal.
std::string text_of(const NumericsReport& report);
nlohmann::json json_of(const NumericsReport& report);

}  // namespace attune::verify
