#include "cache/pack.h"

#include "cache/packed_entry.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace attune::cache {
namespace {

namespace fs = std::filesystem;

/// Copied, not mapped: what was verified must be what is used, and a file that is cut short under a mapping
/// kills the process.
Result<PackIndex> read_index(const OpenFile& file) {
  const auto header_bytes = std::min<std::uint64_t>(file.size(), kPackHeaderBytes);
  ATTUNE_ASSIGN(start, file.read(0, header_bytes));
  ATTUNE_ASSIGN(header, decode_pack_header(start, file.size()));
  ATTUNE_ASSIGN(head, file.read(0, header.head_bytes()));
  return PackIndex::decode(std::move(head), file.size());
}

Result<void> check_signature(const PackHeader& header, const VerifyingKey& key) {
  if (!header.is_signed)
    return environment_failure("pack refused: it is not signed, and ATTUNE_PACK_KEY asks for a signature");
  if (!key.verifies(signed_part(header), header.signature))
    return environment_failure("pack refused: it is not signed with the key of ATTUNE_PACK_KEY");
  return done();
}

Failure at(const fs::path& path, const Failure& failure) {
  return {failure.kind, fmt::format("{}: {}", path.string(), failure.message)};
}

}  // namespace

Result<Pack> Pack::open(const fs::path& path, const VerifyingKey* key) {
  ATTUNE_ASSIGN(file, OpenFile::open(path));
  if (key == nullptr) ATTUNE_TRY(file.check_trusted_owner());
  auto index = read_index(file);
  if (!index.ok()) return at(path, index.failure());
  if (key != nullptr) {
    if (const auto checked = check_signature(index->header(), *key); !checked.ok())
      return at(path, checked.failure());
  }
  return Pack(path, std::move(file), std::move(*index));
}

Result<std::optional<Entry>> Pack::find(const Digest& key) const {
  const auto record = index_.find(key);
  if (!record) return std::optional<Entry>();
  ATTUNE_ASSIGN(stored, file_.read(record->offset, record->stored_bytes));
  auto entry = decompress(*record, stored);
  if (!entry.ok()) return at(path_, entry.failure());
  return std::optional(std::move(*entry));
}

}  // namespace attune::cache
