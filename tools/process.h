// Programs that the command runs: with a vector of arguments, never through a shell.
#pragma once

#include "base/result.h"

#include <optional>
#include <string>
#include <vector>

namespace attune::tools {

struct Outcome {
  int exit_code = 0;   // 128 + the signal that ended it
  std::string output;  // stdout
};

/// Runs a program, found on the PATH unless its name has a slash, with our stderr and an empty stdin. Nothing
/// when there is no such program. Fails with environment.
Result<std::optional<Outcome>> run_program(const std::vector<std::string>& arguments);

}  // namespace attune::tools
