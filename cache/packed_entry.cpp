#include "cache/packed_entry.h"

#include <fmt/format.h>

#include <zstd.h>

#include <algorithm>
#include <utility>

namespace attune::cache {
namespace {

/// Packs are made once and read often: above this level cubins shrink by one per cent more for three times
/// the time.
constexpr int kLevel = 14;

Failure defect(const PackRecord& record, std::string_view what) {
  return environment_failure(fmt::format("pack entry {} refused: {}", record.key.hex(), what));
}

}  // namespace

Result<std::vector<std::byte>> compress(const Entry& entry) {
  const auto metadata = std::as_bytes(std::span(entry.metadata_json));
  std::vector<std::byte> plain(metadata.begin(), metadata.end());
  plain.insert(plain.end(), entry.payload.begin(), entry.payload.end());
  if (plain.size() > kMaxPackedEntryBytes) {
    return invalid_argument(fmt::format("entry {} of {} bytes is too large for a pack, whose limit is {}",
                                        entry.key.hex(), plain.size(), kMaxPackedEntryBytes));
  }
  std::vector<std::byte> stored(ZSTD_compressBound(plain.size()));
  const std::size_t size = ZSTD_compress(stored.data(), stored.size(), plain.data(), plain.size(), kLevel);
  if (ZSTD_isError(size) != 0) {
    return environment_failure(
        fmt::format("cannot compress {}: {}", entry.key.hex(), ZSTD_getErrorName(size)));
  }
  stored.resize(size);
  return stored;
}

Result<Entry> decompress(const PackRecord& record, std::span<const std::byte> stored) {
  if (stored.size() != record.stored_bytes || sha256(stored) != record.stored_digest)
    return defect(record, "checksum of the compressed bytes");
  const std::uint64_t size = record.metadata_bytes + record.payload_bytes;  // the index has bounded both
  if (ZSTD_getFrameContentSize(stored.data(), stored.size()) != size)
    return defect(record, "its frame has another size than the index says");
  std::vector<std::byte> plain(size);
  const std::size_t got = ZSTD_decompress(plain.data(), plain.size(), stored.data(), stored.size());
  if (ZSTD_isError(got) != 0) return defect(record, ZSTD_getErrorName(got));
  if (got != size) return defect(record, "its frame is shorter than the index says");

  const auto payload = std::span(plain).subspan(record.metadata_bytes);
  return Entry{
      .key = record.key,
      .metadata_json = std::string(reinterpret_cast<const char*>(plain.data()), record.metadata_bytes),
      .payload = {payload.begin(), payload.end()}};
}

std::string zstd_version() {
  return ZSTD_versionString();
}

}  // namespace attune::cache
