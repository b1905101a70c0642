// The identity of a shared library.
#pragma once

#include <filesystem>
#include <string>

namespace attune::runtime {

/// The GNU build id of the library loaded at `base`, in hexadecimal; without one, the size of the file.
std::string build_id(const void* base, const std::string& path);

/// The GNU build id in a library's file, which is not loaded; "" without one.
std::string build_id_in(const std::filesystem::path& file);

}  // namespace attune::runtime
