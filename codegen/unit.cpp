#include "codegen/unit.h"

#include "codegen/emit.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <iterator>

namespace attune::codegen {
namespace {

// Bump when the meaning of a key's fields changes.
constexpr std::string_view kKeySchema = "attune-key-2";

std::string headers_digest(std::span<const EmbeddedFile> headers) {
  FieldDigest digest;
  for (const EmbeddedFile& header : headers) digest.field(header.name, header.digest);
  return digest.finish().hex();
}

/// Without the other backend's folder: its changes need not invalidate this backend's kernels.
std::vector<EmbeddedFile> headers_of(Backend backend, std::span<const EmbeddedFile> all) {
  const std::string_view foreign = backend == Backend::cpu ? "attune/cuda/" : "attune/cpu/";
  std::vector<EmbeddedFile> headers;
  std::ranges::copy_if(all, std::back_inserter(headers),
                       [&](const EmbeddedFile& file) { return !file.name.starts_with(foreign); });
  return headers;
}

}  // namespace

std::vector<std::pair<std::string, std::string>> key_fields(const Unit& unit) {
  return {
      {"schema", std::string(kKeySchema)},
      {"target", unit.arch.target},
      {"spec", describe(unit.spec)},
      {"source", sha256(unit.source).hex()},
      {"headers", headers_digest(unit.headers)},
      {"compiler", unit.compiler.name},
      {"options", fmt::format("{}", fmt::join(unit.compiler.options, "\n"))},
  };
}

Digest key_of(const Unit& unit) {
  FieldDigest digest;
  for (const auto& [tag, value] : key_fields(unit)) digest.field(tag, value);
  return digest.finish();
}

Unit make_unit(const kernel::KernelSpec& spec, const Arch& arch, CompilerId compiler,
               std::span<const EmbeddedFile> headers) {
  Unit unit{.spec = spec,
            .arch = arch,
            .source = emit(spec, arch),
            .headers = headers_of(arch.backend, headers),
            .compiler = std::move(compiler),
            .key = {}};
  unit.key = key_of(unit);
  return unit;
}

}  // namespace attune::codegen
