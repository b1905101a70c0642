#include "cache/entry.h"

#include <doctest/doctest.h>

#include <cstring>
#include <limits>

namespace attune::cache {
namespace {

using Bytes = std::vector<std::byte>;

// Offsets of the header's fields, as docs/cache_format.md has them.
constexpr std::size_t kVersionAt = 8;
constexpr std::size_t kPayloadOffsetAt = 12;
constexpr std::size_t kMetadataBytesAt = 16;
constexpr std::size_t kPayloadBytesAt = 24;
constexpr std::size_t kHeaderDigestAt = 96;
constexpr std::size_t kHeaderBytes = 128;

Entry sample(std::size_t metadata_bytes = 15, std::size_t payload_bytes = 21) {
  Entry entry{.key = sha256("key"), .metadata_json = "{\"attune\": 1}", .payload = Bytes(payload_bytes)};
  entry.metadata_json.resize(metadata_bytes, ' ');
  for (std::size_t i = 0; i < payload_bytes; ++i) entry.payload[i] = static_cast<std::byte>(i * 7 + 1);
  return entry;
}

void put(Bytes& file, std::size_t at, std::size_t size, std::uint64_t value) {
  for (std::size_t i = 0; i < size; ++i) file[at + i] = static_cast<std::byte>(value >> (8 * i));
}

/// Makes the header's checksum right again, so that the checks behind it are reached.
void sign(Bytes& file, std::size_t metadata_bytes) {
  Bytes hashed(file.begin(), file.begin() + kHeaderDigestAt);
  hashed.insert(hashed.end(), file.begin() + kHeaderBytes,
                file.begin() + static_cast<std::ptrdiff_t>(kHeaderBytes + metadata_bytes));
  const Digest digest = sha256(hashed);
  std::memcpy(&file[kHeaderDigestAt], digest.bytes.data(), digest.bytes.size());
}

std::string refusal(const Bytes& file, const Digest& key = sha256("key")) {
  const auto entry = decode(file, key);
  return entry.ok() ? "accepted" : entry.failure().message;
}

TEST_CASE("an entry survives the way to bytes and back") {
  for (const std::size_t metadata : {0, 1, 15, 3967, 3968, 3969, 10000}) {
    for (const std::size_t payload : {0, 1, 4096, 70001}) {
      const Entry entry = sample(metadata, payload);
      const Bytes file = encode(entry);
      const std::size_t offset = file.size() - payload;
      CHECK(offset % kPayloadOffset == 0);
      CHECK(offset - kHeaderBytes - metadata < kPayloadOffset);
      const auto read = decode(file, entry.key);
      REQUIRE(read.ok());
      CHECK(read->key == entry.key);
      CHECK(read->metadata_json == entry.metadata_json);
      CHECK(read->payload == entry.payload);
    }
  }
}

TEST_CASE("the bytes of format 1 stay as they are") {
  const Bytes file = encode(sample());
  CHECK(file.size() == kPayloadOffset + 21);
  CHECK(std::memcmp(file.data(),
                    "\x89"
                    "ATTN\r\n\x1a\x01\0\0\0\0\x10\0\0\x0f\0\0\0\0\0\0\0\x15\0\0\0\0\0\0\0",
                    32) == 0);
  CHECK(sha256(file).hex() == "971afdc2eb67c0bd3ec04a9914270a6b08cddfb6fc2e5e973d86b9bd4aea52a5");
}

TEST_CASE("every flipped bit is refused") {
  Bytes file = encode(sample());
  std::size_t accepted = 0;
  for (std::size_t bit = 0; bit < 8 * file.size(); ++bit) {
    const auto mask = static_cast<std::byte>(1 << bit % 8);
    file[bit / 8] ^= mask;
    if (decode(file, sha256("key")).ok()) ++accepted;
    file[bit / 8] ^= mask;
  }
  CHECK(accepted == 0);
  CHECK(decode(file, sha256("key")).ok());
}

TEST_CASE("every truncation is refused, the empty file included") {
  const Bytes file = encode(sample());
  std::size_t accepted = 0;
  for (std::size_t size = 0; size < file.size(); ++size) {
    // A copy of exactly this size, so that AddressSanitizer sees a read past its end.
    if (decode(Bytes(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(size)), sha256("key")).ok())
      ++accepted;
  }
  CHECK(accepted == 0);
}

TEST_CASE("an extension is refused") {
  for (const std::size_t more : {1, 4096}) {
    Bytes file = encode(sample());
    file.resize(file.size() + more);
    CHECK(refusal(file).find("bytes of payload") != std::string::npos);
  }
}

TEST_CASE("refusals say what is wrong") {
  CHECK(refusal({}) == "cache entry refused: 0 bytes are less than its header's 128");
  CHECK(refusal(Bytes(5000)) == "cache entry refused: not a cache entry (magic)");
  const Bytes good = encode(sample());

  Bytes file = good;
  put(file, kVersionAt, 4, 2);
  sign(file, 15);
  CHECK(refusal(file) == "cache entry refused: format version 2, this library reads 1");

  CHECK(refusal(good, sha256("other")) ==
        "cache entry refused: it has key " + sha256("key").hex() + ", expected " + sha256("other").hex());
  file = good;
  file[kHeaderBytes] = std::byte{'!'};
  CHECK(refusal(file) == "cache entry refused: checksum of header and metadata");
  file = good;
  file[kHeaderBytes + 15] = std::byte{1};
  CHECK(refusal(file) == "cache entry refused: padding is not zero");
  file = good;
  file.back() ^= std::byte{1};
  CHECK(refusal(file) == "cache entry refused: checksum of the payload");
}

TEST_CASE("lying sizes are refused, even under a right checksum") {
  constexpr auto kMax = std::numeric_limits<std::uint64_t>::max();
  const Bytes good = encode(sample());
  for (const std::uint64_t size : {kMax, kMax - 127, kMax - 4095, kMax / 2 + 1, std::uint64_t{4096},
                                   std::uint64_t{22}, std::uint64_t{20}, std::uint64_t{0}}) {
    Bytes file = good;
    put(file, kPayloadBytesAt, 8, size);
    sign(file, 15);
    CHECK(refusal(file).find("bytes of payload") != std::string::npos);
  }
  for (const std::uint64_t size :
       {kMax, kMax - 127, kMax / 2 + 1, std::uint64_t{good.size()}, good.size() - kHeaderBytes + 1}) {
    Bytes file = good;
    put(file, kMetadataBytesAt, 8, size);
    CHECK(refusal(file).find("bytes of metadata") != std::string::npos);
  }
  for (const std::uint64_t offset : {0ULL, 128ULL, 4095ULL, 8192ULL, 0xfffff000ULL}) {
    Bytes file = good;
    put(file, kPayloadOffsetAt, 4, offset);
    sign(file, 15);
    CHECK(refusal(file).find("bytes of payload at") != std::string::npos);
  }
}

TEST_CASE("metadata that claims the whole file is refused, even under a right checksum") {
  Bytes file = encode(sample(100, 50));
  const std::size_t claimed = file.size() - kHeaderBytes;
  put(file, kMetadataBytesAt, 8, claimed);
  sign(file, claimed);
  CHECK(refusal(file).find("bytes of payload") != std::string::npos);
}

}  // namespace
}  // namespace attune::cache
