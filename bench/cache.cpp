// What the cache costs its users, without a device: opening a pack, finding in it, finding on disk, deriving
// a key, and the hot look-up.
//   bench_cache [--kernels N] [--json]
//   bench_cache --first key|nvrtc TARGET
// The second prints the microseconds of that in a process that has done nothing else: the first runs it for
// its figures of fresh processes.
#include "cache/pack.h"
#include "cache/pack_writer.h"
#include "cache/store.h"
#include "codegen/choose.h"
#include "codegen/embedded.h"
#include "codegen/unit.h"
#include "runtime/cuda/cuda_backend.h"
#include "runtime/hot_table.h"
#include "tests/support/temp_dir.h"

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

namespace fs = std::filesystem;
using attune::Digest;
using attune::cache::Entry;
using attune::codegen::Problem;
using Clock = std::chrono::steady_clock;

struct Figure {
  std::string name;
  std::string unit;
  double median = 0, low = 0, high = 0;  // low and high: the middle 80 per cent
};

/// Calls `sample` often; it returns how long one operation took, in the figure's unit.
Figure measure(const std::string& name, const std::string& unit, int samples,
               const std::function<double()>& sample) {
  for (int i = 0; i < samples / 10 + 1; ++i) sample();
  std::vector<double> times;
  for (int i = 0; i < samples; ++i) times.push_back(sample());
  std::ranges::sort(times);
  return {name, unit, times[times.size() / 2], times[times.size() / 10], times[times.size() * 9 / 10]};
}

template <typename Period>
double since(Clock::time_point begin) {
  return std::chrono::duration<double, Period>(Clock::now() - begin).count();
}

/// A benchmark that cannot do its work has no figure.
template <typename T>
T must(attune::Result<T> result) {
  if (result.ok()) return std::move(*result);
  std::fprintf(stderr, "%s\n", result.failure().message.c_str());
  std::exit(3);
}
void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(3);
}

// ---- Packs and the store ----

/// An entry of a real kernel's size: 1.4 kB of metadata and 32 kB of payload, of which half repeats.
Entry kernel_like(int number) {
  std::mt19937 random(static_cast<std::uint32_t>(number));
  Entry entry{.key = attune::sha256(std::to_string(number)),
              .metadata_json = std::string(1400, ' '),
              .payload = std::vector<std::byte>(32 << 10)};
  for (std::size_t i = 0; i < entry.payload.size(); i += 2)
    entry.payload[i] = static_cast<std::byte>(random());
  return entry;
}

void write(const fs::path& path, const std::vector<std::byte>& bytes) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

std::vector<Figure> bench_pack(const fs::path& folder, int kernels) {
  using attune::cache::Pack;
  // Index and manifest decide what opening costs; a few payloads are enough to find in.
  constexpr int kWhole = 64;
  attune::cache::PackWriter writer;
  for (int i = 0; i < kernels; ++i) {
    Entry entry = kernel_like(i);
    if (i >= kWhole) entry.payload.resize(16);
    require(writer.add(entry).ok(), "cannot add to the pack");
  }
  const fs::path path = folder / "the.pack";
  write(path, must(writer.finish(std::string(2000, ' '))));
  std::vector<Figure> figures{measure("pack open, " + std::to_string(kernels) + " kernels", "ms", 200, [&] {
    const auto begin = Clock::now();
    const Pack pack = must(Pack::open(path));
    return since<std::milli>(begin);
  })};
  const Pack pack = must(Pack::open(path));
  int next = 0;
  figures.push_back(measure("pack find, 32 KiB", "us", 2000, [&] {
    const Digest key = attune::sha256(std::to_string(next++ % kWhole));
    const auto begin = Clock::now();
    require(must(pack.find(key)).has_value(), "the pack lacks a kernel");
    return since<std::micro>(begin);
  }));
  figures.push_back(measure("pack find, absent", "us", 2000, [&] {
    const Digest key = attune::sha256("absent" + std::to_string(next++));
    const auto begin = Clock::now();
    require(!must(pack.find(key)).has_value(), "the pack has too much");
    return since<std::micro>(begin);
  }));
  return figures;
}

Figure bench_store(const fs::path& folder) {
  attune::cache::Store store(folder / "cache", attune::cache::Mode::rw,
                             [](const std::string& line) { require(false, line.c_str()); });
  constexpr int kEntries = 64;
  for (int i = 0; i < kEntries; ++i) store.store(kernel_like(i));
  int next = 0;
  return measure("store find, 32 KiB", "us", 2000, [&] {
    const Digest key = attune::sha256(std::to_string(next++ % kEntries));
    const auto begin = Clock::now();
    require(store.find(key).has_value(), "the store lacks a kernel");
    return since<std::micro>(begin);
  });
}

// ---- Keys ----

/// Microseconds from problem to key, all of it: choice, source, SHA-256 of the fields.
double time_key(const Problem& problem, const attune::codegen::Arch& arch) {
  const attune::codegen::CompilerId compiler{.name = "nvrtc 13.0 0123456789abcdef",
                                             .options = {"-std=c++20", "--no-cache", "-default-device"}};
  const auto begin = Clock::now();
  const auto choice = must(attune::codegen::choose(problem, arch));
  const auto unit =
      attune::codegen::make_unit(choice.spec, arch, compiler, attune::codegen::embedded_files());
  require(unit.key != Digest(), "no key");
  return since<std::micro>(begin);
}

