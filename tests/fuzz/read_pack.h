// A pack in memory, read as cache/pack.cpp reads it from a file.
#pragma once

#include "cache/pack_index.h"
#include "cache/packed_entry.h"

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

namespace attune::test {

/// The first refusal, or all entries.
inline Result<std::vector<cache::Entry>> read_pack(std::span<const std::byte> file) {
  ATTUNE_ASSIGN(header, cache::decode_pack_header(file, file.size()));
  const auto head = file.first(header.head_bytes());
  ATTUNE_ASSIGN(index, cache::PackIndex::decode({head.begin(), head.end()}, file.size()));
  std::vector<cache::Entry> entries;
  for (std::size_t i = 0; i < index.size(); ++i) {
    const cache::PackRecord record = index.at(i);
    ATTUNE_ASSIGN(entry, cache::decompress(record, file.subspan(record.offset, record.stored_bytes)));
    entries.push_back(std::move(entry));
  }
  return entries;
}

}  // namespace attune::test
