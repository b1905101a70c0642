// The compiler plugin: what it exports, what it accepts, how it fails.
#include "codegen/choose.h"
#include "runtime/cpu/cpu_backend.h"
#include "runtime/cpu/plugin_loader.h"
#include "runtime/cpu/shared_object.h"
#include "tests/unit/cpu_elf_file.h"

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <thread>
#include <vector>

using namespace attune;
using namespace attune::runtime;
using attune::test::ElfFile;

namespace {

codegen::Arch avx2() {
  return *codegen::cpu_arch(codegen::Isa::avx2);
}

codegen::Unit unit_of(std::string source) {
  codegen::Unit unit;
  unit.arch = avx2();
  unit.compiler = clang_compiler(unit.arch);
  unit.source = std::move(source);
  const auto headers = codegen::embedded_files();
  unit.headers.assign(headers.begin(), headers.end());
  return unit;
}

codegen::Unit attention_unit(int head_dim, const codegen::Arch& arch) {
  const codegen::Problem problem{.head_dim = head_dim, .head_dim_v = head_dim};
  const auto choice = codegen::choose(problem, arch);
  REQUIRE(choice.ok());
  return codegen::make_unit(choice->spec, arch, clang_compiler(arch), codegen::embedded_files());
}

std::string error_of(std::string source) {
  const auto image = clang_compile(unit_of(std::move(source)));
  REQUIRE_FALSE(image.ok());
  CHECK(image.failure().kind == ErrorKind::internal);
  return image.failure().message;
}

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

std::vector<std::byte> bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> chars{std::istreambuf_iterator<char>(file), {}};
  const auto bytes = std::as_bytes(std::span(chars));
  return {bytes.begin(), bytes.end()};
}

}  // namespace

TEST_CASE("the compiler's identity is known without loading LLVM") {
  const bool loaded = cpu_plugin_loaded();
  const codegen::CompilerId id = clang_compiler(avx2());
  CHECK(id.name.starts_with("clang 19."));
  CHECK(std::ranges::find(id.options, "x86-64-v3") != id.options.end());
  CHECK(clang_compiler(*codegen::cpu_arch(codegen::Isa::avx512)).options != id.options);
  CHECK(cpu_plugin_loaded() == loaded);
}

TEST_CASE("the plugin exports its four functions and needs no LLVM") {
  REQUIRE(plugin().ok());
  CHECK(cpu_plugin_loaded());
  ElfFile file = ElfFile::parse(bytes_of(plugin()->path));
  std::ranges::sort(file.defined);
  CHECK(file.defined == std::vector<std::string>{"attune_clang_abi_version", "attune_clang_compile",
                                                 "attune_clang_free", "attune_clang_version"});
  for (const std::string& library : file.needed) {
    CAPTURE(library);
    CHECK(std::ranges::any_of(std::vector{"libstdc++.", "libm.", "libgcc_s.", "libc.", "ld-linux", "libz."},
                              [&](const char* allowed) { return library.starts_with(allowed); }));
  }
}

TEST_CASE("a kernel depends on nothing and exports its two functions") {
  for (const char* target : {"x86-64-v3", "x86-64-v4"}) {
    CAPTURE(target);
    const auto image = clang_compile(attention_unit(40, *codegen::arch_from_name(target)));
    REQUIRE(image.ok());
    const ElfFile file = ElfFile::parse(image->bytes);
    CHECK(file.needed.empty());
    CHECK(file.undefined.empty());
    CHECK(std::ranges::find(file.defined, "attune_kernel") != file.defined.end());
    CHECK(std::ranges::find(file.defined, "attune_scratch_bytes") != file.defined.end());

    const auto metadata = nlohmann::json::parse(image->metadata_json);
    CHECK(metadata["log"] == "");
    for (const char* phase : {"frontend", "optimise", "codegen", "link"}) {
      CHECK(metadata["milliseconds"][phase].get<double>() > 0);
    }
  }
}

TEST_CASE("a compiled function runs") {
  const auto image = clang_compile(unit_of("extern \"C\" int twice(int x) { return 2 * x; }"));
  REQUIRE(image.ok());
  const auto object = SharedObject::load(image->bytes);
  REQUIRE(object.ok());
  void* twice = object->symbol("twice");
  REQUIRE(twice != nullptr);
  CHECK(reinterpret_cast<int (*)(int)>(twice)(21) == 42);
  CHECK(object->symbol("thrice") == nullptr);
}

TEST_CASE("errors of every phase come back as text") {
  CHECK(contains(error_of("int f() { return missing; }"), "undeclared identifier 'missing'"));
  CHECK(contains(error_of("#include <vector>"), "'vector' file not found"));
  CHECK(contains(error_of("extern \"C\" double cos(double); double f(double x) { return cos(x); }"),
                 "undefined symbol: cos"));
  CHECK(contains(error_of("void f() { asm(\"no such instruction\"); }"), "<inline asm>"));

  codegen::Unit unit = unit_of("");
  unit.compiler.options.push_back("-no-such-option");
  const auto image = clang_compile(unit);
  REQUIRE_FALSE(image.ok());
  CHECK(contains(image.failure().message, "unknown argument"));
  CHECK(clang_compile(unit_of("")).ok());  // and the plugin works on
}

TEST_CASE("compilations run at the same time and give the same bytes") {
  const auto first = clang_compile(attention_unit(16, avx2()));
  REQUIRE(first.ok());
  std::vector<int> same(8, 0);
  std::vector<std::thread> threads;
  for (int& result : same) {
    threads.emplace_back([&] {
      const auto image = clang_compile(attention_unit(16, avx2()));
      result = image.ok() && image->bytes == first->bytes;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(std::ranges::count(same, 1) == 8);
}
