#include "cache/entry.h"

#include "base/byte_fields.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>

namespace attune::cache {
namespace {

// The first byte is no text and the line ends catch a transfer that "corrects" them, as in PNG.
constexpr std::array<std::uint8_t, 8> kMagic{0x89, 'A', 'T', 'T', 'N', '\r', '\n', 0x1a};

// Byte offsets of the header's fields; all numbers are little endian. docs/cache_format.md has the same
// table.
constexpr std::size_t kVersionAt = 8;         // u32
constexpr std::size_t kPayloadOffsetAt = 12;  // u32
constexpr std::size_t kMetadataBytesAt = 16;  // u64
constexpr std::size_t kPayloadBytesAt = 24;   // u64
constexpr std::size_t kKeyAt = 32;            // 32 bytes
constexpr std::size_t kPayloadDigestAt = 64;  // SHA-256 of the payload
constexpr std::size_t kHeaderDigestAt = 96;   // SHA-256 of bytes 0..95 and the metadata
constexpr std::size_t kHeaderBytes = 128;

std::size_t payload_offset(std::size_t metadata_bytes) {
  return (kHeaderBytes + metadata_bytes + kPayloadOffset - 1) / kPayloadOffset * kPayloadOffset;
}

Digest header_digest(std::span<const std::byte> file, std::size_t metadata_bytes) {
  // The metadata follows the digest's own field, so the two parts are hashed as one copy.
  std::vector<std::byte> hashed(file.begin(), file.begin() + kHeaderDigestAt);
  const auto metadata = file.subspan(kHeaderBytes, metadata_bytes);
  hashed.insert(hashed.end(), metadata.begin(), metadata.end());
  return sha256(hashed);
}

Failure defect(std::string what) {
  return environment_failure("cache entry refused: " + std::move(what));
}

}  // namespace

std::vector<std::byte> encode(const Entry& entry) {
  const std::size_t metadata_bytes = entry.metadata_json.size();
  const std::size_t offset = payload_offset(metadata_bytes);
  std::vector<std::byte> file(offset + entry.payload.size());
  std::memcpy(file.data(), kMagic.data(), kMagic.size());
  store_number(file, kVersionAt, 4, kFormatVersion);
  store_number(file, kPayloadOffsetAt, 4, offset);
  store_number(file, kMetadataBytesAt, 8, metadata_bytes);
  store_number(file, kPayloadBytesAt, 8, entry.payload.size());
  store_digest(file, kKeyAt, entry.key);
  store_digest(file, kPayloadDigestAt, sha256(entry.payload));
  std::ranges::copy(std::as_bytes(std::span(entry.metadata_json)), file.begin() + kHeaderBytes);
  store_digest(file, kHeaderDigestAt, header_digest(file, metadata_bytes));
  std::ranges::copy(entry.payload, file.begin() + static_cast<std::ptrdiff_t>(offset));
  return file;
}

Result<Entry> decode(std::span<const std::byte> file, const Digest& expected_key) {
  if (file.size() < kHeaderBytes) {
    return defect(fmt::format("{} bytes are less than its header's {}", file.size(), kHeaderBytes));
  }
  if (std::memcmp(file.data(), kMagic.data(), kMagic.size()) != 0) return defect("not a cache entry (magic)");
  if (const auto version = load_number(file, kVersionAt, 4); version != kFormatVersion) {
    return defect(fmt::format("format version {}, this library reads {}", version, kFormatVersion));
  }
  const std::uint64_t metadata_bytes = load_number(file, kMetadataBytesAt, 8);
  if (metadata_bytes > file.size() - kHeaderBytes) {
    return defect(fmt::format("{} bytes of metadata in a file of {}", metadata_bytes, file.size()));
  }
  if (header_digest(file, metadata_bytes) != load_digest(file, kHeaderDigestAt)) {
    return defect("checksum of header and metadata");
  }
  // The header is what encode() wrote; whether the rest of the file is, too, is still open.
  const Digest key = load_digest(file, kKeyAt);
  if (key != expected_key)
    return defect(fmt::format("it has key {}, expected {}", key.hex(), expected_key.hex()));
  const std::size_t offset = payload_offset(metadata_bytes);
  const std::uint64_t payload_bytes = load_number(file, kPayloadBytesAt, 8);
  if (load_number(file, kPayloadOffsetAt, 4) != offset || offset > file.size() ||
      payload_bytes != file.size() - offset) {
    return defect(
        fmt::format("{} bytes of payload at {} in a file of {}", payload_bytes, offset, file.size()));
  }
  const auto padding = file.subspan(kHeaderBytes + metadata_bytes, offset - kHeaderBytes - metadata_bytes);
  if (!std::ranges::all_of(padding, [](std::byte b) { return b == std::byte{0}; }))
    return defect("padding is not zero");
  const auto payload = file.subspan(offset);
  if (sha256(payload) != load_digest(file, kPayloadDigestAt)) return defect("checksum of the payload");

  const auto* metadata = reinterpret_cast<const char*>(file.data()) + kHeaderBytes;
  return Entry{.key = key,
               .metadata_json = std::string(metadata, metadata_bytes),
               .payload = {payload.begin(), payload.end()}};
}

}  // namespace attune::cache
