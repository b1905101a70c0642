// The bias classes: constructors, conversions, tables, materialize, and every refusal as text. Their masks
// are compared with upstream's in tests/golden/masks_golden_test.cpp.
#include "attune/attune.h"
#include "attune/num.h"

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <thread>
#include <vector>

using namespace attune;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// '#' where visible; '?' for what is neither 0 nor -inf.
std::string picture(const AttentionBias& bias, std::int64_t queries, std::int64_t keys) {
  const Tensor matrix = bias.materialize({queries, keys});
  const auto* element = static_cast<const float*>(matrix.data());
  std::string text;
  for (std::int64_t i = 0; i < queries; ++i) {
    for (std::int64_t j = 0; j < keys; ++j, ++element)
      text += *element == 0 ? '#' : *element == -kInfinity ? '.' : '?';
    text += '\n';
  }
  return text;
}

/// What `act` refuses with.
template <typename Act>
std::string refusal(Act&& act) {
  try {
    act();
  } catch (const Error& error) {
    CHECK(error.kind() == ErrorKind::invalid_argument);
    return error.what();
  }
  return "no refusal";
}

template <typename Act>
void check_refusal(const std::string& beginning, Act&& act) {
  const std::string text = refusal(act);
  CAPTURE(text);
  CHECK(text.substr(0, beginning.size()) == beginning);
}

BlockTables tables(std::vector<std::int32_t> pages, std::int64_t width, std::int64_t page_size) {
  return {std::move(pages), width, page_size};
}

TensorView view_of(std::vector<float>& data, std::initializer_list<std::int64_t> shape) {
  return {data.data(), DType::f32, shape};
}

std::vector<float> counted(std::size_t count) {
  std::vector<float> data(count);
  for (std::size_t i = 0; i < count; ++i) data[i] = static_cast<float>(i);
  return data;
}

std::vector<float> elements(const TensorView& tensor) {
  REQUIRE(tensor.rank == 3);
  std::vector<float> result;
  const auto* data = static_cast<const float*>(tensor.data);
  for (std::int64_t b = 0; b < tensor.shape[0]; ++b) {
    for (std::int64_t m = 0; m < tensor.shape[1]; ++m) {
      for (std::int64_t k = 0; k < tensor.shape[2]; ++k) {
        result.push_back(data[b * tensor.strides[0] + m * tensor.strides[1] + k * tensor.strides[2]]);
      }
    }
  }
  return result;
}

}  // namespace

// ---- Tables ----

TEST_CASE("a table of the host knows its numbers, and copies share it") {
  const Int32Table table(std::vector<std::int32_t>{3, 1, 2});
  const Int32Table copy = table;
  CHECK(table.size() == 3);
  CHECK(table.on_host());
  CHECK(copy.host() == std::vector<std::int32_t>{3, 1, 2});
  CHECK(copy.read() == table.host());
  CHECK(copy.on({}) == table.on({}));
  CHECK(Int32Table(std::vector<std::int32_t>{}).size() == 0);
}

TEST_CASE("a tensor of the CPU is copied, one of a device is used as it is") {
  std::vector<std::int32_t> numbers{1, 2, 3, 4};
  const Int32Table table(TensorView(numbers.data(), DType::i32, {2, 2}));
  numbers[0] = 9;
  CHECK(table.host() == std::vector<std::int32_t>{1, 2, 3, 4});

  const Device gpu{DeviceType::cuda, 3};
  const TensorView there(numbers.data(), DType::i32, {4}, gpu);  // an address that only a device could read
  const Int32Table device_table(there);
  CHECK_FALSE(device_table.on_host());
  CHECK(device_table.size() == 4);
  CHECK(device_table.on(gpu) == numbers.data());
  check_refusal("the numbers of this table are on cuda:3 alone; read() copies them back",
                [&] { device_table.host(); });
  check_refusal(
      "a table of the bias is on cuda:3, but attention runs on cpu; give the table there or as a list of the "
      "host",
      [&] { device_table.on({}); });
  check_refusal("a table of the bias is on cuda:3, but attention runs on cuda:0", [&] {
    device_table.on({DeviceType::cuda, 0});
  });

  const Int32Table both(std::vector<std::int32_t>{5, 6, 7, 8}, there);
  CHECK(both.on_host());
  CHECK(both.on(gpu) == numbers.data());
  CHECK(both.on({})[0] == 5);
  check_refusal("a table of a bias has 1 numbers on the host but 4 on cuda:3",
                [&] { Int32Table(std::vector<std::int32_t>{5}, there); });
}

