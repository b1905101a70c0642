// The engine end to end on the CPU backend: what is compiled, stored, found again, refused, and counted.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#define DOCTEST_CONFIG_IMPLEMENT
#include "attune/attune.h"
#include "base/file.h"
#include "base/log.h"
#include "cache/pack_writer.h"
#include "runtime/check.h"
#include "runtime/cpu/cpu_backend.h"
#include "runtime/engine.h"
#include "tests/support/temp_dir.h"

#include <doctest/doctest.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

using namespace attune;
using namespace attune::runtime;
namespace fs = std::filesystem;

namespace {

std::string program;  // argv[0], to start a second process

constexpr Device kCpu{};
constexpr codegen::Problem kProblem{.head_dim = 16, .head_dim_v = 16, .align_bytes = 16};

std::unique_ptr<Engine> open_engine(EngineOptions options) {
  auto engine = Engine::create(std::move(options));
  REQUIRE_MESSAGE(engine.ok(), engine.failure().message);
  return std::move(*engine);
}

std::vector<fs::path> entries_in(const fs::path& root) {
  std::vector<fs::path> files;
  if (!fs::exists(root / "v1" / "objects")) return files;
  for (const auto& file : fs::recursive_directory_iterator(root / "v1" / "objects")) {
    if (file.is_regular_file()) files.push_back(file.path());
  }
  return files;
}

/// Collects warnings for the lifetime of a test.
struct Warnings {
  Warnings() {
    set_log_sink([this](LogLevel level, const std::string& line) {
      if (level <= LogLevel::warn) lines.push_back(line);
    });
  }
  ~Warnings() { set_log_sink({}); }
  std::vector<std::string> lines;
};

/// Attention over one query and three keys whose answer is the mean of the values; nothing when the call
/// failed.
std::optional<std::array<float, 16>> attend(Engine& engine) {
  std::array<float, 16> query{};
  std::array<float, 48> key{};
  std::array<float, 48> value{};
  std::array<float, 16> output{};
  for (std::size_t i = 0; i < value.size(); ++i) value[i] = static_cast<float>(i / 16);
  const TensorView q{query.data(), DType::f32, {1, 1, 1, 16}};
  const TensorView k{key.data(), DType::f32, {1, 3, 1, 16}};
  const TensorView v{value.data(), DType::f32, {1, 3, 1, 16}};
  const MutableTensorView o{output.data(), DType::f32, {1, 1, 1, 16}};
  const auto call = check({q, k, v, &o, nullptr, false, {}, {}});
  if (!call.ok() || !engine.run(*call).ok()) return std::nullopt;
  return output;
}

void run_and_check(Engine& engine) {
  const auto output = attend(engine);
  REQUIRE(output.has_value());
  for (const float x : *output) CHECK(x == doctest::Approx(1.0));
}

/// Runs this program again with one cache folder and returns the JSON that it prints.
nlohmann::json second_process(const fs::path& root) {
  const std::string command = fmt::format("'{}' --child '{}'", program, root.string());
  std::FILE* pipe = popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  std::string text;
  std::array<char, 512> buffer{};
  while (const std::size_t n = std::fread(buffer.data(), 1, buffer.size(), pipe))
    text.append(buffer.data(), n);
  REQUIRE(pclose(pipe) == 0);
  return nlohmann::json::parse(text);
}

int child(const char* root) {
  auto engine = Engine::create({.cache_root = fs::path(root)});
  if (!engine.ok() || !attend(**engine)) return 1;
  const Counters counters = (*engine)->counters();
  const nlohmann::json report{{"compiles", counters.compiles},
                              {"hits", counters.cache_hits},
                              {"loads", counters.loads},
                              {"llvm", cpu_plugin_loaded()}};
  std::puts(report.dump().c_str());
  return 0;
}

}  // namespace

