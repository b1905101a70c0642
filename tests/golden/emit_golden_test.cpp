// The generated text of one kernel per entry point, as files: a change of the printer shows as a diff. To
// accept a change, run this test with --update.
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>

#define DOCTEST_CONFIG_IMPLEMENT
#include "codegen/choose.h"
#include "codegen/emit.h"
#include "codegen/problem.h"

#include <doctest/doctest.h>

using namespace attune::codegen;

namespace {

bool update = false;

struct Golden {
  const char* file;
  const char* arch;
  const char* problem;
};

constexpr Golden kGoldens[] = {
    {"forward_cpu.txt", "x86-64-v4", "dtype=f32 head_dim=64 window_right=bounded lse=write"},
    {"forward_simt.txt", "sm_60", "dtype=f32 head_dim=40 head_dim_v=72"},
    {"forward_mma.txt", "sm_90a",
     "dtype=bf16 output_dtype=f32 head_dim=128 window_left=bounded window_right=bounded blocks=varlen "
     "keys=paged "
     "bias=boolean dropout=on lse=write"},
    {"forward_split_mma.txt", "sm_80",
     "dtype=f16 output_dtype=f32 head_dim=128 blocks=varlen keys=paged window_right=bounded lse=write "
     "split=on"},
    {"forward_sm90.txt", "sm_90a", "dtype=f16 head_dim=128 window_right=bounded lse=write boxes=1"},
    {"merge_cpu.txt", "x86-64-v3", "operation=merge dtype=f32 output_dtype=f16 head_dim_v=64"},
    {"merge_gpu.txt", "sm_80", "operation=merge dtype=f16 head_dim_v=128 lse=write"},
    {"merge_split_gpu.txt", "sm_90a",
     "operation=merge dtype=f32 output_dtype=f16 head_dim_v=128 blocks=varlen split=on"},
    {"grad_query_cpu.txt", "x86-64-v4",
     "operation=grad_query dtype=f16 head_dim=64 head_dim_v=80 dropout=on"},
    {"grad_key_value_cpu.txt", "x86-64-v3",
     "operation=grad_key_value dtype=f32 head_dim=256 window_right=bounded bias=f16"},
    {"grad_bias_sm90.txt", "sm_90a", "operation=grad_bias dtype=bf16 head_dim=128 bias=bf16 boxes=1"},
    {"grad_key_value_sm90.txt", "sm_90a",
     "operation=grad_key_value dtype=bf16 head_dim=64 query_gradient=ordered boxes=1"},
    {"grad_key_value_wide_sm90.txt", "sm_90a",
     "operation=grad_key_value dtype=f16 head_dim=192 window_right=bounded query_gradient=atomic boxes=1"},
    {"grad_key_value_cluster_sm90.txt", "sm_90a",
     "operation=grad_key_value dtype=bf16 head_dim=256 query_gradient=atomic boxes=1"},
    {"grad_merge_gpu.txt", "sm_90a", "operation=grad_merge dtype=bf16 output_dtype=f32 head_dim_v=80"},
    {"delta.txt", "sm_80", "operation=delta dtype=bf16 output_dtype=f32 head_dim=96 head_dim_v=128"},
    {"grad_query_simt.txt", "sm_70",
     "operation=grad_query dtype=f16 head_dim=64 window_right=bounded dropout=on"},
    {"grad_key_value_simt.txt", "sm_60",
     "operation=grad_key_value dtype=f32 head_dim=512 head_dim_v=40 blocks=varlen keys=paged"},
    {"grad_key_value_mma.txt", "sm_90a",
     "operation=grad_key_value dtype=bf16 head_dim=128 window_right=bounded query_gradient=atomic"},
};

std::string path_of(const Golden& golden) {
  return std::string(ATTUNE_SOURCE_DIR "/tests/golden/emit/") + golden.file;
}

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

}  // namespace

TEST_CASE("generated sources equal the goldens") {
  for (const Golden& golden : kGoldens) {
    CAPTURE(golden.file);
    const auto arch = arch_from_name(golden.arch);
    REQUIRE(arch.ok());
    const auto choice = choose(*parse_problem(golden.problem), *arch);
    REQUIRE(choice.ok());
    const std::string source = emit(choice->spec, *arch);
    if (update) std::ofstream(path_of(golden), std::ios::binary) << source;
    CHECK(source == read(path_of(golden)));
  }
}

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) update = update || std::strcmp(argv[i], "--update") == 0;
  return doctest::Context(argc, argv).run();
}