TEST_CASE("a tensor that is no table is refused") {
  std::vector<float> floats(4);
  std::vector<std::int32_t> numbers(4);
  check_refusal("a table of a bias (lengths, starts, block tables) must be an i32 tensor; convert it",
                [&] { Int32Table(view_of(floats, {4})); });
  TensorView strided(numbers.data(), DType::i32, {2});
  strided.strides[0] = 2;
  check_refusal(
      "a table of a bias (lengths, starts, block tables) must be contiguous, but axis 0 has stride 2; copy "
      "it",
      [&] { Int32Table{strided}; });
  check_refusal("a table of a bias has a null data pointer",
                [&] { Int32Table(TensorView(nullptr, DType::i32, {2})); });
}

// ---- Masks of whole attention ----

TEST_CASE("masks of whole attention") {
  CHECK(picture({}, 2, 3) == "###\n###\n");
  CHECK(picture(LowerTriangularMask{}, 3, 5) == "#....\n##...\n###..\n");
  CHECK(picture(LowerTriangularFromBottomRightMask{}, 3, 5) == "###..\n####.\n#####\n");
  CHECK(picture(LowerTriangularFromBottomRightMask{}, 4, 2) == "..\n..\n#.\n##\n");
  CHECK(picture(LowerTriangularFromBottomRightMask{}.make_local_attention(2), 3, 5) ==
        ".##..\n..##.\n...##\n");
  CHECK(picture(LowerTriangularFromBottomRightLocalAttentionMask{1}, 2, 3) == ".#.\n..#\n");
  CHECK(picture(LocalAttentionFromBottomRightMask{1, 2}, 4, 4) == "###.\n####\n.###\n..##\n");
  CHECK(picture(LocalAttentionFromBottomRightMask{1, 2}, 4, 5) == "####.\n.####\n..###\n...##\n");
  CHECK(picture(LocalAttentionFromBottomRightMask{std::int64_t{1} << 40, 0}, 2, 2) == "#.\n##\n");
}

TEST_CASE("windows that make no sense are refused") {
  for (const std::int64_t size : {0, -1}) {
    const std::string text = "Expected `window_size > 0`, but window_size=" + std::to_string(size) + " in ";
    check_refusal(
        text + "LowerTriangularFromBottomRightLocalAttentionMask; it counts the query's own position",
        [&] { (void)AttentionBias(LowerTriangularFromBottomRightLocalAttentionMask{size}); });
    check_refusal(text + "BlockDiagonalCausalLocalAttentionMask",
                  [&] { BlockDiagonalMask::from_seqlens({2}).make_local_attention(size); });
    check_refusal(text + "BlockDiagonalCausalLocalAttentionFromBottomRightMask",
                  [&] { BlockDiagonalMask::from_seqlens({2}).make_local_attention_from_bottomright(size); });
    check_refusal(text + "BlockDiagonalCausalLocalAttentionPaddedKeysMask", [&] {
      BlockDiagonalCausalLocalAttentionPaddedKeysMask::from_seqlens_local({2}, 4, {2}, size);
    });
  }
  check_refusal(
      "LocalAttentionFromBottomRightMask: expected `window_left >= 0` and `window_right >= 0`, but "
      "window_left=-1 and "
      "window_right=2",
      [] {
        (void)AttentionBias(LocalAttentionFromBottomRightMask{-1, 2});
      });
  check_refusal("BlockDiagonalLocalAttentionPaddedKeysMask: expected `window_left >= 0`",
                [] { BlockDiagonalLocalAttentionPaddedKeysMask::from_seqlens_local({2}, 4, {2}, 0, -1); });
}

// ---- Bias tensors ----

TEST_CASE("a bias tensor is added where the window lets the key through") {
  std::vector<float> data{0.5f, 1, 2, 3, std::nanf(""), 5};
  const TensorView tensor = view_of(data, {2, 3});
  const AttentionBias bias = LowerTriangularMask{}.add_bias(tensor);
  CHECK(bias.name == "LowerTriangularMaskWithTensorBias");
  const Tensor matrix = bias.materialize({2, 3});
  const auto* element = static_cast<const float*>(matrix.data());
  CHECK(element[0] == 0.5f);
  CHECK(element[1] == -kInfinity);
  CHECK(element[2] == -kInfinity);
  CHECK(element[3] == 3);
  CHECK(std::isnan(element[4]));
  CHECK(element[5] == -kInfinity);
  check_refusal("LowerTriangularMaskWithTensorBias: add_bias was given a second tensor",
                [&] { (void)bias.add_bias(tensor); });
  CHECK(AttentionBias().add_bias(tensor).name == "Tensor");
}

