// The .safetensors reader against honest files and against every lie that a header can tell.
#include "tools/safetensors.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <vector>

using attune::ErrorKind;
using attune::tools::encode_safetensors;
using attune::tools::SafetensorsFile;
using attune::tools::StoredTensor;
using attune::tools::write_safetensors;

namespace {

using Bytes = std::vector<std::byte>;

Bytes bytes_of(const std::string& text) {
  const auto* begin = reinterpret_cast<const std::byte*>(text.data());
  return {begin, begin + text.size()};
}

/// A file with this header text, whatever it says, and `data_bytes` of data.
Bytes file_of(const std::string& header, std::size_t data_bytes) {
  std::string length(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(header.size() >> (8 * i));
  return bytes_of(length + header + std::string(data_bytes, '\x2a'));
}

/// The message with which the file is refused.
std::string refusal(Bytes file) {
  const auto result = SafetensorsFile::parse(std::move(file), "x.safetensors");
  if (result.ok()) return "accepted";
  CHECK(result.failure().kind == ErrorKind::invalid_argument);
  return result.failure().message;
}

std::string refusal(const std::string& header, std::size_t data_bytes) {
  return refusal(file_of(header, data_bytes));
}

std::string one_tensor(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"q":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
}

StoredTensor f32_tensor(const char* name, const std::vector<float>& values) {
  return {name, "F32", {static_cast<std::int64_t>(values.size())}, std::as_bytes(std::span(values))};
}

}  // namespace

TEST_CASE("a file that was written reads back, bit for bit") {
  const std::vector<float> numbers = {1.5f, -0.0f, std::numeric_limits<float>::infinity(),
                                      std::numeric_limits<float>::quiet_NaN(), 1e-45f};
  const Bytes halves(12, std::byte{0x7e});
  const std::vector<StoredTensor> tensors = {{"halves", "F16", {2, 3}, halves},
                                             f32_tensor("numbers", numbers),
                                             {"nothing", "BF16", {4, 0, 2}, {}},
                                             {"scalar", "U8", {}, std::span(halves).first(1)}};
  auto encoded = encode_safetensors(tensors, {{"made by", "a test"}});
  REQUIRE(encoded.ok());
  const auto file = SafetensorsFile::parse(std::move(*encoded), "x");
  REQUIRE(file.ok());
  CHECK(file->tensors().size() == 4);
  CHECK(file->metadata() == std::map<std::string, std::string>{{"made by", "a test"}});
  for (const StoredTensor& expected : tensors) {
    const StoredTensor* found = file->find(expected.name);
    REQUIRE(found != nullptr);
    CHECK(found->dtype == expected.dtype);
    CHECK(found->shape == expected.shape);
    CHECK(std::ranges::equal(found->bytes, expected.bytes));
  }
  CHECK(file->find("absent") == nullptr);
  // Wide elements first: the float32 tensor starts the data part, which starts at a multiple of 8.
  CHECK(file->tensors().front().name == "numbers");
}

TEST_CASE("the tensors of a file survive its move") {
  const std::vector<float> numbers = {1, 2, 3};
  auto parsed = SafetensorsFile::parse(*encode_safetensors(std::array{f32_tensor("a", numbers)}, {}), "x");
  REQUIRE(parsed.ok());
  const SafetensorsFile moved = std::move(*parsed);
  CHECK(std::ranges::equal(moved.find("a")->bytes, std::as_bytes(std::span(numbers))));
}

TEST_CASE("headers padded with spaces and files without tensors are valid") {
  CHECK(refusal("{}      ", 0) == "accepted");
  CHECK(refusal(one_tensor("\"F32\"", "[2]", "[0,8]") + "   ", 8) == "accepted");
}

TEST_CASE("lying lengths") {
  CHECK(refusal(Bytes()) == "x.safetensors: 0 bytes are too few for a .safetensors file");
  CHECK(refusal(bytes_of("1234567")) == "x.safetensors: 7 bytes are too few for a .safetensors file");
  CHECK(refusal(bytes_of(std::string("\x03\0\0\0\0\0\0\0{}", 10))) ==
        "x.safetensors: header length 3 goes beyond the file's 10 bytes; is it truncated?");
  CHECK(refusal(bytes_of(std::string(16, '\xff'))) ==
        "x.safetensors: header length 18446744073709551615 is above the format's limit of 100000000; "
        "is this a .safetensors file?");
}

TEST_CASE("headers that are no header") {
  CHECK(refusal("", 0) == "x.safetensors: the header is not valid JSON");
  CHECK(refusal(R"({"q":)", 0) == "x.safetensors: the header is not valid JSON");
  CHECK(refusal("{} trailing", 0) == "x.safetensors: the header is not valid JSON");
  CHECK(refusal("{\"\xff\":{}}", 0) == "x.safetensors: the header is not valid JSON");
  CHECK(refusal("[1,2]", 0) == "x.safetensors: the header is JSON, but not an object");
  CHECK(refusal(R"({"q":{},"q":{}})", 0) == R"(x.safetensors: the header has "q" twice)");
  CHECK(refusal(R"({"q":{"dtype":"F32","dtype":"F16","shape":[0],"data_offsets":[0,0]}})", 0) ==
        R"(x.safetensors: the header has "dtype" twice)");
  CHECK(refusal(R"({"__metadata__":[]})", 0) == "x.safetensors: __metadata__ is not an object");
  CHECK(refusal(R"({"__metadata__":{"a":1}})", 0) ==
        R"(x.safetensors: __metadata__: the value of "a" is not text)");
}

TEST_CASE("entries that are no tensor") {
  CHECK(refusal(R"({"q":3})", 0) == R"(x.safetensors: tensor "q": its entry is not an object)");
  CHECK(refusal(R"({"q":{"dtype":"F32","shape":[1]}})", 0) ==
        R"(x.safetensors: tensor "q": data_offsets is missing)");
  CHECK(refusal(one_tensor("\"F31\"", "[1]", "[0,4]"), 4) ==
        R"(x.safetensors: tensor "q": unknown dtype "F31")");
  CHECK(refusal(one_tensor("32", "[1]", "[0,4]"), 4) == R"(x.safetensors: tensor "q": unknown dtype 32)");
  CHECK(refusal(R"({"a\nb":{}})", 0) == R"(x.safetensors: tensor "a\nb": dtype is missing)");
}

TEST_CASE("impossible shapes") {
  CHECK(refusal(one_tensor("\"F32\"", "{}", "[0,4]"), 4) ==
        R"(x.safetensors: tensor "q": shape is not an array)");
  for (const char* extent : {"-1", "1.0", "\"1\"", "null", "9223372036854775808", "1e3"}) {
    CAPTURE(extent);
    CHECK(refusal(one_tensor("\"F32\"", std::string("[") + extent + "]", "[0,4]"), 4)
              .starts_with(R"(x.safetensors: tensor "q": shape holds )"));
  }
  CHECK(refusal(one_tensor("\"F32\"", "[4294967296,4294967296]", "[0,4]"), 4) ==
        R"(x.safetensors: tensor "q": shape [4294967296, 4294967296] overflows)");
}

TEST_CASE("impossible offsets") {
  for (const char* offsets : {"[0]", "[0,4,8]", "[-4,0]", "[0,4.0]", "4", "[\"0\",4]"}) {
    CAPTURE(offsets);
    CHECK(refusal(one_tensor("\"F32\"", "[1]", offsets), 4) ==
          R"(x.safetensors: tensor "q": data_offsets are not two integers >= 0)");
  }
  CHECK(refusal(one_tensor("\"F32\"", "[1]", "[4,0]"), 4) ==
        R"(x.safetensors: tensor "q": data_offsets [4, 0] end before they begin)");
  CHECK(refusal(one_tensor("\"F32\"", "[2]", "[0,8]"), 4) ==
        R"(x.safetensors: tensor "q": data_offsets [0, 8] go beyond the 4 bytes of data)");
  CHECK(refusal(one_tensor("\"F16\"", "[1]", "[0,4]"), 4) ==
        R"(x.safetensors: tensor "q": data_offsets span 4 bytes, but F16 [1] takes 2)");
}

TEST_CASE("data that is shared, skipped or left over") {
  const std::string two = R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
                          R"("b":{"dtype":"U8","shape":[4],"data_offsets":)";
  CHECK(refusal(two + "[4,8]}}", 8) == "accepted");
  CHECK(refusal(two + "[3,7]}}", 7) ==
        R"(x.safetensors: tensor "b": its data overlaps the tensor before it)");
  CHECK(refusal(two + "[6,10]}}", 10) == R"(x.safetensors: tensor "b": a hole of 2 bytes before its data)");
  CHECK(refusal(two + "[4,8]}}", 9) == "x.safetensors: 1 bytes after the last tensor belong to none");
  CHECK(refusal("{}", 5) == "x.safetensors: 5 bytes after the last tensor belong to none");
}

TEST_CASE("no truncation of a valid file is accepted") {
  const std::vector<float> numbers = {1, 2, 3};
  const Bytes whole = *encode_safetensors(std::array{f32_tensor("a", numbers)}, {});
  for (std::size_t size = 0; size < whole.size(); ++size) {
    CAPTURE(size);
    CHECK(refusal(Bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size))) != "accepted");
  }
}

