#include "cache/pack_index.h"

#include "base/byte_fields.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace attune::cache {
namespace {

// As an entry's, but for one letter.
constexpr std::array<std::uint8_t, 8> kMagic{0x89, 'A', 'T', 'T', 'P', '\r', '\n', 0x1a};

// Byte offsets of the header's fields; all numbers are little endian. docs/cache_format.md has the same
// table.
constexpr std::size_t kVersionAt = 8;         // u32
constexpr std::size_t kSignatureKindAt = 12;  // u32
constexpr std::size_t kEntriesAt = 16;        // u64
constexpr std::size_t kManifestBytesAt = 24;  // u64
constexpr std::size_t kIndexDigestAt = 32;    // SHA-256 of index and manifest
constexpr std::size_t kSignatureAt = 64;      // Ed25519 of bytes 0..63
constexpr std::size_t kHeaderDigestAt = 128;  // SHA-256 of bytes 0..127

// Kinds of signature.
constexpr std::uint32_t kUnsigned = 0;
constexpr std::uint32_t kEd25519 = 1;

// Of a record's fields.
constexpr std::size_t kKeyAt = 0;
constexpr std::size_t kStoredDigestAt = 32;
constexpr std::size_t kOffsetAt = 64;           // u64
constexpr std::size_t kStoredBytesAt = 72;      // u64
constexpr std::size_t kMetadataBytesOfAt = 80;  // u64
constexpr std::size_t kPayloadBytesAt = 88;     // u64

Failure defect(std::string what) {
  return environment_failure("pack refused: " + std::move(what));
}

}  // namespace

// ---- The header ----

std::array<std::byte, 64> signed_part(const PackHeader& header) {
  std::array<std::byte, 64> bytes{};
  std::memcpy(bytes.data(), kMagic.data(), kMagic.size());
  store_number(bytes, kVersionAt, 4, kPackVersion);
  store_number(bytes, kSignatureKindAt, 4, header.is_signed ? kEd25519 : kUnsigned);
  store_number(bytes, kEntriesAt, 8, header.entries);
  store_number(bytes, kManifestBytesAt, 8, header.manifest_bytes);
  store_digest(bytes, kIndexDigestAt, header.index_digest);
  return bytes;
}

std::array<std::byte, kPackHeaderBytes> encode_header(const PackHeader& header) {
  std::array<std::byte, kPackHeaderBytes> bytes{};
  std::ranges::copy(signed_part(header), bytes.begin());
  std::ranges::copy(std::as_bytes(std::span(header.signature)), bytes.begin() + kSignatureAt);
  store_digest(bytes, kHeaderDigestAt, sha256(std::span(bytes).first(kHeaderDigestAt)));
  return bytes;
}

Result<PackHeader> decode_pack_header(std::span<const std::byte> file, std::uint64_t file_bytes) {
  if (file.size() < kPackHeaderBytes || file_bytes < kPackHeaderBytes) {
    return defect(fmt::format("{} bytes are less than its header's {}", file_bytes, kPackHeaderBytes));
  }
  if (std::memcmp(file.data(), kMagic.data(), kMagic.size()) != 0) return defect("not a pack (magic)");
  if (const auto version = load_number(file, kVersionAt, 4); version != kPackVersion) {
    return defect(fmt::format("format version {}, this library reads {}", version, kPackVersion));
  }
  if (sha256(file.first(kHeaderDigestAt)) != load_digest(file, kHeaderDigestAt))
    return defect("checksum of the header");
  const auto kind = load_number(file, kSignatureKindAt, 4);
  if (kind > kEd25519)
    return defect(fmt::format("signature of kind {}, this library knows {}", kind, kEd25519));
  PackHeader header{.is_signed = kind == kEd25519,
                    .entries = load_number(file, kEntriesAt, 8),
                    .manifest_bytes = load_number(file, kManifestBytesAt, 8),
                    .index_digest = load_digest(file, kIndexDigestAt)};
  std::memcpy(header.signature.data(), &file[kSignatureAt], header.signature.size());
  if (!header.is_signed && header.signature != Signature{})
    return defect("a signature that it says it lacks");
  // The bounds first: their sum can't overflow.
  if (header.entries > kMaxPackEntries || header.manifest_bytes > kMaxManifestBytes ||
      header.head_bytes() > file_bytes) {
    return defect(fmt::format("{} entries and {} bytes of manifest in a file of {}", header.entries,
                              header.manifest_bytes, file_bytes));
  }
  return header;
}