TEST_CASE("a bias tensor broadcasts over axes of extent 1, has any strides, and may be boolean") {
  std::vector<float> data = counted(4);  // [B = 2, 1, 1, Mkv = 2]
  const Tensor matrix = AttentionBias(view_of(data, {2, 1, 1, 2})).materialize({2, 2, 2, 2});
  const auto* element = static_cast<const float*>(matrix.data());
  for (int i = 0; i < 16; ++i) CHECK(element[i] == static_cast<float>(i / 8 * 2 + i % 2));

  TensorView transposed(data.data(), DType::f32, {2, 2});
  std::swap(transposed.strides[0], transposed.strides[1]);
  const Tensor flipped = AttentionBias(transposed).materialize({2, 2});
  CHECK(static_cast<const float*>(flipped.data())[1] == 2);

  const std::array<std::uint8_t, 3> visible{1, 0, 2};
  CHECK(picture(AttentionBias(TensorView(visible.data(), DType::boolean, {1, 3})), 2, 3) == "#.#\n#.#\n");
}

TEST_CASE("a bias tensor of 16 bits, and matrices of 16 bits") {
  const std::array<kernel::u16, 2> f16{kernel::float_to_f16(1.5f), kernel::float_to_f16(-2)};
  const std::array<kernel::u16, 2> bf16{kernel::float_to_bf16(1.5f), kernel::float_to_bf16(-2)};
  for (const auto& [dtype, data] : {std::pair{DType::f16, f16.data()}, std::pair{DType::bf16, bf16.data()}}) {
    const AttentionBias bias = AttentionBias(LowerTriangularMask{}).add_bias(TensorView(data, dtype, {1, 2}));
    const Tensor wide = bias.materialize({1, 2});
    CHECK(static_cast<const float*>(wide.data())[0] == 1.5f);
    const Tensor narrow = bias.materialize({1, 2}, dtype);
    const auto* bits = static_cast<const kernel::u16*>(narrow.data());
    CHECK(bits[0] == data[0]);
    CHECK((dtype == DType::f16 ? kernel::f16_to_float(bits[1]) : kernel::bf16_to_float(bits[1])) ==
          -kInfinity);
  }
}

TEST_CASE("materialize expands leading extents and refuses shapes that do not fit") {
  const AttentionBias bias = BlockDiagonalMask::from_seqlens({1, 2});
  const Tensor matrix = bias.materialize({2, 3, 3, 3});
  CHECK(matrix.view().rank == 4);
  CHECK(matrix.view().shape[1] == 3);
  const auto* element = static_cast<const float*>(matrix.data());
  for (int i = 0; i < 6; ++i) CHECK(element[i * 9 + 1] == -kInfinity);
  for (int i = 0; i < 6; ++i) CHECK(element[i * 9 + 8] == 0);
  CHECK(bias.materialize({1, 2, 2, 3, 3}).view().rank == 5);
  CHECK(AttentionBias(LowerTriangularMask{}).materialize({0, 4}).view().shape[1] == 4);

  check_refusal("materialize of shape [4, 3]: BlockDiagonalMask: ", [&] { bias.materialize({4, 3}); });
  check_refusal("materialize of shape [3, 2]: BlockDiagonalMask: ", [&] { bias.materialize({3, 2}); });
  check_refusal("materialize: a shape of 1 axes; expected [..., queries, keys] of 2 to 5 axes",
                [&] { bias.materialize({3}); });
  check_refusal("materialize: a shape of 6 axes", [&] { bias.materialize({1, 1, 1, 1, 3, 3}); });
  check_refusal("materialize: expected dtype f32, f16 or bf16, which hold -inf", [&] {
    bias.materialize({3, 3}, DType::i32);
  });
  std::vector<float> data(6);
  check_refusal("materialize of shape [3, 3]: attn_bias: shape [2, 3]", [&] {
    AttentionBias(view_of(data, {2, 3})).materialize({3, 3});
  });
}

// ---- Packed sequences ----

TEST_CASE("block-diagonal masks") {
  const auto mask = BlockDiagonalMask::from_seqlens({1, 2}, {2, 3});
  CHECK(mask.bias().name == "BlockDiagonalMask");
  CHECK(mask.sequences().count == 2);
  CHECK(mask.sequences().key_rows == 5);
  CHECK(picture(mask, 3, 5) == "##...\n..###\n..###\n");
  CHECK(picture(mask.make_causal(), 3, 5) == "#....\n..#..\n..##.\n");
  CHECK(picture(mask.make_causal_from_bottomright(), 3, 5) == "##...\n..##.\n..###\n");
  CHECK(picture(mask.make_local_attention(1), 3, 5) == "#....\n..#..\n...#.\n");
  CHECK(picture(mask.make_local_attention_from_bottomright(1), 3, 5) == ".#...\n...#.\n....#\n");
  CHECK(picture(BlockDiagonalCausalMask::from_seqlens({1, 2}), 3, 3) == "#..\n.#.\n.##\n");
  CHECK(picture(BlockDiagonalCausalFromBottomRightMask::from_seqlens({1, 2}, {2, 3}), 3, 5) ==
        "##...\n..##.\n..###\n");
  CHECK(BlockDiagonalMask::from_seqlens({}).sequences().count == 0);
}

