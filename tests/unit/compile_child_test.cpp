// Compilers in processes of their own: what crosses between, and what becomes of a call whose compiler
// crashes, hangs or talks nonsense.
#include "codegen/choose.h"
#include "codegen/embedded.h"
#include "runtime/compile_wire.h"
#include "runtime/cpu/cpu_backend.h"
#include "runtime/cuda/cuda_backend.h"
#include "runtime/engine.h"
#include "tests/support/temp_dir.h"

#include <doctest/doctest.h>
#include <fmt/format.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

using namespace attune;
using namespace attune::runtime;
namespace fs = std::filesystem;

namespace {

constexpr codegen::Problem kProblem{.head_dim = 16, .head_dim_v = 16, .align_bytes = 16};
const std::string kRealProgram = ATTUNE_BINARY_DIR "/lib/attune-compile";

codegen::Unit unit_of(const codegen::Arch& arch, codegen::CompilerId compiler) {
  const auto choice = codegen::choose(kProblem, arch);
  REQUIRE(choice.ok());
  return codegen::make_unit(choice->spec, arch, std::move(compiler), codegen::embedded_files());
}

codegen::Unit cpu_unit() {
  const codegen::Arch arch = *codegen::cpu_arch(codegen::Isa::avx2);
  return unit_of(arch, clang_compiler(arch));
}

/// A program in a folder of its own that stands in for attune-compile.
class FakeProgram {
 public:
  explicit FakeProgram(const std::string& script) {
    std::ofstream(path()) << "#!/bin/sh\n" << script << '\n';
    fs::permissions(path(), fs::perms::owner_all);
  }
  fs::path path() const { return dir_.path() / "program"; }
  fs::path folder() const { return dir_.path(); }

 private:
  test::TempDir dir_;
};

/// The failure of a compiler that the script is.
Failure failure_of(const std::string& script, std::chrono::milliseconds limit = std::chrono::minutes(1)) {
  const FakeProgram program(script);
  const auto image = compile_in_child(cpu_unit(), {program.path(), limit});
  REQUIRE_FALSE(image.ok());
  return image.failure();
}

void check_same_image(const codegen::Unit& unit) {
  const auto here = compile_for(unit), there = compile_in_child(unit, {});
  REQUIRE_MESSAGE(here.ok(), here.failure().message);
  REQUIRE_MESSAGE(there.ok(), there.failure().message);
  CHECK(here->bytes == there->bytes);
}

int lines_in(const fs::path& path) {
  std::ifstream file(path);
  int lines = 0;
  for (std::string line; std::getline(file, line);) ++lines;
  return lines;
}

}  // namespace

TEST_CASE("a request arrives as it was sent; none is taken that is cut off") {
  const codegen::Unit unit = cpu_unit();
  const std::string message = encode_request(unit, "/some/library.so");
  const auto request = decode_request(message);
  REQUIRE(request.ok());
  CHECK(request->library == "/some/library.so");
  CHECK(codegen::key_of(request->unit) == unit.key);  // over everything that decides the image
  CHECK(request->unit.spec == unit.spec);
  for (std::size_t size = 0; size < message.size(); size += 97)
    CHECK_FALSE(decode_request(message.substr(0, size)).ok());
}

TEST_CASE("an answer arrives as it was sent; none is taken that is cut off") {
  const Image image{std::vector<std::byte>(1000, std::byte{7}), R"({"log": "fine"})"};
  const std::string message = encode_answer(image);
  const auto answer = decode_answer(message);
  REQUIRE((answer && answer->ok()));
  CHECK((*answer)->bytes == image.bytes);
  CHECK((*answer)->metadata_json == image.metadata_json);
  for (std::size_t size = 0; size < message.size(); ++size)
    CHECK_FALSE(decode_answer(message.substr(0, size)).has_value());

  for (const ErrorKind kind : {ErrorKind::unsupported, ErrorKind::environment, ErrorKind::internal}) {
    const auto refusal = decode_answer(encode_answer(Failure{kind, "no"}));
    REQUIRE((refusal && !refusal->ok()));
    CHECK(refusal->failure().kind == kind);
    CHECK(refusal->failure().message == "no");
  }
}

TEST_CASE("a compiler that crashes is an error that names the signal and quotes its last words") {
  const Failure failure = failure_of("echo the last words >&2; kill -SEGV $$");
  CHECK(failure.kind == ErrorKind::environment);
  CHECK(failure.message.find("signal 11 ended it (Segmentation fault)") != std::string::npos);
  CHECK(failure.message.find("the last words") != std::string::npos);
  CHECK(failure.message.find(cpu_unit().key.hex().substr(0, 12)) != std::string::npos);
  CHECK(failure_of("kill -ABRT $$").message.find("signal 6 ended it (Aborted)") != std::string::npos);
}

