#include "base/digest.h"

#include <doctest/doctest.h>

#include <string>

namespace attune {
namespace {

std::string length(std::size_t n) {  // as FieldDigest counts: 8 bytes, little endian
  std::string bytes(8, '\0');
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(n >> (8 * i));
  return bytes;
}

TEST_CASE("SHA-256 gives the values of FIPS 180-4's examples") {
  CHECK(sha256("").hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(sha256("abc").hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(sha256(std::string(1000000, 'a')).hex() ==
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST_CASE("bytes and text hash alike") {
  const std::string text("a\0b", 3);
  CHECK(sha256(std::as_bytes(std::span(text))) == sha256(text));
}

TEST_CASE("hexadecimal goes both ways") {
  const Digest digest = sha256("attune");
  CHECK(Digest::from_hex(digest.hex()) == digest);
  std::string upper = digest.hex();
  for (char& c : upper) c = static_cast<char>(std::toupper(c));
  CHECK(Digest::from_hex(upper) == digest);
}

TEST_CASE("from_hex takes 64 hexadecimal digits and nothing else") {
  const std::string good = sha256("x").hex();
  CHECK_FALSE(Digest::from_hex(""));
  CHECK_FALSE(Digest::from_hex(good.substr(1)));
  CHECK_FALSE(Digest::from_hex(good + "0"));
  for (const char bad : {'g', ' ', '/', ':', '@', 'G', '`', '\0'}) {
    for (const std::size_t at : {0, 1, 63}) {
      std::string text = good;
      text[at] = bad;
      CHECK_FALSE(Digest::from_hex(text));
    }
  }
}

TEST_CASE("a field digest is the SHA-256 of its counted fields") {
  FieldDigest fields;
  fields.field("spec", "mma").field("", "");
  CHECK(fields.finish() == sha256(length(4) + "spec" + length(3) + "mma" + length(0) + length(0)));
}

TEST_CASE("no two field lists share a byte stream") {
  const auto of = [](std::initializer_list<std::pair<const char*, const char*>> list) {
    FieldDigest fields;
    for (const auto& [tag, value] : list) fields.field(tag, value);
    return fields.finish();
  };
  CHECK(of({{"a", "bc"}}) != of({{"ab", "c"}}));
  CHECK(of({{"a", "b"}, {"c", "d"}}) != of({{"a", "bcd"}}));
  CHECK(of({{"a", "b"}, {"c", "d"}}) != of({{"c", "d"}, {"a", "b"}}));
  CHECK(of({{"a", ""}}) != of({}));
}

TEST_CASE("finish starts over") {
  FieldDigest fields;
  const Digest first = fields.field("a", "b").finish();
  CHECK(fields.finish() == sha256(""));
  CHECK(fields.field("a", "b").finish() == first);
}

}  // namespace
}  // namespace attune