TEST_CASE("equal lengths share one table") {
  const auto mask = BlockDiagonalMask::from_seqlens({1, 2}, {1, 2});
  CHECK(mask.sequences().q_starts.on({}) == mask.sequences().k_starts.on({}));
}

TEST_CASE("lengths that do not add up are refused") {
  check_refusal(
      "BlockDiagonalMask: q_seqlen has 2 entries and kv_seqlen 1; queries and keys have equally many blocks",
      [] {
        BlockDiagonalMask::from_seqlens({1, 2}, {3});
      });
  check_refusal("BlockDiagonalMask: q_seqlen[1] is -2; expected 0 or more", [] {
    BlockDiagonalMask::from_seqlens({1, -2});
  });
  check_refusal("BlockDiagonalMask: kv_seqlen[0] is 536870913; the limit is 2^29",
                [] { BlockDiagonalMask::from_seqlens({1}, {536870913}); });
  check_refusal("BlockDiagonalMask: the lengths in q_seqlen add up to more than the limit, 2^29", [] {
    BlockDiagonalMask::from_seqlens({1 << 29, 1});
  });
  check_refusal(
      "Block #1 has num_keys=1 and num_queries=3. Expected `num_keys >= num_queries`: "
      "BlockDiagonalCausalFromBottomRightMask lets the last query see the last key, so the first 2 queries "
      "would see "
      "none",
      [] {
        BlockDiagonalMask::from_seqlens({1, 3}, {2, 1}).make_causal_from_bottomright();
      });
  check_refusal("Block #0 has num_keys=0 and num_queries=1. Expected `num_keys >= num_queries`: ",
                [] { BlockDiagonalMask::from_seqlens({1}, {0}).make_local_attention_from_bottomright(4); });
  check_refusal(
      "No keys are attended in q_seqlen 8 k_seqlen 0 with sliding window 7: the window of block #1's last "
      "query",
      [] {
        BlockDiagonalMask::from_seqlens({1, 8}, {1, 0}).make_local_attention(7);
      });
  CHECK(picture(BlockDiagonalMask::from_seqlens({4}, {1}).make_local_attention(4), 4, 1) == "#\n#\n#\n#\n");
}

TEST_CASE("starts of the host are checked, those of a device are taken as they are") {
  const auto starts = [](std::vector<std::int32_t> list) { return Int32Table(std::move(list)); };
  CHECK(picture(BlockDiagonalMask::from_seqstarts(starts({0, 1, 3}), starts({0, 2, 5})), 3, 5) ==
        "##...\n..###\n..###\n");
  check_refusal("BlockDiagonalMask: q_starts is empty; expected count + 1 cumulative starts",
                [&] { BlockDiagonalMask::from_seqstarts(starts({}), starts({})); });
  check_refusal("BlockDiagonalMask: q_starts must begin with 0 and never fall", [&] {
    BlockDiagonalMask::from_seqstarts(starts({1, 2}), starts({0, 2}));
  });
  check_refusal("BlockDiagonalMask: k_starts must begin with 0 and never fall", [&] {
    BlockDiagonalMask::from_seqstarts(starts({0, 1, 2}), starts({0, 2, 1}));
  });
  check_refusal(
      "BlockDiagonalMask: q_starts has 2 entries and k_starts 3; queries and keys have equally many blocks",
      [&] {
        BlockDiagonalMask::from_seqstarts(starts({0, 1}), starts({0, 1, 2}));
      });
  check_refusal("BlockDiagonalMask: q_starts ends at 536870913; the limit is 2^29", [&] {
    BlockDiagonalMask::from_seqstarts(starts({0, 536870913}), starts({0, 1}));
  });

  const std::array<std::int32_t, 3> there{};  // never read: it claims to be a GPU's
  const Int32Table device_starts(TensorView(there.data(), DType::i32, {3}, {DeviceType::cuda, 0}));
  const auto mask = BlockDiagonalMask::from_seqstarts(device_starts, device_starts);
  CHECK(mask.sequences().count == 2);
  CHECK(mask.sequences().key_rows == -1);
  CHECK(mask.make_causal_from_bottomright().bias().window.right == 0);
  CHECK(mask.make_local_attention(1).bias().window.left == 0);
  CHECK(BlockDiagonalCausalMask::from_seqstarts(device_starts, device_starts).bias().name ==
        "BlockDiagonalCausalMask");
  CHECK(BlockDiagonalCausalFromBottomRightMask::from_seqstarts(device_starts, device_starts).bias().name ==
        "BlockDiagonalCausalFromBottomRightMask");
  std::vector<float> data(2);
  check_refusal("split: the lengths are on a device alone", [&] { (void)mask.split(view_of(data, {1, 2})); });
}

