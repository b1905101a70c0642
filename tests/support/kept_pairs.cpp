#include "tests/support/kept_pairs.h"

#include "attune/philox.h"
#include "tools/reference/mask.h"

#include <fmt/format.h>

namespace attune::test {
namespace {

using verify::Access;
using verify::GuardedTensor;
using verify::Layout;

GuardedTensor tensor_of(DType dtype, const std::vector<std::int64_t>& shape,
                        const std::function<float()>& next) {
  GuardedTensor tensor(dtype, shape, Layout{});
  tensor.fill(next);
  return tensor;
}

std::string compare(const DropoutProblem& problem, const AttentionBias& bias, verify::Arena& arena) {
  const std::vector<bool> kept = kept_pairs(problem, bias, arena);
  const kernel::DropoutParams params =
      kernel::make_dropout(problem.p, problem.state.seed, problem.state.offset);
  const reference::Mask mask(bias, problem.batch, problem.len_q, problem.len_k);
  std::vector<bool> expected(kept.size());
  for (const kernel::Block& block : mask.blocks()) {
    for (int h = 0; h < problem.heads; ++h) {
      for (int i = 0; i < block.len_q; ++i) {
        for (int j = 0; j < block.len_k; ++j) {
          if (!mask.visible(block, i, j)) continue;
          const std::size_t row = std::size_t(block.batch) * problem.len_q + block.q_begin + i;
          expected[(row * problem.heads + h) * problem.len_k + mask.key_row(block, j)] =
              dropout_keeps(params, block.index, h, i, j);
        }
      }
    }
  }
  for (std::size_t at = 0; at < kept.size(); ++at) {
    if (kept[at] == expected[at]) continue;
    const std::size_t row = at / problem.len_k / problem.heads;
    return fmt::format("{} dtype {} p {} {}: batch {}, query row {}, head {}, key row {} is {}",
                       last_kernel(), static_cast<int>(problem.dtype), problem.p, bias.name,
                       row / problem.len_q, row % problem.len_q, at / problem.len_k % problem.heads,
                       at % problem.len_k, kept[at] ? "kept" : "dropped");
  }
  return "";
}

}  // namespace

std::vector<bool> kept_pairs(const DropoutProblem& p, const AttentionBias& bias, verify::Arena& arena) {
  const auto zero = [] { return 0.0f; };
  std::int64_t at = 0;  // value is the identity: [1, len_k, 1, len_k], for every batch entry and head
  const auto identity = [&] {
    const std::int64_t row = at / p.len_k % p.len_k, column = at % p.len_k;
    ++at;
    return row == column ? 1.0f : 0.0f;
  };
  const GuardedTensor query = tensor_of(p.dtype, {p.batch, p.len_q, p.heads, p.head_dim}, zero);
  const GuardedTensor key = tensor_of(p.dtype, {p.batch, p.len_k, 1, p.head_dim}, zero);
  const GuardedTensor value = tensor_of(p.dtype, {p.batch, p.len_k, 1, p.len_k}, identity);
  const GuardedTensor output = tensor_of(p.dtype, {p.batch, p.len_q, p.heads, p.len_k}, zero);
  arena.begin({{"query", &query, Access::read},
               {"key", &key, Access::read},
               {"value", &value, Access::read},
               {"output", &output, Access::write}});
  const TensorView q = arena.put(query), k = arena.put(key), v = arena.put(value);
  memory_efficient_attention_forward(q, k, v, arena.put(output), nullptr, bias,
                                     {.families = {p.family}, .p = p.p, .dropout = p.state});
  arena.finish();
  std::vector<bool> kept;
  for (const double element : output.values()) kept.push_back(element != 0);
  return kept;
}

std::string wrong_dropout(Device device, Family family, const std::vector<DType>& dtypes) {
  verify::Arena arena(device);
  DropoutProblem problem{.family = family, .state = {.seed = 0x0123456789abcdef, .offset = 1ull << 33}};
  for (const DType dtype : dtypes) {
    for (const double p : {0.1, 0.5, 0.99}) {
      problem.dtype = dtype;
      problem.p = p;
      ++problem.state.offset;
      problem.batch = 2;
      problem.heads = 3;
      problem.len_q = 70;
      problem.len_k = 200;
      const Window local{.anchor = Window::Anchor::bottom_right, .left = 60, .right = 9};
      AttentionBias window;
      window.window = local;
      for (const AttentionBias& bias : {AttentionBias(), window}) {
        if (std::string wrong = compare(problem, bias, arena); !wrong.empty()) return wrong;
      }
      problem.batch = 1;
      problem.len_q = 150;
      AttentionBias packed = BlockDiagonalMask::from_seqlens({70, 0, 33, 47}, {100, 5, 61, 34});
      for (int round = 0; round < 2; ++round, packed.window = local) {
        if (std::string wrong = compare(problem, packed, arena); !wrong.empty()) return wrong;
      }
    }
  }
  return "";
}

}  // namespace attune::test
