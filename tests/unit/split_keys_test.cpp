// Which calls split their keys, into how many parts, and what the two launches are told.
#include "runtime/split_keys.h"

#include "attune/blocks.h"
#include "codegen/choose.h"

#include <doctest/doctest.h>

#include <vector>

using namespace attune;
using kernel::Edge;
using kernel::i64;
using runtime::Call;

namespace {

constexpr int kMultiprocessors = 132;

/// One query of each batch entry, with keys of its own for each head.
Call decoding(int batch, int heads, int keys) {
  Call call;
  call.problem = {.dtype = kernel::DType::bf16,
                  .output_dtype = kernel::DType::bf16,
                  .head_dim = 128,
                  .head_dim_v = 96,
                  .boxes = 1};
  call.params.batch = batch;
  call.params.groups = heads;
  call.params.heads = 1;
  call.params.len_q = 1;
  call.params.len_k = keys;
  return call;
}

int parts(const Call& call, const char* arch = "sm_90a") {
  return runtime::splits_of(call, *codegen::arch_from_name(arch), kMultiprocessors);
}

/// The keys that a query sees are the last `seen`.
Call in_window(Call call, int seen) {
  call.problem.window_left = call.problem.window_right = Edge::bounded;
  call.params.reach = kernel::make_reach(kernel::Anchor::bottom_right, seen - 1, 0);
  call.params.window = kernel::window_of(call.params.reach, call.params.len_q, call.params.len_k);
  return call;
}

}  // namespace

TEST_CASE("keys are split where tiles are few, by their number and that of the keys") {
  CHECK(parts(decoding(1, 32, 4096)) == 8);
  CHECK(parts(decoding(4, 8, 4096)) == 8);
  CHECK(parts(decoding(1, 32, 1000)) == 7);  // of 128 keys each
  CHECK(parts(decoding(4, 32, 65536)) == 2);
  CHECK(parts(decoding(16, 32, 1024)) == 2);  // which leaves none idle, but has more copies under way
  CHECK(parts(decoding(16, 32, 1023)) == 1);
  CHECK(parts(decoding(1, 32, 255)) == 1);
  CHECK(parts(decoding(1, 32, 0)) == 1);
  CHECK(parts(decoding(0, 32, 4096)) >= 1);
}

TEST_CASE("more parts than the merge reads at once are for many keys") {
  CHECK(parts(decoding(1, 8, 4096)) == 16);
  CHECK(parts(decoding(1, 1, 4096)) == 16);
  CHECK(parts(decoding(1, 1, 32768)) == 32);
  CHECK(parts(decoding(1, 1, 1 << 20)) == kMultiprocessors);
}

TEST_CASE("other calls are not split") {
  const auto changed = [](auto&& change) {
    Call call = decoding(1, 32, 4096);
    change(call);
    return parts(call);
  };
  CHECK(changed([](Call&) {}) == 8);
  CHECK(changed([](Call& call) { call.params.len_q = 16; }) == 8);
  CHECK(changed([](Call& call) { call.params.len_q = 64; }) == 2);  // four tiles of each head
  CHECK(changed([](Call& call) { call.params.len_q = 65; }) == 1);
  CHECK(changed([](Call& call) { call.problem.dtype = kernel::DType::f32; }) == 1);
  CHECK(changed([](Call& call) { call.problem.bias = kernel::Bias::bf16; }) == 1);
  CHECK(changed([](Call& call) { call.problem.dropout = kernel::Dropout::on; }) == 1);
  CHECK(changed([](Call& call) { call.problem.head_dim = 264; }) == 1);
  CHECK(changed([](Call& call) { call.problem.families = codegen::only(kernel::Family::sm90); }) == 1);
  CHECK(parts(decoding(1, 32, 4096), "sm_75") == 1);
  CHECK(parts(decoding(1, 32, 4096), "sm_80") == 8);
  CHECK(parts(decoding(1, 32, 4096), "x86-64-v4") == 1);
}