// ---- Lists of tensors ----

TEST_CASE("tensors of a list become blocks, each batch row one, and come back as views") {
  std::vector<float> a = counted(12);  // [2, 2, 3]
  std::vector<float> b = counted(6);   // [2, 1, 3], transposed
  TensorView second = view_of(b, {2, 1, 3});
  second.strides = {1, 2, 2};
  const std::array list{view_of(a, {2, 2, 3}), second};
  const auto [mask, packed] = BlockDiagonalMask::from_tensor_list(list);
  CHECK(mask.sequences().q_starts.host() == std::vector<std::int32_t>{0, 2, 4, 5, 6});
  CHECK(packed.view().rank == 3);
  CHECK(packed.view().shape[1] == 6);
  const std::vector<TensorView> parts = mask.split(packed.view());
  REQUIRE(parts.size() == 2);
  CHECK(elements(parts[0]) == a);
  CHECK(elements(parts[1]) == std::vector<float>{0, 2, 4, 1, 3, 5});
  CHECK(parts[1].data == static_cast<const float*>(packed.data()) + 12);  // no copy
  CHECK(mask.make_causal().split(packed.view()).size() == 2);
  CHECK(mask.split_queries(packed.view()).size() == 2);
  CHECK(mask.split_kv(packed.view()).size() == 2);
}

TEST_CASE("queries, keys and values of lists") {
  std::vector<float> q = counted(6);
  std::vector<float> k = counted(10);
  const std::array queries{view_of(q, {1, 1, 2}), view_of(q, {1, 2, 2})};
  const std::array keys{view_of(k, {1, 2, 2}), view_of(k, {1, 3, 2})};
  const auto packed = BlockDiagonalMask::from_tensor_lists_qkv(queries, keys, keys);
  CHECK(picture(packed.bias, 3, 5) == "##...\n..###\n..###\n");
  REQUIRE(packed.value);
  CHECK(packed.value->view().shape[1] == 5);
  CHECK(packed.bias.split_queries(packed.query.view())[1].shape[1] == 2);
  CHECK(packed.bias.split_kv(packed.key.view())[1].shape[1] == 3);
  CHECK(elements(packed.bias.split_kv(packed.value->view())[0]) == std::vector<float>{0, 1, 2, 3});
  check_refusal("split: queries and keys have different lengths; use split_queries or split_kv",
                [&] { (void)packed.bias.split(packed.query.view()); });
  CHECK_FALSE(BlockDiagonalMask::from_tensor_lists_qkv(queries, keys).value);
}

TEST_CASE("without a list, split gives a view for each sequence") {
  std::vector<float> data = counted(6);
  const auto parts = BlockDiagonalMask::from_seqlens({1, 0, 2}).split(view_of(data, {1, 3, 2}));
  REQUIRE(parts.size() == 3);
  CHECK(parts[1].shape[1] == 0);
  CHECK(elements(parts[2]) == std::vector<float>{2, 3, 4, 5});
}

TEST_CASE("lists and tensors that do not go together are refused") {
  std::vector<float> data(24);
  const TensorView good = view_of(data, {1, 2, 3});
  const auto from_list = [](std::vector<TensorView> list) { BlockDiagonalMask::from_tensor_list(list); };
  check_refusal("tensors: an empty list; give one tensor at least", [&] { from_list({}); });
  check_refusal("tensors[0]: rank 1, expected [B, M, ...]", [&] { from_list({view_of(data, {3})}); });
  check_refusal("tensors[1]: f32 [1, 2, 4] on cpu, but tensors[0] is f32 [1, 2, 3] on cpu", [&] {
    from_list({good, view_of(data, {1, 2, 4})});
  });
  check_refusal("tensors[1]: f16 [1, 2, 3] on cpu, but tensors[0] is f32", [&] {
    from_list({good, TensorView(data.data(), DType::f16, {1, 2, 3})});
  });
  const auto from_lists = [](std::vector<TensorView> q, std::vector<TensorView> k,
                             std::vector<TensorView> v) {
    BlockDiagonalMask::from_tensor_lists_qkv(q, k, v);
  };
  check_refusal("from_tensor_lists_qkv: 2 keys but 1 queries", [&] { from_lists({good}, {good, good}, {}); });
  check_refusal("from_tensor_lists_qkv: keys[0] has batch 2, but queries[0] has 1", [&] {
    from_lists({good}, {view_of(data, {2, 2, 3})}, {});
  });
  check_refusal("from_tensor_lists_qkv: values[0] has 4 rows, but keys[0] has 2", [&] {
    from_lists({good}, {good}, {view_of(data, {1, 4, 3})});
  });
  const auto mask = BlockDiagonalMask::from_seqlens({2, 2});
  check_refusal("split: the tensor has shape [1, 2, 3], expected [1, 4, ...]",
                [&] { (void)mask.split(good); });
  check_refusal("split_kv: the tensor has shape [2, 4, 3], expected [1, 4, ...]", [&] {
    (void)mask.split_kv(view_of(data, {2, 4, 3}));
  });
}

