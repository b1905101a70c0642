#include "cache/pack_writer.h"

#include "cache/pack_index.h"
#include "cache/packed_entry.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace attune::cache {

Result<void> PackWriter::add(const Entry& entry) {
  ATTUNE_ASSIGN(stored, compress(entry));
  const std::lock_guard lock(mutex_);
  const bool added = packed_
                         .try_emplace(entry.key, Packed{.stored = std::move(stored),
                                                        .metadata_bytes = entry.metadata_json.size(),
                                                        .payload_bytes = entry.payload.size()})
                         .second;
  return added ? done() : invalid_argument(fmt::format("key {} is in the pack already", entry.key.hex()));
}

Result<std::vector<std::byte>> PackWriter::finish(std::string_view manifest, const SigningKey* key) const {
  PackHeader header{.is_signed = key != nullptr, .entries = size(), .manifest_bytes = manifest.size()};
  if (header.entries > kMaxPackEntries || header.manifest_bytes > kMaxManifestBytes) {
    return invalid_argument(fmt::format("{} entries and {} bytes of manifest are too many for one pack",
                                        header.entries, header.manifest_bytes));
  }
  std::vector<std::byte> file(header.head_bytes());
  std::size_t at = kPackHeaderBytes;
  for (const auto& [entry_key, packed] : packed_) {
    encode_record(std::span(file).subspan(at), {.key = entry_key,
                                                .stored_digest = sha256(packed.stored),
                                                .offset = file.size(),
                                                .stored_bytes = packed.stored.size(),
                                                .metadata_bytes = packed.metadata_bytes,
                                                .payload_bytes = packed.payload_bytes});
    at += kPackRecordBytes;
    file.insert(file.end(), packed.stored.begin(), packed.stored.end());
  }
  std::ranges::copy(std::as_bytes(std::span(manifest)), file.begin() + static_cast<std::ptrdiff_t>(at));

  header.index_digest =
      sha256(std::span(file).subspan(kPackHeaderBytes, header.head_bytes() - kPackHeaderBytes));
  if (key != nullptr) {
    ATTUNE_ASSIGN(signature, key->sign(signed_part(header)));
    header.signature = signature;
  }
  std::ranges::copy(encode_header(header), file.begin());
  return file;
}

}  // namespace attune::cache