TEST_CASE("heads that share keys and have one query each are one tile, of 16 at most") {
  Call call = decoding(4, 2, 4096);
  call.params.heads = 8;
  call.params.key_strides =
      call.params.value_strides = {.batch = 1 << 20, .seq = 256, .group = 128, .head = 0};
  CHECK(parts(call) == 16);
  call.params.heads = 32;
  call.params.groups = 8;
  CHECK(parts(call) == 4);
  call.params.len_q = 2;  // not packed: each head is a tile
  call.params.groups = 1;
  CHECK(parts(call) == 2);
}

TEST_CASE("keys that a window hides count for nothing") {
  CHECK(parts(in_window(decoding(1, 32, 65536), 65536)) == 8);
  CHECK(parts(in_window(decoding(1, 32, 65536), 512)) == 4);
  CHECK(parts(in_window(decoding(1, 32, 65536), 100)) == 1);
  Call top_left = decoding(1, 32, 65536);
  top_left.problem.window_right = Edge::bounded;
  CHECK(parts(top_left) == 1);  // its one query sees the first key alone
}

TEST_CASE("lengths on the device: by what there is room for") {
  Call call = decoding(1, 8, 4 * 8192);
  call.problem.blocks = kernel::Blocks::varlen;
  call.params.len_q = 4;
  call.params.sequences.count = 4;
  CHECK(parts(call) == 8);
  call.params.len_q = 4 * 64;
  CHECK(parts(call) == 2);
  call.params.len_q = 4;
  call.problem.keys = kernel::Keys::paged;
  call.params.sequences.page_size = kernel::make_divider(16);
  call.params.sequences.table_width = 32;  // 512 keys, however many pages there are
  CHECK(parts(call) == 4);
  call.params.sequences.count = 0;
  CHECK(parts(call) >= 1);
}

TEST_CASE("a call in parts writes them into the workspace, and the merge reads them there") {
  Call call = decoding(2, 3, 4096);
  call.problem.lse = kernel::Lse::skip;
  float output = 0;
  call.params.output = &output;
  call.params.output_strides = {.batch = 1000, .seq = 300, .group = 100, .head = 7};
  CHECK(runtime::workspace_bytes(call) == 0);
  call.params.splits = 5;
  const i64 rows = 2 * 3;
  REQUIRE(runtime::workspace_bytes(call) == 5 * rows * (96 + 1) * sizeof(float));
  std::vector<float> workspace(runtime::workspace_bytes(call) / sizeof(float));
  call.workspace = workspace.data();

  runtime::SplitCall split;
  runtime::split_keys(call, split);
  const kernel::ForwardParams& told = split.attention.params;
  CHECK(told.splits == 5);
  CHECK(told.output == workspace.data());
  CHECK(told.lse == workspace.data() + 5 * rows * 96);
  CHECK(split.attention.problem.split == kernel::Split::on);
  CHECK(split.attention.problem.output_dtype == kernel::DType::f32);
  CHECK(split.attention.problem.lse == kernel::Lse::write);

  const kernel::MergeParams& merge = split.merge.params;
  CHECK(merge.chunks == 5);
  CHECK(merge.output == &output);
  CHECK(merge.output_strides.batch == 1000);
  CHECK(merge.chunk[0].output == told.output);
  CHECK(merge.chunk[0].lse == told.lse);
  CHECK(merge.output_step == rows * 96);
  CHECK(merge.lse_step == rows);
  CHECK(merge.row_begin == nullptr);
  CHECK(split.merge.problem.output_dtype == kernel::DType::bf16);
  CHECK(split.merge.problem.lse == kernel::Lse::skip);
  CHECK(split.merge.problem.head_dim_v == 96);
}

TEST_CASE("the merge of packed sequences leaves rows of none alone") {
  Call call = decoding(1, 2, 4096);
  const kernel::i32 starts[] = {1, 2, 5};
  call.problem.blocks = kernel::Blocks::varlen;
  call.params.sequences.count = 2;
  call.params.sequences.q_start = starts;
  call.params.splits = 3;
  runtime::SplitCall split;
  runtime::split_keys(call, split);
  CHECK(*split.merge.params.row_begin == 1);
  CHECK(*split.merge.params.row_end == 5);
  CHECK(split.merge.problem.blocks == kernel::Blocks::varlen);
}