// ---- Padded keys, keys with gaps, paged keys ----

TEST_CASE("padded keys") {
  const auto mask = BlockDiagonalPaddedKeysMask::from_seqlens({1, 2}, 3, {1, 3});
  CHECK(mask.sequences().key_rows == 6);
  CHECK(picture(mask, 3, 6) == "#.....\n...###\n...###\n");
  CHECK(picture(BlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqlens({1, 2}, 3, {1, 3}), 3, 6) ==
        "#.....\n...##.\n...###\n");
  CHECK(picture(BlockDiagonalLocalAttentionPaddedKeysMask::from_seqlens_local({1, 2}, 3, {1, 3}, 0, 1), 3,
                6) == "#.....\n....##\n.....#\n");
  CHECK(picture(BlockDiagonalCausalLocalAttentionPaddedKeysMask::from_seqlens_local({1, 2}, 3, {1, 3}, 1), 3,
                6) == "#.....\n....#.\n.....#\n");
  check_refusal("BlockDiagonalPaddedKeysMask: block #1 has the keys [0, 4), but kv_padding holds 3", [] {
    BlockDiagonalPaddedKeysMask::from_seqlens({1, 1}, 3, {1, 4});
  });
  check_refusal("BlockDiagonalPaddedKeysMask: kv_padding is -1; expected 0 or more",
                [] { BlockDiagonalPaddedKeysMask::from_seqlens({1}, -1, {0}); });
  check_refusal("BlockDiagonalCausalWithOffsetPaddedKeysMask: q_seqlen has 1 entries and kv_seqlen 2", [] {
    BlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqlens({1}, 3, {1, 1});
  });
  check_refusal(
      "BlockDiagonalPaddedKeysMask: 2 blocks of kv_padding 536870912 are more than the limit, 2^29 key rows",
      [] {
        BlockDiagonalPaddedKeysMask::from_seqlens({1, 1}, 1 << 29, {1, 1});
      });
}

TEST_CASE("keys with gaps") {
  CHECK(picture(BlockDiagonalGappyKeysMask::from_seqlens({1, 2}, {4, 1, 6}, {2, 2}), 3, 6) ==
        "....##\n.##...\n.##...\n");
  CHECK(picture(BlockDiagonalCausalWithOffsetGappyKeysMask::from_seqlens({1, 2}, {4, 1, 6}, {2, 2}), 3, 6) ==
        "....##\n.#....\n.##...\n");
  check_refusal("No elements: BlockDiagonalGappyKeysMask needs one block at least",
                [] { BlockDiagonalGappyKeysMask::from_seqlens({}, {0}, {}); });
  check_refusal(
      "BlockDiagonalGappyKeysMask: kv_seqstarts has 2 entries and kv_seqlen 2; expected one start more", [] {
        BlockDiagonalGappyKeysMask::from_seqlens({1, 2}, {0, 1}, {1, 1});
      });
  check_refusal(
      "BlockDiagonalGappyKeysMask: block #0 has the keys [4, 7), but the key tensor (the last of "
      "kv_seqstarts) holds 6",
      [] {
        BlockDiagonalGappyKeysMask::from_seqlens({1}, {4, 6}, {3});
      });
}

TEST_CASE("paged keys: columns are physical rows") {
  const BlockTables pages = tables({2, 0, 1, 3}, 2, 2);
  CHECK(picture(PagedBlockDiagonalPaddedKeysMask::from_seqlens({1, 2}, {3, 2}, pages), 3, 8) ==
        "#...##..\n..##....\n..##....\n");
  CHECK(picture(PagedBlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqlens({1, 2}, {3, 2}, pages), 3,
                8) == "#...##..\n..#.....\n..##....\n");
  CHECK(picture(PagedBlockDiagonalGappyKeysMask::from_seqlens({1, 2}, {1, 0}, {2, 4}, pages), 3, 8) ==
        "#....#..\n..##..##\n..##..##\n");
  CHECK(picture(PagedBlockDiagonalCausalWithOffsetGappyKeysMask::from_seqlens({1, 2}, {1, 0}, {2, 4}, pages),
                3, 8) == "#....#..\n..##..#.\n..##..##\n");
}