// ---- The index ----

void encode_record(std::span<std::byte> bytes, const PackRecord& record) {
  store_digest(bytes, kKeyAt, record.key);
  store_digest(bytes, kStoredDigestAt, record.stored_digest);
  store_number(bytes, kOffsetAt, 8, record.offset);
  store_number(bytes, kStoredBytesAt, 8, record.stored_bytes);
  store_number(bytes, kMetadataBytesOfAt, 8, record.metadata_bytes);
  store_number(bytes, kPayloadBytesAt, 8, record.payload_bytes);
}

Result<PackIndex> PackIndex::decode(std::vector<std::byte> head, std::uint64_t file_bytes) {
  ATTUNE_ASSIGN(header, decode_pack_header(head, file_bytes));
  if (head.size() != header.head_bytes()) return defect("it changed while it was read");
  if (sha256(std::span(head).subspan(kPackHeaderBytes)) != header.index_digest)
    return defect("checksum of index and manifest");
  PackIndex index(header, std::move(head));
  ATTUNE_TRY(index.check_records(file_bytes));
  return index;
}

/// Keys ascend, so that a search finds them; the compressed bytes stand one behind the other and fill the
/// file.
Result<void> PackIndex::check_records(std::uint64_t file_bytes) const {
  std::uint64_t end = head_.size();
  for (std::size_t i = 0; i < size(); ++i) {
    const PackRecord record = at(i);
    if (i > 0 && record.key <= at(i - 1).key) return defect(fmt::format("entry {} is out of order", i));
    if (record.offset != end || record.stored_bytes > file_bytes - end) {
      return defect(fmt::format("entry {} has {} bytes at {} in a file of {}", i, record.stored_bytes,
                                record.offset, file_bytes));
    }
    if (record.metadata_bytes > kMaxPackedEntryBytes ||
        record.payload_bytes > kMaxPackedEntryBytes - record.metadata_bytes) {
      return defect(fmt::format("entry {} claims {} bytes of metadata and {} of payload", i,
                                record.metadata_bytes, record.payload_bytes));
    }
    end += record.stored_bytes;
  }
  if (end != file_bytes) return defect(fmt::format("its entries end at {} in a file of {}", end, file_bytes));
  return done();
}

PackRecord PackIndex::at(std::size_t i) const {
  const auto bytes = std::span(head_).subspan(kPackHeaderBytes + i * kPackRecordBytes, kPackRecordBytes);
  return {.key = load_digest(bytes, kKeyAt),
          .stored_digest = load_digest(bytes, kStoredDigestAt),
          .offset = load_number(bytes, kOffsetAt, 8),
          .stored_bytes = load_number(bytes, kStoredBytesAt, 8),
          .metadata_bytes = load_number(bytes, kMetadataBytesOfAt, 8),
          .payload_bytes = load_number(bytes, kPayloadBytesAt, 8)};
}

std::optional<PackRecord> PackIndex::find(const Digest& key) const {
  std::size_t begin = 0, end = size();  // a record of this key is among these
  while (begin < end) {
    const std::size_t middle = begin + (end - begin) / 2;
    const PackRecord record = at(middle);
    if (record.key == key) return record;
    if (record.key < key) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return std::nullopt;
}

std::string_view PackIndex::manifest() const {
  const auto bytes = std::span(head_).subspan(kPackHeaderBytes + size() * kPackRecordBytes);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace attune::cache
