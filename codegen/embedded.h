// The templates as text inside the library (cmake/embed_text.cmake writes the table).
#pragma once

#include "base/digest.h"

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace attune::codegen {

struct EmbeddedFile {
  std::string_view name;  // the #include name, "attune/semantics.h"
  std::string_view text;
  Digest digest;  // of the text, computed by the build: a process need not read texts to name a kernel
};

/// A file that the build knows nothing of.
inline EmbeddedFile file_with_digest(std::string_view name, std::string_view text) {
  return {name, text, sha256(text)};
}

/// All templates, sorted by name.
std::span<const EmbeddedFile> embedded_files();

}  // namespace attune::codegen