TEST_CASE("page tables that make no sense are refused") {
  const auto make = [](const BlockTables& pages) {
    return PagedBlockDiagonalPaddedKeysMask::from_seqlens({1, 1}, {3, 2}, pages);
  };
  const std::string name = "PagedBlockDiagonalPaddedKeysMask: ";
  check_refusal(name + "page_size is 0; expected 1 or more", [&] { make(tables({0, 1}, 1, 0)); });
  check_refusal(name + "block_tables has 2 entries, expected 2 rows (one per sequence) of 2 pages", [&] {
    make(tables({0, 1}, 2, 4));
  });
  check_refusal(name + "block #0 has the keys [0, 3), but its row of block_tables (1 pages of 2) holds 2",
                [&] {
                  make(tables({0, 1}, 1, 2));
                });
  check_refusal(name + "1 pages of 1073741824 keys are more than the limit, 2^29 keys of a sequence", [&] {
    make(tables({0, 1}, 1, std::int64_t{1} << 30));
  });
  check_refusal("materialize of shape [2, 8]: " + name + "block_tables[1, 0] is page 2", [&] {
    picture(make(tables({0, 2}, 1, 4)), 2, 8);
  });
  check_refusal("materialize of shape [2, 8]: " + name + "block_tables[0, 0] is page -1", [&] {
    picture(make(tables({-1, 1}, 1, 4)), 2, 8);
  });
  CHECK(picture(make(tables({0, 99, 1, -7}, 2, 4)), 2, 8) ==
        "###.....\n....##..\n");  // unused ones are not looked at
  check_refusal(
      "PagedBlockDiagonalGappyKeysMask: kv_seqstarts has 3 entries and kv_seqlen 2; expected equally many",
      [] {
        PagedBlockDiagonalGappyKeysMask::from_seqlens({1, 1}, {0, 0, 4}, {1, 1}, tables({0, 1}, 1, 4));
      });
}

TEST_CASE("make_paged keeps lengths, window and the source") {
  const BlockTables pages = tables({1, 0}, 1, 4);
  const auto padded = BlockDiagonalPaddedKeysMask::from_seqlens({1, 2}, 3, {1, 3});
  const AttentionBias paged = padded.make_paged(pages);
  CHECK(paged.name == "PagedBlockDiagonalPaddedKeysMask");
  CHECK(picture(paged, 3, 8) == "....#...\n###.....\n###.....\n");
  CHECK(padded.sequences().key_rows == 6);

  const AttentionBias causal =
      BlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqlens({1, 2}, 3, {1, 3}).make_paged(pages);
  CHECK(causal.name == "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask");
  CHECK(picture(causal, 3, 8) == "....#...\n##......\n###.....\n");

  const AttentionBias local =
      BlockDiagonalLocalAttentionPaddedKeysMask::from_seqlens_local({1, 2}, 3, {1, 3}, 0, 1)
          .make_paged(pages);
  CHECK(local.name == "PagedBlockDiagonalLocalAttentionPaddedKeysMask");
  CHECK(picture(local, 3, 8) == "....#...\n.##.....\n..#.....\n");

  const AttentionBias causal_local =
      BlockDiagonalCausalLocalAttentionPaddedKeysMask::from_seqlens_local({1, 2}, 3, {1, 3}, 1)
          .make_paged(pages);
  CHECK(causal_local.name == "PagedBlockDiagonalCausalLocalAttentionPaddedKeysMask");
  CHECK(picture(causal_local, 3, 8) == "....#...\n.#......\n..#.....\n");

  check_refusal("PagedBlockDiagonalPaddedKeysMask: block #1 has the keys [0, 3), but its row of block_tables",
                [&] {
                  padded.make_paged(tables({0, 1}, 1, 2));
                });
}

TEST_CASE("make_paged of keys with gaps reads blocks as living in cells") {
  const auto gappy = BlockDiagonalGappyKeysMask::from_seqlens({1, 2}, {1, 4, 8}, {2, 4});
  const BlockTables pages = tables({3, 0, 1, 2}, 2, 2);
  const AttentionBias paged = gappy.make_paged(pages, 4);
  CHECK(paged.name == "PagedBlockDiagonalGappyKeysMask");
  CHECK(picture(paged, 3, 8) == "#......#\n..####..\n..####..\n");
  CHECK(BlockDiagonalCausalWithOffsetGappyKeysMask::from_seqlens({1, 2}, {1, 4, 8}, {2, 4})
            .make_paged(pages, 4)
            .bias()
            .name == "PagedBlockDiagonalCausalWithOffsetGappyKeysMask");
  check_refusal(
      "Notional padding should be divisible by the page size: PagedBlockDiagonalGappyKeysMask got "
      "notional_padding=3 and page_size=2",
      [&] { gappy.make_paged(pages, 3); });
  check_refusal(
      "PagedBlockDiagonalGappyKeysMask: block #1 starts at 4, but with notional_padding 6 and 2 pages of 2 "
      "it "
      "must start in [6, 10)",
      [&] { gappy.make_paged(pages, 6); });
  check_refusal(
      "PagedBlockDiagonalGappyKeysMask: block #1 starts at 4, but with notional_padding 0 and 2 pages of 2 "
      "it "
      "must start in [0, 4)",
      [&] { gappy.make_paged(pages, 0); });
  const std::array<std::int32_t, 3> there{};
  const Int32Table starts(TensorView(there.data(), DType::i32, {3}, {DeviceType::cuda, 0}));
  check_refusal("PagedBlockDiagonalGappyKeysMask: make_paged moves kv_seqstarts, which are on a device alone",
                [&] {
                  BlockDiagonalGappyKeysMask::from_seqstarts(starts, starts, std::vector<std::int32_t>{1, 1})
                      .make_paged(pages, 4);
                });
}

