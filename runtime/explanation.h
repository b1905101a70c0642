// What explain says of a problem: the choice with its reasons, the unit with its key, and where the kernel is
// now.
#pragma once

#include "attune/spec.h"
#include "codegen/choose.h"
#include "codegen/problem.h"
#include "codegen/unit.h"
#include "runtime/tuned_choice.h"

#include <nlohmann/json_fwd.hpp>

#include <optional>
#include <string>

namespace attune::runtime {

struct Explanation {
  codegen::Problem problem;
  codegen::Choice choice;
  std::optional<TunedChoice> tuned;  // on the device, if it was measured there
  codegen::Unit unit;                // without a compiler, its key means nothing
  std::string compiler_problem;      // why there is no compiler; empty when all is well
  const char* state = "absent";      // loaded, cached, absent, or unknown without a compiler
  std::string layer;                 // the path that holds it; empty when none does
};

/// Every field of a spec by name.
nlohmann::json spec_json(const kernel::KernelSpec& spec);

/// The object that attune::explain and `attune explain --json` print.
nlohmann::json to_json(const Explanation& explanation);

}  // namespace attune::runtime
