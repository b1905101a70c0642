// tools/presets.json as text inside the command (cmake/embed_text.cmake writes the table).
#pragma once

#include "codegen/embedded.h"

#include <span>

namespace attune::tools {

std::span<const codegen::EmbeddedFile> preset_files();

}  // namespace attune::tools