TEST_CASE("every class with keys of its own is made from tables too") {
  const auto table = [](std::vector<std::int32_t> list) { return Int32Table(std::move(list)); };
  const Int32Table q = table({0, 1, 3});
  const Int32Table lens = table({2, 3});
  const Int32Table starts = table({4, 0, 6});
  const Int32Table logical = table({1, 0});
  const BlockTables pages = tables({2, 0, 1, 3}, 2, 2);
  const auto same = [](const AttentionBias& from_tables, const AttentionBias& from_lists, std::int64_t keys) {
    CHECK(from_tables.name == from_lists.name);
    CHECK(picture(from_tables, 3, keys) == picture(from_lists, 3, keys));
  };
  same(BlockDiagonalPaddedKeysMask::from_seqstarts(q, 4, lens),
       BlockDiagonalPaddedKeysMask::from_seqlens({1, 2}, 4, {2, 3}), 8);
  same(BlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqstarts(q, 4, lens),
       BlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqlens({1, 2}, 4, {2, 3}), 8);
  same(BlockDiagonalLocalAttentionPaddedKeysMask::from_seqstarts_local(q, 4, lens, 1, 0),
       BlockDiagonalLocalAttentionPaddedKeysMask::from_seqlens_local({1, 2}, 4, {2, 3}, 1, 0), 8);
  same(BlockDiagonalCausalLocalAttentionPaddedKeysMask::from_seqstarts_local(q, 4, lens, 2),
       BlockDiagonalCausalLocalAttentionPaddedKeysMask::from_seqlens_local({1, 2}, 4, {2, 3}, 2), 8);
  same(BlockDiagonalGappyKeysMask::from_seqstarts(q, starts, lens),
       BlockDiagonalGappyKeysMask::from_seqlens({1, 2}, {4, 0, 6}, {2, 3}), 6);
  same(BlockDiagonalCausalWithOffsetGappyKeysMask::from_seqstarts(q, starts, lens),
       BlockDiagonalCausalWithOffsetGappyKeysMask::from_seqlens({1, 2}, {4, 0, 6}, {2, 3}), 6);
  same(PagedBlockDiagonalPaddedKeysMask::from_seqstarts(q, lens, pages),
       PagedBlockDiagonalPaddedKeysMask::from_seqlens({1, 2}, {2, 3}, pages), 8);
  same(PagedBlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqstarts(q, lens, pages),
       PagedBlockDiagonalCausalWithOffsetPaddedKeysMask::from_seqlens({1, 2}, {2, 3}, pages), 8);
  same(PagedBlockDiagonalGappyKeysMask::from_seqstarts(q, logical, lens, pages),
       PagedBlockDiagonalGappyKeysMask::from_seqlens({1, 2}, {1, 0}, {2, 3}, pages), 8);
  same(PagedBlockDiagonalCausalWithOffsetGappyKeysMask::from_seqstarts(q, logical, lens, pages),
       PagedBlockDiagonalCausalWithOffsetGappyKeysMask::from_seqlens({1, 2}, {1, 0}, {2, 3}, pages), 8);
  check_refusal(
      "BlockDiagonalPaddedKeysMask: q_starts has 3 entries and kv_seqlen 3; expected one start more", [&] {
        BlockDiagonalPaddedKeysMask::from_seqstarts(q, 4, table({1, 1, 1}));
      });
  check_refusal("BlockDiagonalPaddedKeysMask: block #0 has -1 keys from 0 on; expected 0 or more", [&] {
    BlockDiagonalPaddedKeysMask::from_seqstarts(q, 4, table({-1, 1}));
  });
}

// For the thread sanitizer: calls share a bias between threads.
TEST_CASE("threads share a table") {
  const AttentionBias bias = BlockDiagonalMask::from_seqlens({1, 2});
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([copy = bias] {
      for (int i = 0; i < 100; ++i) CHECK(copy.sequences->q_starts.on({})[2] == 3);
    });
  }
  for (std::thread& thread : threads) thread.join();
}