TEST_CASE("the writer refuses what the reader would") {
  const std::vector<float> one = {1};
  const auto message = [](const std::vector<StoredTensor>& tensors) {
    const auto result = encode_safetensors(tensors, {});
    return result.ok() ? "accepted" : result.failure().message;
  };
  CHECK(message({f32_tensor("a", one), f32_tensor("a", one)}) == R"(two tensors are called "a")");
  CHECK(message({{"a", "F32", {2}, std::as_bytes(std::span(one))}}) ==
        R"(tensor "a": 4 bytes do not fit F32 [2])");
  CHECK(message({{"a", "F99", {1}, std::as_bytes(std::span(one))}}) ==
        R"(tensor "a": 4 bytes do not fit F99 [1])");
}

TEST_CASE("writing replaces a file whole and replaces nothing but files") {
  const auto folder = std::filesystem::temp_directory_path() / "attune_safetensors_test";
  std::filesystem::remove_all(folder);
  std::filesystem::create_directory(folder);
  const auto path = folder / "x.safetensors";
  std::ofstream(path) << "something older";
  const std::vector<float> numbers = {1, 2, 3};
  REQUIRE(write_safetensors(path, std::array{f32_tensor("a", numbers)}, {}).ok());
  const auto read = SafetensorsFile::read(path);
  REQUIRE(read.ok());
  CHECK(std::ranges::equal(read->find("a")->bytes, std::as_bytes(std::span(numbers))));
  CHECK(std::distance(std::filesystem::directory_iterator(folder), {}) == 1);  // no temporary file stays

  const auto refused = write_safetensors(folder, {}, {});
  REQUIRE(!refused.ok());
  CHECK(refused.failure().message == folder.string() + " exists and is not a regular file");
  const auto absent = SafetensorsFile::read(folder / "absent.safetensors");
  REQUIRE(!absent.ok());
  CHECK(absent.failure().kind == ErrorKind::invalid_argument);
  CHECK(absent.failure().message.find("absent.safetensors") != std::string::npos);
  std::filesystem::remove_all(folder);
}
