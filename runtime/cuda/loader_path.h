// Where the dynamic loader would find a library, without loading it.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

namespace attune::runtime {

/// The file that dlopen(soname) would open, as far as the program's search path and the loader's cache tell.
std::optional<std::filesystem::path> loader_path(const std::string& soname);

}  // namespace attune::runtime
