// Mutated .safetensors files: whatever they say, the reader refuses them or shows only bytes that are theirs.
// Runs under AddressSanitizer in the asan preset.
#include "tests/support/random.h"
#include "tools/safetensors.h"

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

using attune::test::Random;
using attune::tools::encode_safetensors;
using attune::tools::SafetensorsFile;
using attune::tools::StoredTensor;

namespace {

using Bytes = std::vector<std::byte>;
constexpr int kFiles = 30'000;

std::size_t below(Random& random, std::size_t limit) {
  return static_cast<std::size_t>(random.integer(0, static_cast<int>(limit) - 1));
}

/// A valid file of a few tensors, empty and scalar ones among them.
Bytes valid_file(Random& random) {
  static const Bytes data = [] {
    Bytes numbers(256);
    for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<std::byte>(i);
    return numbers;
  }();
  std::vector<StoredTensor> tensors;
  for (const char* name : {"query", "key", "value", "lse"}) {
    const bool wide = below(random, 2) == 0;
    StoredTensor tensor{name, wide ? "F32" : "BF16", {}, {}};
    std::size_t bytes = wide ? 4 : 2;
    for (std::size_t axis = below(random, 4); axis > 0; --axis) {
      tensor.shape.push_back(static_cast<std::int64_t>(below(random, 4)));
      bytes *= static_cast<std::size_t>(tensor.shape.back());
    }
    tensor.bytes = std::span(data).subspan(below(random, 32), bytes);
    tensors.push_back(std::move(tensor));
  }
  return *encode_safetensors(tensors, {{"seed", "fuzz"}});
}

/// Writes a piece of JSON over the header, so that mutations get past the parser.
void plant_token(Bytes& file, Random& random) {
  static constexpr std::array<std::string_view, 16> kTokens{"-1",
                                                            "0",
                                                            "9",
                                                            "1e3",
                                                            "18446744073709551615",
                                                            "9223372036854775807",
                                                            "null",
                                                            "[]",
                                                            "{}",
                                                            "[",
                                                            "}",
                                                            ",",
                                                            "\"F16\"",
                                                            "\"query\"",
                                                            "\"\\u0000\"",
                                                            "4294967296"};
  const std::string_view token = kTokens[below(random, kTokens.size())];
  const std::size_t at = std::min<std::size_t>(8 + below(random, file.size()), file.size());
  const std::size_t count = std::min(token.size(), file.size() - at);
  if (count > 0) std::memcpy(file.data() + at, token.data(), count);
}

/// Adds to one digit, which makes a lie that is still JSON.
void change_digit(Bytes& file, Random& random) {
  std::vector<std::size_t> digits;
  for (std::size_t i = 8; i < file.size(); ++i) {
    if (file[i] >= std::byte{'0'} && file[i] <= std::byte{'9'}) digits.push_back(i);
  }
  if (!digits.empty())
    file[digits[below(random, digits.size())]] = static_cast<std::byte>('0' + below(random, 10));
}

/// Moves the claims of a valid file's tensors, whole, to other places: a lie that only the neighbours give
/// away.
void move_claims(Bytes& file, Random& random) {
  const auto length = std::to_integer<std::size_t>(file[0]) | std::to_integer<std::size_t>(file[1]) << 8;
  char* text = reinterpret_cast<char*>(file.data()) + 8;
  auto header = nlohmann::json::parse(text, text + length);
  for (const char* name : {"query", "key", "value", "lse"}) {
    if (below(random, 4) != 0) continue;
    auto& offsets = header[name]["data_offsets"];
    const auto to = static_cast<std::int64_t>(below(random, 64));
    offsets = {to, to + offsets[1].get<std::int64_t>() - offsets[0].get<std::int64_t>()};
  }
  std::string moved = header.dump();
  if (moved.size() > length) return;
  moved.resize(length, ' ');
  std::memcpy(text, moved.data(), length);
}

void mutate(Bytes& file, Random& random) {
  if (file.empty()) return;
  const auto at = static_cast<std::ptrdiff_t>(below(random, file.size()));
  switch (below(random, 7)) {
    case 0: file[at] = static_cast<std::byte>(below(random, 256)); break;
    case 1: file[at] ^= static_cast<std::byte>(1u << below(random, 8)); break;
    case 2: file.resize(static_cast<std::size_t>(at)); break;
    case 3: file.resize(file.size() + below(random, 64)); break;
    case 4:
      file[below(random, std::min<std::size_t>(8, file.size()))] = static_cast<std::byte>(below(random, 256));
      break;
    case 5: plant_token(file, random); break;
    case 6: change_digit(file, random); break;
  }
}

/// What every accepted file promises: its tensors lie one behind the other and end with the file.
void check_promises(const SafetensorsFile& file, const std::byte* begin, std::size_t size) {
  const std::byte* end = begin + size;
  std::size_t total = 0;
  for (const StoredTensor& tensor : file.tensors()) {
    REQUIRE(tensor.bytes.data() >= begin);
    REQUIRE(tensor.bytes.data() + tensor.bytes.size() <= end);
    total += tensor.bytes.size();
  }
  REQUIRE(total <= size);
  // The writer takes what the reader gave, and it says the same.
  auto again = encode_safetensors(file.tensors(), file.metadata());
  REQUIRE(again.ok());
  const auto reread = SafetensorsFile::parse(std::move(*again), "again");
  REQUIRE(reread.ok());
  REQUIRE(reread->tensors().size() == file.tensors().size());
  for (const StoredTensor& tensor : file.tensors()) {
    const StoredTensor* same = reread->find(tensor.name);
    REQUIRE(same != nullptr);
    REQUIRE(std::ranges::equal(same->bytes, tensor.bytes));
  }
}

}  // namespace

TEST_CASE("mutated files are refused or safe") {
  Random random(attune::test::test_seed());
  int accepted = 0;
  std::vector<std::string> unseen{"too few",      "the format's limit", "beyond the file's", "not valid JSON",
                                  "twice",        "is missing",         "unknown dtype",     "shape holds",
                                  "not two",      "end before",         "of data",           "span",
                                  "overlaps the", "a hole of",          "belong to none"};
  for (int i = 0; i < kFiles; ++i) {
    CAPTURE(i);
    Bytes bytes = valid_file(random);
    if (below(random, 4) == 0) move_claims(bytes, random);
    for (std::size_t rounds = below(random, 3); rounds > 0; --rounds) mutate(bytes, random);
    const std::byte* begin = bytes.data();
    const std::size_t size = bytes.size();
    const auto file = SafetensorsFile::parse(std::move(bytes), "x");
    if (file.ok()) {
      ++accepted;
      check_promises(*file, begin, size);
      continue;
    }
    std::erase_if(unseen, [&](const std::string& words) {
      return file.failure().message.find(words) != std::string::npos;
    });
  }
  // The mutations reach behind every check.
  CAPTURE(unseen.empty() ? "" : unseen.front());
  CHECK(unseen.empty());
  CHECK(accepted > kFiles / 100);
}
