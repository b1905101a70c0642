// The blocks of a launch: batch and heads far beyond 65535, and what CUDA cannot launch is refused.
#include "attune/blocks.h"
#include "attune/merge.h"
#include "runtime/cuda/grid.h"

#include <doctest/doctest.h>

using namespace attune;
using runtime::blocks_of;

TEST_CASE("every block that the x axis of a grid has can be used") {
  const kernel::KernelSpec spec{.head_dim_v = 8, .block_m = 128, .block_v = 8};
  const kernel::ForwardParams params{.batch = 100'000, .groups = 1, .heads = 20'000, .len_q = 100};
  const auto blocks = blocks_of(kernel::forward_slots(spec, params), spec.block_m);
  REQUIRE(blocks.ok());
  CHECK(*blocks == 2'000'000'000u);
  REQUIRE(blocks_of(2'147'483'647, 64).ok());
}

TEST_CASE("more blocks are unsupported") {
  const kernel::KernelSpec spec{.operation = kernel::Operation::merge, .block_m = 4};
  const kernel::MergeParams params{.batch = 100'000, .groups = 1, .heads = 100'000, .len = 1};
  const auto blocks = blocks_of(kernel::merge_slots(spec, params), spec.block_m);
  REQUIRE(!blocks.ok());
  CHECK(blocks.failure().kind == ErrorKind::unsupported);
  CHECK(blocks.failure().message ==
        "this call needs 2500000000 thread blocks of 4 rows, CUDA launches 2147483647 at once: split the "
        "batch");
}
