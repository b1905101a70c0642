// Installation: where files that belong to this library lie.
#pragma once

#include <string>
#include <vector>

namespace attune {

/// Where a file of our own may be, the best place first: beside the library (or program) that holds this
/// code, then in the library folders beside the running program's.
std::vector<std::string> installed_candidates(const std::string& file_name);

}  // namespace attune
