// An entry inside a pack: metadata and payload, compressed as one Zstandard frame.
#pragma once

#include "base/result.h"
#include "cache/entry.h"
#include "cache/pack_index.h"

#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace attune::cache {

/// The same bytes each time, with one version of libzstd. Fails with invalid_argument for an entry that is
/// too large for a pack.
Result<std::vector<std::byte>> compress(const Entry& entry);

/// The entry of a record, out of the bytes that it names. Nothing is decompressed before its digest is right,
/// so that a signed pack's decompressor sees signed bytes alone.
Result<Entry> decompress(const PackRecord& record, std::span<const std::byte> stored);

/// "1.5.4". Packs of two versions may differ in bytes, never in entries.
std::string zstd_version();

}  // namespace attune::cache
