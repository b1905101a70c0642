// Random problems over the whole surface: every launch is one that the driver takes, and none is one too
// many. With ATTUNE_TEST_PRINT=1 the launches are printed: two builds that launch the same print the same for
// one ATTUNE_TEST_SEED, but for the addresses of what Attune allocates.
#include "attune/params.h"
#include "runtime/cuda/cuda_backend.h"
#include "runtime/raise.h"
#include "tests/driver/example.h"
#include "tests/driver/old_driver.h"
#include "tests/driver/stand_in.h"
#include "tests/support/random.h"
#include "tools/verify/arena.h"
#include "tools/verify/case.h"
#include "tools/verify/kernel_classes.h"

#include <doctest/doctest.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

using namespace attune;
using namespace attune::test;
using stand_in::Launch;

namespace {

constexpr int kClasses = 6;
constexpr int kCases = 60;

/// What a launch says, with addresses counted from the query's, those of the workspace from its begin. Where
/// lists lie is left out.
class Text {
 public:
  explicit Text(const Launch& launch) : launch_(launch) {
    text_ = fmt::format("{} x {}, {} bytes:", launch.blocks, launch.threads, launch.shared_bytes);
  }

  std::string of_launch() {
    switch (launch_.parameters.size()) {
      case sizeof(kernel::ForwardParams): add(launch_.told<kernel::ForwardParams>()); break;
      case sizeof(kernel::ForwardSm90Params): add(launch_.told<kernel::ForwardSm90Params>()); break;
      case sizeof(kernel::BackwardParams): add(launch_.told<kernel::BackwardParams>()); break;
      case sizeof(kernel::GradKeyValueSm90Params): add(launch_.told<kernel::GradKeyValueSm90Params>()); break;
      case sizeof(kernel::GradBiasSm90Params): add(launch_.told<kernel::GradBiasSm90Params>()); break;
      default: text_ += " a merge";
    }
    return text_;
  }

 private:
  template <typename... Numbers>
  void numbers(const Numbers&... values) {
    ((text_ += fmt::format(" {}", values)), ...);
  }
  void address(const void* pointer) {
    text_ += pointer == nullptr ? " -" : fmt::format(" {:+}", static_cast<const std::byte*>(pointer) - base_);
  }
  void add(const kernel::Strides& s) { numbers(s.batch, s.seq, s.group, s.head); }
  void add(const kernel::TensorMap& opaque) {
    const stand_in::TensorMap map = stand_in::tensor_map(&opaque);
    address(map.data);
    text_ += fmt::format(" {} {} {} {} {}", map.extents, map.strides, map.box, map.type, map.swizzle);
  }
  void add(const kernel::ForwardParams& p) {
    base_ = static_cast<const std::byte*>(p.query);
    for (const void* tensor : {p.key, p.value, p.bias, static_cast<const void*>(p.output)}) address(tensor);
    address(p.lse);
    for (const auto& s : {p.query_strides, p.key_strides, p.value_strides, p.output_strides}) add(s);
    numbers(p.batch, p.groups, p.heads, p.len_q, p.len_k, p.window.lower, p.window.upper, p.scale);
    numbers(p.dropout.key[0], p.dropout.key[1], p.dropout.threshold, p.sequences.count, p.sequences.page_run);
  }
  void add(const kernel::ForwardSm90Params& p) {
    add(p.forward);
    for (const auto& map : {p.query, p.key, p.value}) add(map);
    if (p.forward.bias != nullptr) add(p.bias);
    numbers(p.heads, p.heads_per_key_head, p.key_box_rows, p.row_blocks, p.pairs, p.tiles, p.section,
            p.counter != nullptr);
  }
  void add(const kernel::BackwardParams& p) {
    add(p.forward);
    for (const void* tensor :
         {p.grad_output, static_cast<const void*>(p.grad_query), static_cast<const void*>(p.grad_key),
          static_cast<const void*>(p.grad_value), static_cast<const void*>(p.grad_bias)}) {
      address(tensor);
    }
    for (const auto& s :
         {p.grad_output_strides, p.grad_query_strides, p.grad_key_strides, p.grad_value_strides})
      add(s);
    base_ = reinterpret_cast<const std::byte*>(p.lse2);  // the workspace's first piece
    address(p.delta);
    address(p.query_sums);
    address(p.turns);
    numbers(p.grad_output_column, p.sum_fragments, p.key_groups, p.key_heads, p.bias_batch, p.bias_rows);
  }
  void add(const kernel::GradKeyValueSm90Params& p) {
    add(p.backward);
    base_ = static_cast<const std::byte*>(p.backward.forward.query);
    for (const auto& map : {p.query, p.key, p.value, p.grad_output}) add(map);
    if (p.backward.forward.bias != nullptr) add(p.bias);
    if (p.backward.grad_bias != nullptr) add(p.grad_bias);
    numbers(p.heads, p.sharing, p.heads_per_key_head, p.key_blocks, p.pairs, p.tiles, p.blocks, p.section,
            p.counter != nullptr);
  }
  void add(const kernel::GradBiasSm90Params& p) {
    add(p.backward);
    base_ = static_cast<const std::byte*>(p.backward.forward.query);
    for (const auto& map : {p.query, p.key, p.value, p.grad_output, p.bias}) add(map);
    numbers(p.heads, p.heads_per_key_head, p.heads_per_bias_head, p.bias_rows, p.bias_batches, p.slots,
            p.slot_blocks, static_cast<int>(launch_.cluster));
  }

  const Launch& launch_;
  const std::byte* base_ = nullptr;
  std::string text_;
};

constexpr std::array kFamilies{kernel::Family::sm90, kernel::Family::mma, kernel::Family::simt};

void run_cases(verify::Pass pass, std::uint64_t stream) {
  if (old_driver) return;
  const codegen::Arch& arch = runtime::take(runtime::backend_of(kHopper))->arch();
  verify::Random random(test_seed(), stream);
  const auto classes = runtime::take(verify::random_classes(random, kClasses, arch, kFamilies, pass));
  verify::Arena arena(kHopper);
  std::size_t total = 0;
  for (int i = 0; i < kCases; ++i) {
    const auto& one = classes[static_cast<std::size_t>(i) % classes.size()];
    const auto drawn = verify::random_case(random, one, one.mask);
    CAPTURE(drawn->name);
    const stand_in::Recording recording;
    drawn->run(arena);
    const auto launches = recording.launches();
    total += launches.size();
    CHECK(static_cast<int>(launches.size()) <= drawn->launches());  // fewer where there is nothing to write
    if (std::getenv("ATTUNE_TEST_PRINT") == nullptr) continue;
    for (const Launch& launch : launches) std::printf("%s\n", Text(launch).of_launch().c_str());
  }
  CHECK(total > kCases / 2);
}

}  // namespace

TEST_CASE("forward calls and merges") {
  run_cases(verify::Pass::forward, 1);
}

TEST_CASE("their gradients") {
  run_cases(verify::Pass::backward, 2);
}