Figure bench_key(const char* target) {
  const auto arch = must(attune::codegen::arch_from_name(target));
  Problem problem;
  int next = 0;
  return measure(std::string("key derivation, ") + target, "us", 2000, [&] {
    problem.head_dim = problem.head_dim_v = 16 + 8 * (next++ % 28);
    return time_key(problem, arch);
  });
}

/// Microseconds of what a process does once: its first key, while the code is not mapped yet, or the look at
/// NVRTC's file, after the search for a driver.
double time_first(const std::string& what, const attune::codegen::Arch& arch) {
  if (what == "key") return time_key({.head_dim = 64, .head_dim_v = 64}, arch);
  static_cast<void>(attune::runtime::cuda_backend(0));
  const auto begin = Clock::now();
  static_cast<void>(attune::runtime::nvrtc_at_a_glance(arch));
  return since<std::micro>(begin);
}

/// time_first() in processes of its own.
Figure bench_first(const std::string& name, const std::string& what, const std::string& target) {
  const std::string program = fs::read_symlink("/proc/self/exe").string();
  const std::string command = "'" + program + "' --first " + what + " " + target;
  return measure(name + " in a fresh process, " + target, "us", 100, [&] {
    double took = 0;
    std::FILE* const output = popen(command.c_str(), "r");
    require(output != nullptr && std::fscanf(output, "%lf", &took) == 1 && pclose(output) == 0,
            "no fresh process");
    return took;
  });
}

// ---- The hot look-up ----

/// As a serving process sees them: a few hundred kernels that differ in some fields.
std::vector<Problem> many_problems() {
  std::vector<Problem> problems;
  for (int head_dim = 8; head_dim <= 256; head_dim += 8) {
    for (const auto right : {attune::kernel::Edge::open, attune::kernel::Edge::bounded}) {
      for (const auto lse : {attune::kernel::Lse::skip, attune::kernel::Lse::write}) {
        Problem problem;
        problem.head_dim = problem.head_dim_v = head_dim;
        problem.window_right = right;
        problem.lse = lse;
        problems.push_back(problem);
      }
    }
  }
  return problems;
}

/// Nanoseconds of one look-up, on each of `threads` at the same time.
Figure bench_hot(int threads) {
  constexpr int kLookUps = 200'000;
  attune::runtime::HotTable table;
  std::vector<Problem> problems = many_problems();
  for (const Problem& problem : problems) {
    table.insert(
        std::make_unique<attune::runtime::ReadyKernel>(attune::runtime::ReadyKernel{problem, nullptr, ""}));
  }
  std::ranges::shuffle(problems, std::mt19937(7));
  return measure(
      "hot look-up, " + std::to_string(problems.size()) + " kernels, threads: " + std::to_string(threads),
      "ns", 50, [&] {
        std::barrier start(threads);
        std::vector<double> took(static_cast<std::size_t>(threads));
        {
          std::vector<std::jthread> workers;
          for (int t = 0; t < threads; ++t) {
            workers.emplace_back([&, t] {
              start.arrive_and_wait();
              const auto begin = Clock::now();
              std::size_t at = static_cast<std::size_t>(t) * 31;
              for (int i = 0; i < kLookUps; ++i) {
                require(table.find(problems[at]) != nullptr, "the table lacks a kernel");
                if (++at >= problems.size()) at = 0;
              }
              took[static_cast<std::size_t>(t)] = since<std::nano>(begin) / kLookUps;
            });
          }
        }
        return *std::ranges::max_element(took);
      });
}

void print(const std::vector<Figure>& figures, bool json) {
  if (json) std::printf("[");
  for (std::size_t i = 0; i < figures.size(); ++i) {
    const Figure& f = figures[i];
    if (json) {
      std::printf("%s{\"name\": \"%s\", \"unit\": \"%s\", \"median\": %.4f, \"p10\": %.4f, \"p90\": %.4f}",
                  i == 0 ? "" : ",\n ", f.name.c_str(), f.unit.c_str(), f.median, f.low, f.high);
    } else {
      std::printf("%-44s %9.3f %s  (%.3f to %.3f)\n", f.name.c_str(), f.median, f.unit.c_str(), f.low,
                  f.high);
    }
  }
  if (json) std::printf("]\n");
}

}  // namespace

int main(int argc, char** argv) {
  bool json = false;
  int kernels = 10'000;
  for (int i = 1; i < argc; ++i) {
    json = json || std::strcmp(argv[i], "--json") == 0;
    if (std::strcmp(argv[i], "--first") == 0 && i + 2 < argc) {
      std::printf("%f\n", time_first(argv[i + 1], must(attune::codegen::arch_from_name(argv[i + 2]))));
      return 0;
    }
    if (std::strcmp(argv[i], "--kernels") == 0 && i + 1 < argc) kernels = std::max(64, std::atoi(argv[++i]));
  }
  const attune::test::TempDir folder;
  std::vector<Figure> figures = bench_pack(folder.path(), kernels);
  figures.push_back(bench_store(folder.path()));
  for (const char* target : {"x86-64-v4", "sm_80", "sm_90a"}) figures.push_back(bench_key(target));
  for (const char* target : {"x86-64-v4", "sm_80", "sm_90a"}) {
    figures.push_back(bench_first("key derivation", "key", target));
  }
  figures.push_back(bench_first("a glance at NVRTC", "nvrtc", "sm_90a"));
  for (const int threads : {1, 2}) figures.push_back(bench_hot(threads));
  print(figures, json);
  return 0;
}
