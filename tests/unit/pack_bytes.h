// A pack's bytes, made and changed by tests. The offsets are those of docs/cache_format.md.
#pragma once

#include "base/byte_fields.h"
#include "cache/pack_index.h"
#include "cache/pack_writer.h"

#include <cstddef>
#include <span>
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
    if (!writer.add(entry).ok()) return {};
  }
  auto bytes = writer.finish(manifest, key);
  return bytes.ok() ? std::move(*bytes) : Bytes();
}

/// Makes the checksums of header and index right again, so that the checks behind them are reached.
inline void seal(Bytes& pack) {
  const std::uint64_t head =
      cache::kPackHeaderBytes + load_number(pack, 16, 8) * cache::kPackRecordBytes + load_number(pack, 24, 8);
  if (head <= pack.size()) {
    store_digest(pack, 32,
                 sha256(std::span(pack).subspan(cache::kPackHeaderBytes, head - cache::kPackHeaderBytes)));
  }
  store_digest(pack, 128, sha256(std::span(pack).first(128)));
}

/// Where field `at` of record `i` stands.
inline std::size_t record_field(std::size_t i, std::size_t at) {
  return cache::kPackHeaderBytes + i * cache::kPackRecordBytes + at;
}

}  // namespace attune::test
