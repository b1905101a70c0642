// Clang as the compiler of CPU kernels: its identity and options, and compilation through the plugin.
#include "runtime/cpu/cpu_backend.h"
#include "runtime/cpu/plugin_loader.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <memory>

namespace attune::runtime {
namespace {

std::vector<const char*> pointers_to(const std::vector<std::string>& strings) {
  std::vector<const char*> pointers;
  for (const std::string& text : strings) pointers.push_back(text.c_str());
  return pointers;
}

attune_clang_file file_of(const char* name, std::string_view text) {
  return {.name = name, .text = text.data(), .text_size = text.size()};
}

std::string metadata_of(const attune_clang_result& result) {
  const nlohmann::json metadata{{"milliseconds",
                                 {{"frontend", result.frontend_ms},
                                  {"optimise", result.optimise_ms},
                                  {"codegen", result.codegen_ms},
                                  {"link", result.link_ms}}},
                                {"log", result.log}};
  return metadata.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace

codegen::CompilerId clang_compiler(const codegen::Arch& arch) {
  codegen::CompilerId id{.name = "clang " ATTUNE_CLANG_VERSION,
                         .options = {"-triple", "x86_64-unknown-linux-gnu", "-target-cpu", arch.target, "-x",
                                     "c++", "-std=c++20", "-O3",
                                     // No library and no header but Attune's own.
                                     "-ffreestanding", "-nostdsysteminc", "-nobuiltininc", "-fno-rtti",
                                     "-mrelocation-model", "pic", "-pic-level", "2", "-mframe-pointer=none",
                                     "-fvisibility-inlines-hidden", "-vectorize-loops", "-vectorize-slp",
                                     // Kernels spell their fused operations; -inf and NaN keep their meaning.
                                     "-ffp-contract=off", "-Wall"}};
  // x86-64-v4 alone would halve the vectors, for the sake of Skylake's clock.
  if (arch.isa == codegen::Isa::avx512) id.options.push_back("-mprefer-vector-width=512");
  return id;
}

Result<Image> clang_compile(const codegen::Unit& unit) {
  const Result<Plugin>& clang = plugin();
  if (!clang.ok()) return clang.failure();

  std::vector<attune_clang_file> headers;
  std::vector<std::string> names;  // the ABI wants terminated strings
  names.reserve(unit.headers.size());
  for (const codegen::EmbeddedFile& header : unit.headers) {
    headers.push_back(file_of(names.emplace_back(header.name).c_str(), header.text));
  }
  const std::vector<const char*> options = pointers_to(unit.compiler.options);
  const attune_clang_request request{.struct_size = sizeof(attune_clang_request),
                                     .source = file_of("kernel.cpp", unit.source),
                                     .headers = headers.data(),
                                     .header_count = headers.size(),
                                     .options = options.data(),
                                     .option_count = options.size()};
  attune_clang_result result{};
  result.struct_size = sizeof result;
  const int status = clang->compile(&request, &result);
  const std::unique_ptr<attune_clang_result, attune_clang_free_fn> release(&result, clang->free);
  if (status != 0) {
    return internal_failure(
        fmt::format("Clang does not compile a kernel for {}; please report this with the log:\n{}",
                    unit.arch.target, result.log != nullptr ? result.log : "out of memory"));
  }
  const auto* bytes = static_cast<const std::byte*>(result.image);
  return Image{.bytes = {bytes, bytes + result.image_size}, .metadata_json = metadata_of(result)};
}

}  // namespace attune::runtime