TEST_CASE("the first use compiles and stores; the second reads; a third process loads no LLVM") {
  const test::TempDir dir;
  auto first = open_engine({.cache_root = dir.path()});
  run_and_check(*first);
  run_and_check(*first);
  CHECK(first->counters().compiles == 1);
  CHECK(first->counters().loads == 1);
  CHECK(first->counters().launches == 2);
  CHECK(first->counters().cache_stores == 1);
  CHECK(entries_in(dir.path()).size() == 1);

  auto second = open_engine({.cache_root = dir.path()});
  run_and_check(*second);
  CHECK(second->counters().compiles == 0);
  CHECK(second->counters().cache_hits == 1);

  const nlohmann::json other = second_process(dir.path());
  CHECK(other["compiles"] == 0);
  CHECK(other["hits"] == 1);
  CHECK(other["llvm"] == false);
}

TEST_CASE("warm-up and steady state use the same kernel whatever the lengths are") {
  const test::TempDir dir;
  auto engine = open_engine({.cache_root = dir.path()});
  alignas(64) static float memory[4][64 * 16] = {};
  for (const std::int64_t length : {1, 2, 17, 63, 64}) {
    const TensorView q{memory[0], DType::f32, {1, length, 1, 16}};
    const MutableTensorView o{memory[1], DType::f32, {1, length, 1, 16}};
    const TensorView k{memory[2], DType::f32, {1, length, 1, 16}};
    const TensorView v{memory[3], DType::f32, {1, length, 1, 16}};
    for (const AttentionBias& bias :
         {AttentionBias{LowerTriangularMask{}}, AttentionBias{LowerTriangularFromBottomRightMask{}}}) {
      const auto call = check({q, k, v, &o, nullptr, false, bias, {}});
      REQUIRE(engine->run(*call).ok());
    }
  }
  CHECK(engine->counters().compiles == 1);
}

TEST_CASE("threads that ask for the same kernel get one compile") {
  const test::TempDir dir;
  auto engine = open_engine({.cache_root = dir.path()});
  std::vector<std::jthread> threads;
  std::array<bool, 8> good{};
  for (bool& result : good) {
    threads.emplace_back([&] { result = engine->prepare(kProblem, kCpu).ok(); });
  }
  threads.clear();
  for (const bool result : good) CHECK(result);
  CHECK(engine->counters().compiles == 1);
  CHECK(engine->counters().loads == 1);
}

