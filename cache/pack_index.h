// The head of a pack: header, index sorted by key, manifest. Everything about a pack but its kernels, and
// all that opening one reads. docs/cache_format.md has the grammar; pack_index.cpp and pack_writer.cpp are
// its code.
#pragma once

#include "base/digest.h"
#include "base/result.h"
#include "cache/pack_key.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace attune::cache {

/// Bump when a byte of the layout changes; readers refuse every other version.
inline constexpr std::uint32_t kPackVersion = 1;
inline constexpr std::size_t kPackHeaderBytes = 160;
inline constexpr std::size_t kPackRecordBytes = 96;

// What a reader is ready to believe, so that no size in a file makes it ask for absurd amounts of memory.
inline constexpr std::uint64_t kMaxPackEntries = 1 << 20;
inline constexpr std::uint64_t kMaxManifestBytes = 16 << 20;
inline constexpr std::uint64_t kMaxPackedEntryBytes = 256 << 20;  // metadata and payload, uncompressed

/// One kernel of the index.
struct PackRecord {
  Digest key;
  Digest stored_digest;            // SHA-256 of the compressed bytes
  std::uint64_t offset = 0;        // of the compressed bytes, in the file
  std::uint64_t stored_bytes = 0;  // how many they are
  std::uint64_t metadata_bytes = 0;
  std::uint64_t payload_bytes = 0;
};

struct PackHeader {
  bool is_signed = false;
  std::uint64_t entries = 0;
  std::uint64_t manifest_bytes = 0;
  Digest index_digest;    // SHA-256 of index and manifest
  Signature signature{};  // zeros when not signed

  std::uint64_t head_bytes() const { return kPackHeaderBytes + entries * kPackRecordBytes + manifest_bytes; }
};

/// A signature signs this: the header up to the signature, and by its digests all of the file.
std::array<std::byte, 64> signed_part(const PackHeader& header);

/// The header's 160 bytes.
std::array<std::byte, kPackHeaderBytes> encode_header(const PackHeader& header);
/// Parses and verifies the header at the begin of a file of `file_bytes`, which has room for the whole head.
Result<PackHeader> decode_pack_header(std::span<const std::byte> file, std::uint64_t file_bytes);

/// The record's 96 bytes, written at the begin of `bytes`.
void encode_record(std::span<std::byte> bytes, const PackRecord& record);

class PackIndex {
 public:
  /// Takes the first head_bytes() of a pack. Verifies all of them: afterwards every record names bytes that a
  /// file of `file_bytes` has, and no two the same ones.
  static Result<PackIndex> decode(std::vector<std::byte> head, std::uint64_t file_bytes);

  const PackHeader& header() const { return header_; }
  std::size_t size() const { return static_cast<std::size_t>(header_.entries); }
  /// In the order of the keys.
  PackRecord at(std::size_t i) const;
  std::optional<PackRecord> find(const Digest& key) const;
  std::string_view manifest() const;

 private:
  PackIndex(PackHeader header, std::vector<std::byte> head) : header_(header), head_(std::move(head)) {}
  Result<void> check_records(std::uint64_t file_bytes) const;

  PackHeader header_;
  std::vector<std::byte> head_;
};

}  // namespace attune::cache
