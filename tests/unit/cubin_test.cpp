#include "cache/cubin.h"

#include "base/file.h"
#include "tests/support/temp_dir.h"
#include "tiny_cubin.h"

#include <doctest/doctest.h>

#include <array>
#include <cstdio>
#include <fstream>
#include <map>

namespace attune::cache {
namespace {

namespace fs = std::filesystem;
using test::TinyCubin;
using Bytes = std::vector<std::byte>;

constexpr std::uint32_t kSm80 = 0x6005004;  // e_flags as ptxas 13 writes them, ABI version 8
constexpr std::uint32_t kSm90a = 0x6005a04;
constexpr std::uint32_t kSm60 = 0x6003c04;    // which CUDA 13 does not know
constexpr std::uint32_t kOldSm86 = 0x560556;  // as ptxas 12 writes them, ABI version 7

TEST_CASE("a cubin's kernels, by name") {
  const Bytes file = TinyCubin::build(kSm80, 8,
                                      {{.name = "zeta",
                                        .registers = 40,
                                        .stack = 16,
                                        .barriers = 2,
                                        .shared = 1200,
                                        .threads = {64, 2, 1},
                                        .parameter_bytes = {344, 8},
                                        .code = 640},
                                       {.name = "helper", .registers = 99, .entry = false},
                                       {.name = "alpha", .registers = 255, .code = 128}});
  const auto info = read_cubin(file);
  REQUIRE(info.ok());
  CHECK(info->sm == 80);
  REQUIRE(info->kernels.size() == 2);
  const CubinKernel& alpha = info->kernels[0];
  CHECK(alpha.name == "alpha");
  CHECK(alpha.registers == 255);
  CHECK(alpha.shared_bytes == 0);
  CHECK(alpha.max_threads == 0);
  CHECK(alpha.parameter_bytes.empty());
  const CubinKernel& zeta = info->kernels[1];
  CHECK(zeta.name == "zeta");
  CHECK(zeta.registers == 40);
  CHECK(zeta.stack_bytes == 16);
  CHECK(zeta.barriers == 2);
  CHECK(zeta.shared_bytes == 1200);
  CHECK(zeta.max_threads == 128);
  CHECK(zeta.parameter_bytes == std::vector{344, 8});
  CHECK(zeta.code_bytes == 640);
}

TEST_CASE("the architecture, in both ABI versions") {
  CHECK(read_cubin(TinyCubin::build(kSm90a, 8, {}))->sm == 90);
  CHECK(read_cubin(TinyCubin::build(kOldSm86, 7, {}))->sm == 86);
}

TEST_CASE("instructions by class, where their encoding is known") {
  // IADD3, FFMA with its operands in three ways, HMMA, HGMMA, MUFU, LDG, STG, LDS, STS, LDL, STL, BAR, NOP
  const std::vector<std::uint16_t> opcodes{0x7210, 0x7223, 0x7423, 0x7823, 0x723c, 0x79f0, 0x7308, 0x7981,
                                           0x7986, 0x7984, 0x7388, 0x7983, 0x7387, 0x7b1d, 0x7918};
  const auto counts_for = [&](std::uint32_t flags) {
    const auto info = read_cubin(TinyCubin::build(flags, 8, {{.name = "k", .opcodes = opcodes}}));
    REQUIRE(info.ok());
    return info->kernels[0].instructions;
  };
  CHECK(counts_for(kSm80) == InstructionCounts{.all = 14,
                                               .tensor = 2,
                                               .float32 = 3,
                                               .special = 1,
                                               .global = 2,
                                               .shared = 2,
                                               .local = 2,
                                               .barrier = 1});
  CHECK_FALSE(counts_for(kSm60));
}

TEST_CASE("barriers, where each ABI version keeps them") {
  const auto old_one = read_cubin(TinyCubin::build(kOldSm86, 7, {{.name = "k", .flag_barriers = 16}}));
  CHECK(old_one->kernels[0].barriers == 16);
  const auto new_one = read_cubin(TinyCubin::build(kSm80, 8, {{.name = "k", .barriers = 16}}));
  CHECK(new_one->kernels[0].barriers == 16);
}

TEST_CASE("shared memory without the driver's part") {
  const auto shared = [](std::uint32_t flags, std::uint32_t section) {
    return read_cubin(TinyCubin::build(flags, 8, {{.name = "k", .shared = section}}))
        ->kernels[0]
        .shared_bytes;
  };
  CHECK(shared(kSm80, 1024) == 1024);
  CHECK(shared(kSm90a, 1024) == 0);
  CHECK(shared(kSm90a, 2224) == 1200);
}

TEST_CASE("refusals say what is wrong") {
  const auto refusal = [](const Bytes& file) {
    const auto info = read_cubin(file);
    return info.ok() ? "accepted" : info.failure().message;
  };
  CHECK(refusal({}) == "not a readable cubin: 0 bytes are no ELF file");
  CHECK(refusal(Bytes(100)) == "not a readable cubin: it is no ELF file");
  const Bytes good = TinyCubin::build(kSm80, 8, {{.name = "k"}});

  Bytes file = good;
  file[offsetof(Elf64_Ehdr, e_machine)] = std::byte{62};
  CHECK(refusal(file) == "not a readable cubin: it is an ELF file for machine 62, not 64-bit CUDA");
  file = good;
  file[offsetof(Elf64_Ehdr, e_shstrndx)] = std::byte{200};
  CHECK(refusal(file) == "not a readable cubin: its section table is malformed");
  file = good;
  file[offsetof(Elf64_Ehdr, e_shoff) + 7] = std::byte{0xff};
  CHECK(refusal(file).find("the section table is bytes") != std::string::npos);
  file = good;
  file.pop_back();
  CHECK(refusal(file).find("the section table is bytes") != std::string::npos);
  CHECK(refusal(TinyCubin::build(kSm80, 8, {{.name = "k", .registers = 0x80000000}})) ==
        "not a readable cubin: 2147483648 registers");
  CHECK(refusal(TinyCubin::build(kSm80, 8, {{.name = "k", .threads = {1U << 20, 1U << 20, 1U << 20}}})) ==
        "not a readable cubin: 1099511627776 threads");
  CHECK(refusal(TinyCubin::build(kSm80, 8, {{.name = std::string(5000, 'k')}})) ==
        "not a readable cubin: a name has no end");
}

// ---- Against ptxas's own report ----

constexpr const char* kSource = R"(
extern "C" __global__ void __launch_bounds__(192) alpha(float* p, int n) {
  __shared__ float s[300];
  s[threadIdx.x] = p[threadIdx.x];
  __syncthreads();
  p[threadIdx.x] = s[(threadIdx.x * 7) % 192] + n;
}
extern "C" __global__ void beta(volatile float* p, int n) {
  volatile float local[500];
  for (int i = 0; i < 500; ++i) local[i] = p[i * n];
  p[threadIdx.x] = local[n % 500];
}
)";

std::string output_of(const std::string& command, int& status) {
  std::FILE* pipe = popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  std::string text;
  std::array<char, 512> buffer{};
  while (std::fgets(buffer.data(), buffer.size(), pipe) != nullptr) text += buffer.data();
  status = pclose(pipe);
  return text;
}

/// The number that stands before `unit`, or 0.
int number_before(const std::string& text, const std::string& unit) {
  const std::size_t end = text.find(unit);
  if (end == std::string::npos) return 0;
  const std::size_t begin = text.find_last_not_of("0123456789", end - 1) + 1;
  return std::stoi(text.substr(begin, end - begin));
}

std::map<std::string, CubinKernel> kernels_of_log(const std::string& log) {
  const std::string heading = "Function properties for ";
  std::map<std::string, CubinKernel> kernels;
  for (std::size_t at = log.find(heading); at != std::string::npos;) {
    at += heading.size();
    const std::size_t next = log.find(heading, at);
    const std::string part = log.substr(at, next - at);
    const std::string name = part.substr(0, part.find_first_of(" \n"));
    kernels[name] = {.name = name,
                     .registers = number_before(part, " registers"),
                     .stack_bytes = number_before(part, " bytes stack frame"),
                     .shared_bytes = number_before(part, " bytes smem"),
                     .barriers = number_before(part, " barriers")};
    at = next;
  }
  return kernels;
}

TEST_CASE("a real cubin reads as ptxas reports it") {
  int status = 0;
  std::string nvcc = output_of("PATH=$PATH:/usr/local/cuda/bin command -v nvcc", status);
  if (status != 0) {
    MESSAGE("skipped: no nvcc on PATH or in /usr/local/cuda/bin");
    return;
  }
  nvcc.pop_back();
  const test::TempDir dir;
  const std::string base = (dir.path() / "k").string();
  std::ofstream(base + ".cu") << kSource;
  for (const std::string arch : {"sm_80", "sm_90a"}) {
    CAPTURE(arch);
    const std::string log = output_of(
        nvcc + " -cubin -arch=" + arch + " -Xptxas -v -o " + base + ".cubin " + base + ".cu 2>&1", status);
    REQUIRE_MESSAGE(status == 0, log);
    const auto bytes = read_file(base + ".cubin");
    REQUIRE(bytes.ok());
    const auto info = read_cubin(*bytes);
    REQUIRE_MESSAGE(info.ok(), info.failure().message);
    CHECK(info->sm == std::stoi(arch.substr(3)));
    const auto reported = kernels_of_log(log);
    REQUIRE(reported.size() == 2);
    REQUIRE(info->kernels.size() == 2);
    for (const CubinKernel& kernel : info->kernels) {
      CAPTURE(kernel.name);
      const CubinKernel& expected = reported.at(kernel.name);
      CHECK(kernel.registers == expected.registers);
      CHECK(kernel.stack_bytes == expected.stack_bytes);
      CHECK(kernel.shared_bytes == expected.shared_bytes);
      CHECK(kernel.barriers == expected.barriers);
      CHECK(kernel.code_bytes > 0);
      CHECK(kernel.code_bytes % 128 == 0);  // instructions of 16 bytes, padded
      REQUIRE(kernel.instructions);
      CHECK(kernel.instructions->all > 0);
      CHECK((kernel.instructions->local > 0) == (kernel.stack_bytes > 0));
    }
    CHECK(info->kernels[0].shared_bytes == 1200);
    CHECK(info->kernels[0].max_threads == 192);
    CHECK(info->kernels[1].stack_bytes == 2000);
    CHECK(info->kernels[1].max_threads == 0);
  }
}

}  // namespace
}  // namespace attune::cache
