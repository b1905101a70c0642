// The templates as text inside the library (cmake/embed_text.cmake writes the table).
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace attune::codegen {

struct EmbeddedFile {
  std::string_view name;  // the #include name, "attune/semantics.h"
  std::string_view text;
};

/// All templates, sorted by name.
std::span<const EmbeddedFile> embedded_files();

}  // namespace attune::codegen
