// A pack's bytes, made and changed by tests. The offsets are those of docs/cache_format.md.
#pragma once

#include "base/byte_fields.h"
#include "cache/pack_index.h"
#include "cache/pack_writer.h"

#include <cstddef>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace attune::test {

using Bytes = std::vector<std::byte>;

/// An entry whose bytes depend on its name: numbers that repeat, so that there is something to compress.
inline cache::Entry sample_entry(const std::string& name, std::size_t payload_bytes = 300) {
  cache::Entry entry{
      .key = sha256(name), .metadata_json = "{\"name\": \"" + name + "\"}", .payload = Bytes(payload_bytes)};
  for (std::size_t i = 0; i < payload_bytes; ++i)
    entry.payload[i] = static_cast<std::byte>(i % 7 + name.size());
  return entry;
}

inline Bytes pack_of(const std::vector<cache::Entry>& entries, std::string_view manifest = "{\"kernels\": 2}",
                     const cache::SigningKey* key = nullptr) {
  cache::PackWriter writer;
  for (const cache::Entry& entry : entries) {
    if (!writer.add(entry).ok()) throw std::invalid_argument("two entries of one key");
  }
  auto bytes = writer.finish(manifest, key);
  if (!bytes.ok()) throw std::runtime_error(bytes.failure().message);
  return std::move(*bytes);
}

/// Where field `at` of record `i` stands.
inline std::size_t record_field(std::size_t i, std::size_t at) {
  return cache::kPackHeaderBytes + i * cache::kPackRecordBytes + at;
}

/// Makes the digests of bodies right again, as far as the file has them, so that what is behind the check is
/// reached. seal() comes after it.
inline void seal_bodies(Bytes& pack) {
  for (std::size_t i = 0; record_field(i + 1, 0) <= pack.size() && i < load_number(pack, 16, 8); ++i) {
    const std::uint64_t offset = load_number(pack, record_field(i, 64), 8);
    const std::uint64_t size = load_number(pack, record_field(i, 72), 8);
    if (offset > pack.size() || size > pack.size() - offset) continue;
    store_digest(pack, record_field(i, 32), sha256(std::span(pack).subspan(offset, size)));
  }
}

/// Makes the checksums of header and index right again.
inline void seal(Bytes& pack) {
  if (pack.size() < cache::kPackHeaderBytes) return;
  const std::uint64_t entries = load_number(pack, 16, 8);
  const std::uint64_t manifest_bytes = load_number(pack, 24, 8);
  if (entries <= cache::kMaxPackEntries && manifest_bytes <= cache::kMaxManifestBytes) {
    const std::uint64_t index_bytes = entries * cache::kPackRecordBytes + manifest_bytes;
    if (index_bytes <= pack.size() - cache::kPackHeaderBytes) {
      store_digest(pack, 32, sha256(std::span(pack).subspan(cache::kPackHeaderBytes, index_bytes)));
    }
  }
  store_digest(pack, 128, sha256(std::span(pack).first(128)));
}

}  // namespace attune::test
