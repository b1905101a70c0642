// The identity of a loaded shared library.
#pragma once

#include <string>

namespace attune::runtime {

/// The GNU build id of the library loaded at `base`, in hexadecimal; without one, the size of the file.
std::string build_id(const void* base, const std::string& path);

}  // namespace attune::runtime
