// The cache's entry: one self-describing file. docs/cache_format.md has the grammar; this is its code.
#pragma once

#include "base/digest.h"
#include "base/result.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace attune::cache {

/// Bump when a byte of the layout changes; readers refuse every other version.
inline constexpr std::uint32_t kFormatVersion = 1;
/// Where the payload starts: a page boundary, so that it can be mapped.
inline constexpr std::size_t kPayloadOffset = 4096;

struct Entry {
  Digest key;
  std::string metadata_json;
  std::vector<std::byte> payload;
};

/// The file's bytes: header (with SHA-256 of payload and of header plus metadata), metadata, padding,
/// payload. The payload offset is 4096, or the next multiple of it that clears the metadata.
std::vector<std::byte> encode(const Entry& entry);

/// Parses and verifies everything. The failure says which defect; it never reads out of bounds and accepts no
/// entry with any bit flipped, truncated, extended, of another version or of another key than `expected_key`.
Result<Entry> decode(std::span<const std::byte> file, const Digest& expected_key);

}  // namespace attune::cache