TEST_CASE("a compiler that does not end is killed at the limit, whatever it has said or closed") {
  for (const char* script : {"exec sleep 1000", "echo nonsense; exec sleep 1000", "exec sleep 1000 >&-",
                             "trap '' TERM INT; while :; do :; done"}) {
    CAPTURE(script);
    const Failure failure = failure_of(script, std::chrono::milliseconds(200));
    CHECK(failure.message.find("it took longer than 0.2 s (ATTUNE_COMPILE_LIMIT)") != std::string::npos);
  }
}

TEST_CASE("a compiler that leaves without a whole answer is an error") {
  CHECK(failure_of("exit 3").message.find("exit code 3 and no answer") != std::string::npos);
  CHECK(failure_of("exit 0").message.find("exit code 0 and no answer") != std::string::npos);
  CHECK(failure_of("head -c 1000000 /dev/zero").message.find("no answer") != std::string::npos);
  CHECK(failure_of("cat").message.find("no answer") != std::string::npos);  // our own request
}

TEST_CASE("a program that is missing or can't be started is an error") {
  CHECK_FALSE(compile_in_child(cpu_unit(), {"/nowhere/attune-compile"}).ok());
  CHECK_FALSE(compile_in_child(cpu_unit(), {"/proc/self/status"}).ok());
}

TEST_CASE("the child has three files, and the default signals") {
  const int inherited = dup(STDOUT_FILENO);  // as programs have, which don't close theirs on exec
  std::signal(SIGINT, SIG_IGN);
  const FakeProgram program(
      "ls /proc/$$/fd > ${0%program}files; grep SigIgn /proc/$$/status > ${0%program}signals");
  CHECK_FALSE(compile_in_child(cpu_unit(), {program.path()}).ok());
  std::signal(SIGINT, SIG_DFL);
  close(inherited);
  std::ifstream files(program.folder() / "files"), signals(program.folder() / "signals");
  std::vector<int> open;
  for (int file = 0; files >> file;) open.push_back(file);
  std::erase_if(open, [](int file) { return file >= 10; });  // the shell keeps its script there
  CHECK(open == std::vector{0, 1, 2});
  std::string name, ignored;
  signals >> name >> ignored;
  CHECK((std::stoull(ignored, nullptr, 16) & 0x7fffffff) == 0);  // 32 and 33 are the C library's own
}

TEST_CASE("Clang compiles the same in a child") {
  if (!cpu_report().plugin_problem.empty()) return;
  check_same_image(cpu_unit());
  std::signal(SIGCHLD, SIG_IGN);  // children are nobody's to wait for
  check_same_image(cpu_unit());
  std::signal(SIGCHLD, SIG_DFL);
}

TEST_CASE("NVRTC compiles the same in a child") {
  const codegen::Arch arch = *codegen::arch_from_name("sm_90a");
  auto compiler = nvrtc_compiler(arch);
  if (!compiler.ok()) return;
  check_same_image(unit_of(arch, std::move(*compiler)));
}

TEST_CASE("what does not compile is the compiler's failure, not the child's") {
  if (!cpu_report().plugin_problem.empty()) return;
  codegen::Unit unit = cpu_unit();
  unit.source += "this is no C++";
  const auto image = compile_in_child(unit, {});
  REQUIRE_FALSE(image.ok());
  CHECK(image.failure().kind == ErrorKind::internal);
  CHECK(image.failure().message == compile_for(unit).failure().message);
}

TEST_CASE("one key's crash costs its callers an error each time, and no other key anything") {
  if (!cpu_report().plugin_problem.empty()) return;
  // The request is a file, which can be read twice.
  const FakeProgram program(fmt::format(R"(echo >> ${{0%program}}starts
if grep -q 'head_dim = 24' /proc/self/fd/0; then sleep 0.3; kill -SEGV $$; fi
exec {} < /proc/self/fd/0)",
                                        kRealProgram));
  const test::TempDir cache;
  auto engine = Engine::create({.cache_root = cache.path(),
                                .compile_in = CompileIn::child,
                                .compile_child = {.program = program.path()}});
  REQUIRE(engine.ok());
  codegen::Problem bad = kProblem;
  bad.head_dim = bad.head_dim_v = 24;
  std::vector<std::thread> callers;
  std::vector<std::string> errors(8);
  for (std::string& error : errors) {
    callers.emplace_back([&] {
      const auto prepared = (*engine)->prepare(bad, {});
      if (!prepared.ok()) error = prepared.failure().message;
    });
  }
  REQUIRE((*engine)->prepare(kProblem, {}).ok());
  for (std::thread& caller : callers) caller.join();
  for (const std::string& error : errors) CHECK(error.find("signal 11") != std::string::npos);
  const int starts = lines_in(program.folder() / "starts");
  CHECK(starts < 9);  // callers that came together shared one
  CHECK_FALSE((*engine)->prepare(bad, {}).ok());
  CHECK(lines_in(program.folder() / "starts") == starts + 1);  // no failure is kept
  CHECK((*engine)->counters().compiles == 1);
}
