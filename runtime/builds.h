// Builds: the compilers that made the kernels of the cache. A key names the compiler, so a machine without
// one can't make keys of its own. It makes them with these, and so finds and runs what was compiled
// elsewhere.
#pragma once

#include "codegen/unit.h"

#include <string>
#include <vector>

namespace attune::runtime {

struct Build {
  std::string target;  // as in codegen::Arch
  codegen::CompilerId compiler;
};

/// The builds that JSON texts name, each once, in their order: a pack's manifest its "builds", an entry's
/// metadata its own. What does not parse or lacks a field names none.
std::vector<Build> builds_in(const std::vector<std::string>& descriptions);

}  // namespace attune::runtime
