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
  const int columns = p.head_dim_v == 0 ? p.len_k : p.head_dim_v;
  const auto zero = [] { return 0.0f; };
  const GuardedTensor query = tensor_of(p.dtype, {p.batch, p.len_q, p.heads, p.head_dim}, zero);
  const GuardedTensor key = tensor_of(p.dtype, {p.batch, p.len_k, 1, p.head_dim}, zero);
  std::vector<bool> kept(std::size_t(p.batch) * p.len_q * p.heads * p.len_k);
  for (int first = 0; first < p.len_k; first += columns) {
    std::int64_t at = 0;  // value is of the identity: [1, len_k, 1, columns], for every batch entry and head
    const auto identity = [&] {
      const std::int64_t row = at / columns % p.len_k, column = first + at % columns;
      ++at;
      return row == column ? 1.0f : 0.0f;
    };
    const GuardedTensor value = tensor_of(p.dtype, {p.batch, p.len_k, 1, columns}, identity);
    const GuardedTensor output = tensor_of(p.dtype, {p.batch, p.len_q, p.heads, columns}, zero);
    arena.begin({{"query", &query, Access::read},
                 {"key", &key, Access::read},
                 {"value", &value, Access::read},
                 {"output", &output, Access::write}});
    const TensorView q = arena.put(query), k = arena.put(key), v = arena.put(value);
    memory_efficient_attention_forward(q, k, v, arena.put(output), nullptr, bias,
                                       {.families = {p.family}, .p = p.p, .dropout = p.state});
    arena.finish();
    const std::vector<double> seen = output.values();
    for (std::size_t n = 0; n < seen.size(); ++n) {
      const std::size_t j = first + n % columns;
      if (j < std::size_t(p.len_k)) kept[n / columns * p.len_k + j] = seen[n] != 0;
    }
  }
  return kept;
}

std::string wrong_dropout(Device device, Family family, const std::vector<DType>& dtypes) {
  verify::Arena arena(device);
  DropoutProblem problem{.family = family, .state = {.seed = 0x0123456789abcdef, .offset = 1ull << 33}};
  for (const DType dtype : dtypes) {
    for (const double p : {0.1, 0.5, 0.99}) {
      for (const int head_dim_v : {0, 64}) {
        problem.dtype = dtype;
        problem.p = p;
        problem.head_dim_v = head_dim_v;
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
  }
  return "";
}

}  // namespace attune::test