TEST_CASE("a damaged entry is refused, quarantined with a warning, and built again") {
  const test::TempDir dir;
  open_engine({.cache_root = dir.path()})->prepare(kProblem, kCpu).ok();
  const auto entries = entries_in(dir.path());
  REQUIRE(entries.size() == 1);
  {
    std::fstream file(entries[0], std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(5000);
    const char byte = static_cast<char>(file.get() ^ 0x10);
    file.seekp(5000);
    file.put(byte);
  }
  Warnings warnings;
  auto engine = open_engine({.cache_root = dir.path()});
  run_and_check(*engine);
  CHECK(engine->counters().cache_defects == 1);
  CHECK(engine->counters().compiles == 1);
  CHECK(warnings.lines.size() == 1);
  CHECK_FALSE(fs::is_empty(dir.path() / "v1" / "quarantine"));
  CHECK(entries_in(dir.path()).size() == 1);
}

/// Replaces the image in every entry by one that is whole, and that no loader takes.
void put_strange_images(const fs::path& root) {
  cache::Store store(root, cache::Mode::rw, [](const std::string& line) { FAIL(line); });
  for (const cache::Listed& listed : store.list()) {
    auto entry = store.inspect(listed.key);
    REQUIRE(entry.ok());
    entry->payload.assign(5000, std::byte{7});
    store.store(*entry);
  }
}

TEST_CASE("an image that the loader refuses is quarantined and compiled exactly once more") {
  const test::TempDir dir;
  REQUIRE(open_engine({.cache_root = dir.path()})->prepare(kProblem, kCpu).ok());
  put_strange_images(dir.path());
  Warnings warnings;
  auto engine = open_engine({.cache_root = dir.path()});
  run_and_check(*engine);
  run_and_check(*engine);
  CHECK(engine->counters().compiles == 1);
  CHECK(engine->counters().loads == 1);
  REQUIRE(warnings.lines.size() == 1);
  CHECK(warnings.lines[0].find("was refused") != std::string::npos);
  CHECK(std::distance(fs::directory_iterator(dir.path() / "v1" / "quarantine"), {}) == 1);
  auto next = open_engine({.cache_root = dir.path()});
  run_and_check(*next);
  CHECK(next->counters().compiles == 0);
}

TEST_CASE("a shared cache's image that the loader refuses is compiled into our own, which comes first") {
  const test::TempDir dir;
  const fs::path shared = dir.path() / "shared";
  REQUIRE(open_engine({.cache_root = shared})->prepare(kProblem, kCpu).ok());
  put_strange_images(shared);
  const auto compiles = [&] {
    auto engine = open_engine({.cache_root = dir.path() / "own", .cache_paths = {shared}});
    run_and_check(*engine);
    return engine->counters().compiles;
  };
  Warnings warnings;
  CHECK(compiles() == 1);
  CHECK(compiles() == 0);
  CHECK(warnings.lines.size() == 1);
  CHECK(entries_in(shared).size() == 1);
  CHECK_FALSE(fs::exists(shared / "v1" / "quarantine"));
}

TEST_CASE("a pack's image that the loader refuses is compiled once; then our own cache has it") {
  const test::TempDir dir;
  const fs::path shared = dir.path() / "shared", file = dir.path() / "strange.pack";
  REQUIRE(open_engine({.cache_root = shared})->prepare(kProblem, kCpu).ok());
  put_strange_images(shared);
  cache::PackWriter writer;
  const cache::Store store(shared, cache::Mode::ro, [](const std::string& line) { FAIL(line); });
  for (const cache::Listed& listed : store.list())
    REQUIRE(writer.add(store.inspect(listed.key).value()).ok());
  REQUIRE(write_file_atomic(file, writer.finish("{}").value(), dir.path()).ok());

  const auto compiles = [&] {
    auto engine = open_engine({.cache_root = dir.path() / "own", .cache_paths = {file}});
    run_and_check(*engine);
    return engine->counters().compiles;
  };
  Warnings warnings;
  CHECK(compiles() == 1);
  CHECK(compiles() == 0);  // although packs come first
  CHECK(warnings.lines.size() == 2);
}

TEST_CASE("a cache folder that goes while the program runs is made again") {
  const test::TempDir dir;
  const fs::path root = dir.path() / "cache";
  auto engine = open_engine({.cache_root = root});
  run_and_check(*engine);
  fs::remove_all(root);
  Warnings warnings;
  run_and_check(*engine);  // it is loaded
  codegen::Problem other = kProblem;
  other.head_dim_v = 32;
  REQUIRE(engine->prepare(other, kCpu).ok());
  CHECK(warnings.lines.empty());
  CHECK(entries_in(root).size() == 1);
  CHECK(engine->counters().cache_stores == 2);
}

TEST_CASE("a cache folder that cannot be made costs a warning, not the call") {
  const test::TempDir dir;
  std::ofstream(dir.path() / "file") << "in the way";
  Warnings warnings;
  auto engine = open_engine({.cache_root = dir.path() / "file" / "cache"});
  run_and_check(*engine);
  CHECK(engine->counters().compiles == 1);
  CHECK(engine->counters().cache_stores == 0);
  REQUIRE(warnings.lines.size() == 1);
  CHECK(warnings.lines[0].find("file") != std::string::npos);
}

TEST_CASE("ATTUNE_JIT=never: a miss fails and says how to precompile; a hit runs") {
  const test::TempDir dir;
  auto never = open_engine({.cache_root = dir.path(), .jit = JitMode::never});
  const auto refused = never->prepare(kProblem, kCpu);
  REQUIRE_FALSE(refused.ok());
  CHECK(refused.failure().kind == ErrorKind::environment);
  CHECK(refused.failure().message.find("attune precompile --arch x86-64-v") != std::string::npos);

  REQUIRE(open_engine({.cache_root = dir.path()})->prepare(kProblem, kCpu).ok());
  CHECK(never->prepare(kProblem, kCpu).ok());  // a failed flight is not remembered
  CHECK(never->counters().compiles == 0);
}

TEST_CASE("ATTUNE_JIT=always and the cache modes") {
  const test::TempDir dir;
  REQUIRE(open_engine({.cache_root = dir.path()})->prepare(kProblem, kCpu).ok());
  const auto compiles = [&](cache::Mode mode, JitMode jit) {
    auto engine = open_engine({.cache_root = dir.path(), .cache_mode = mode, .jit = jit});
    CHECK(engine->prepare(kProblem, kCpu).ok());
    return engine->counters().compiles;
  };
  CHECK(compiles(cache::Mode::rw, JitMode::always) == 1);
  CHECK(compiles(cache::Mode::refresh, JitMode::automatic) == 1);
  CHECK(compiles(cache::Mode::off, JitMode::automatic) == 1);
  CHECK(compiles(cache::Mode::ro, JitMode::automatic) == 0);
}

TEST_CASE("ATTUNE_BACKEND keeps calls off a backend") {
  auto engine = open_engine({.backend = BackendChoice::cuda});
  const auto refused = engine->prepare(kProblem, kCpu);
  REQUIRE_FALSE(refused.ok());
  CHECK(refused.failure().message.starts_with("ATTUNE_BACKEND=cuda forbids CPU tensors"));
}

TEST_CASE("without a cache folder everything works in memory") {
  auto engine = open_engine({});
  run_and_check(*engine);
  CHECK(engine->counters().compiles == 1);
  CHECK(engine->counters().cache_stores == 0);
}

TEST_CASE("templates from a folder take part in the key; a missing one is an error") {
  const test::TempDir dir;
  fs::copy(ATTUNE_SOURCE_DIR "/templates", dir.path() / "templates", fs::copy_options::recursive);
  const auto key_with = [&](const std::string& folder) {
    auto engine = open_engine({.template_dir = folder});
    const auto text = engine->explain(kProblem, (*backend_of(kCpu))->arch(), kCpu);
    REQUIRE(text.ok());
    return text->unit.key.hex();
  };
  const std::string embedded = key_with("");
  CHECK(key_with((dir.path() / "templates").string()) == embedded);  // same text, another place: same key
  std::ofstream(dir.path() / "templates" / "attune" / "semantics.h", std::ios::app) << "// edited\n";
  CHECK(key_with((dir.path() / "templates").string()) != embedded);
  CHECK_FALSE(Engine::create({.template_dir = (dir.path() / "absent").string()}).ok());
}

TEST_CASE(
    "what does not compile fails each time, with the compiler's words, and leaves nothing in the cache") {
  const test::TempDir dir;
  fs::copy(ATTUNE_SOURCE_DIR "/templates", dir.path() / "templates", fs::copy_options::recursive);
  std::ofstream(dir.path() / "templates" / "attune" / "semantics.h", std::ios::app)
      << "#error out of order\n";
  auto engine =
      open_engine({.cache_root = dir.path() / "cache", .template_dir = (dir.path() / "templates").string()});
  for (int attempt = 1; attempt <= 2; ++attempt) {
    const auto prepared = engine->prepare(kProblem, kCpu, nullptr);
    REQUIRE_FALSE(prepared.ok());
    CHECK(prepared.failure().message.find("out of order") != std::string::npos);
    CHECK_FALSE(attend(*engine).has_value());
  }
  CHECK(engine->counters().launches == 0);
  CHECK(entries_in(dir.path() / "cache").empty());
}

TEST_CASE("ATTUNE_RECORD lists each problem once, as precompile reads it") {
  const test::TempDir dir;
  auto engine = open_engine({.record_path = (dir.path() / "record").string()});
  run_and_check(*engine);
  run_and_check(*engine);
  std::ifstream file(dir.path() / "record");
  std::string line;
  REQUIRE(std::getline(file, line));
  const auto problem = codegen::parse_problem(line.substr(0, line.find('#')));
  REQUIRE(problem.ok());
  CHECK(problem->head_dim == 16);
  CHECK_FALSE(std::getline(file, line));
}

TEST_CASE("a merge runs, is recorded, and is precompiled from what was recorded") {
  const test::TempDir dir;
  auto engine = open_engine({.cache_root = dir.path(), .record_path = (dir.path() / "record").string()});
  const float attn[2][4] = {{1, 2, 3, 4}, {5, 6, 7, 8}};  // [1, 1, 1, 4] each, of weights 1 and 3
  const float lse[2] = {0, std::log(3.0f)};
  float output[4] = {};
  const std::vector<TensorView> chunks{{attn[0], DType::f32, {1, 1, 1, 4}},
                                       {attn[1], DType::f32, {1, 1, 1, 4}}};
  const std::vector<TensorView> weights{{&lse[0], DType::f32, {1, 1, 1}}, {&lse[1], DType::f32, {1, 1, 1}}};
  const MutableTensorView result{output, DType::f32, {1, 1, 1, 4}};
  const auto call = check_merge({chunks, weights, &result});
  REQUIRE(call.ok());
  const auto run = engine->run(*call);
  REQUIRE_MESSAGE(run.ok(), run.failure().message);
  for (int i = 0; i < 4; ++i) CHECK(output[i] == doctest::Approx(4 + i));
  CHECK(engine->counters().launches == 1);
  CHECK(last_kernel_name().find("merge") != std::string::npos);

  std::ifstream file(dir.path() / "record");
  std::string line;
  REQUIRE(std::getline(file, line));
  const auto problem = codegen::parse_problem(line.substr(0, line.find('#')));
  REQUIRE(problem.ok());
  CHECK(*problem == call->problem);
  const auto again = open_engine({.cache_root = dir.path()});
  REQUIRE(again->precompile(*problem, (*backend_of(kCpu))->arch()).ok());
  CHECK(again->counters().compiles == 0);
}

TEST_CASE("a merge of nothing launches nothing") {
  auto engine = open_engine({});
  const std::vector<TensorView> chunks{{nullptr, DType::f32, {0, 1, 1, 4}}};
  const std::vector<TensorView> weights{{nullptr, DType::f32, {0, 1, 1}}};
  const MutableTensorView result{nullptr, DType::f32, {0, 1, 1, 4}};
  REQUIRE(engine->run(*check_merge({chunks, weights, &result})).ok());
  CHECK(engine->counters().compiles == 0);
}

TEST_CASE("explain names the kernel, its key and its state") {
  const test::TempDir dir;
  auto engine = open_engine({.cache_root = dir.path()});
  const codegen::Arch arch = (*backend_of(kCpu))->arch();
  const auto state = [&] { return std::string(engine->explain(kProblem, arch, kCpu)->state); };
  CHECK(state() == "absent");
  REQUIRE(engine->precompile(kProblem, arch).ok());
  CHECK(state() == "cached");
  REQUIRE(engine->prepare(kProblem, kCpu).ok());
  CHECK(state() == "loaded");
  const auto object = to_json(*engine->explain(kProblem, arch, kCpu));
  CHECK(object["family"] == "cpu");
  CHECK(object["key"].get<std::string>().size() == 64);
  CHECK(object["spec"]["head_dim"] == 16);
  CHECK(object["verdicts"][0]["reasons"].empty());
}

int main(int argc, char** argv) {
#if !ATTUNE_HAVE_LLVM
  std::puts("[SKIP] built without LLVM: there is no compiler for CPU kernels");
  return 77;
#endif
  program = argv[0];
  if (argc == 3 && std::strcmp(argv[1], "--child") == 0) return child(argv[2]);
  return doctest::Context(argc, argv).run();
}
