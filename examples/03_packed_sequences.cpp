// Sequences of different lengths in one call, without padding; then one more token for each over a paged
// cache of keys and values, merged with a prefix that all of them share. Query heads share key heads, 8 to 2.
#include <attune/attune.h>

#include <cstdio>
#include <vector>

using attune::DType;
using attune::TensorView;

int main() try {
  const int heads = 8, key_heads = 2, head_dim = 64;
  const auto tensor = [](std::int64_t rows, std::int64_t row_heads) {
    return std::vector<float>(rows * row_heads * head_dim, 0.25f);
  };

  // Prompts of 5, 12 and 3 tokens on one axis, each causal.
  const auto prompts = attune::BlockDiagonalMask::from_seqlens({5, 12, 3});
  const std::vector<float> query = tensor(20, heads), key = tensor(20, key_heads),
                           value = tensor(20, key_heads);
  const attune::Tensor output = attune::memory_efficient_attention(
      {query.data(), DType::f32, {1, 20, heads, head_dim}},
      {key.data(), DType::f32, {1, 20, key_heads, head_dim}},
      {value.data(), DType::f32, {1, 20, key_heads, head_dim}}, prompts.make_causal());
  std::printf("prompts by %s\n", attune::last_kernel().c_str());

  // Decoding: one query of each sequence; pages of 4 keys, 16 in all, wherever they happen to be.
  const attune::BlockTables tables{
      .table = std::vector<std::int32_t>{7, 2, 0, 1, 9, 15, 4, 0, 0}, .width = 3, .page_size = 4};
  const auto cache = attune::PagedBlockDiagonalPaddedKeysMask::from_seqlens({1, 1, 1}, {6, 12, 4}, tables);
  const std::vector<float> next = tensor(3, heads), pages = tensor(16 * 4, key_heads),
                           prefix = tensor(32, key_heads);
  const TensorView next_query{next.data(), DType::f32, {1, 3, heads, head_dim}};
  const TensorView paged{pages.data(), DType::f32, {1, 64, key_heads, head_dim}};
  const TensorView shared{prefix.data(), DType::f32, {1, 32, key_heads, head_dim}};
  const attune::Attention own = attune::memory_efficient_attention_partial(next_query, paged, paged, cache);
  const attune::Attention common = attune::memory_efficient_attention_partial(next_query, shared, shared);
  const TensorView attn[] = {own.output.view(), common.output.view()};
  const TensorView lse[] = {own.lse.view(), common.lse.view()};
  const attune::Attention merged = attune::merge_attentions(attn, lse);

  // Every score is 1/2 and the first sequence sees 32 + 6 keys: its lse is 1/2 + ln(38).
  std::printf("output %g, lse %g, by %s\n", static_cast<const float*>(merged.output.data())[0],
              static_cast<const float*>(merged.lse.data())[0], attune::last_kernel().c_str());
} catch (const attune::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
