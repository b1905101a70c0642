// Unit: everything that a compiler needs for one kernel, and the key that names the result.
#pragma once

#include "attune/spec.h"
#include "base/digest.h"
#include "codegen/arch.h"
#include "codegen/embedded.h"

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace attune::codegen {

struct CompilerId {
  std::string name;                  // "nvrtc 13.0 <build id>", "clang 19.1.7"
  std::vector<std::string> options;  // in the order given to the compiler; no paths

  bool operator==(const CompilerId&) const = default;
};

struct Unit {
  kernel::KernelSpec spec;
  Arch arch;
  std::string source;
  std::vector<EmbeddedFile> headers;  // what the source may include
  CompilerId compiler;
  Digest key;
};

/// Tagged fields that the key hashes, in order; values are text or hex digests. `attune explain` prints them,
/// so a surprising miss is a diff of two lists.
std::vector<std::pair<std::string, std::string>> key_fields(const Unit& unit);

/// SHA-256 over key_fields, every tag and value length-prefixed.
Digest key_of(const Unit& unit);

/// Emits the source, collects the headers that the backend's kernels may include, and computes the key.
Unit make_unit(const kernel::KernelSpec& spec, const Arch& arch, CompilerId compiler,
               std::span<const EmbeddedFile> headers);

}  // namespace attune::codegen
