// libFuzzer on the reader of entries. The first byte of an input says whether the checksums are made right,
// so that what stands behind them is reached.
#include "base/byte_fields.h"
#include "cache/entry.h"

#include <cstdlib>
#include <span>
#include <vector>

namespace {

using attune::load_number;
using attune::sha256;
using Bytes = std::vector<std::byte>;

constexpr std::size_t kHeaderBytes = 128;

/// Makes both checksums right, as far as the sizes allow. The offsets are those of docs/cache_format.md.
void seal(Bytes& file) {
  if (file.size() < kHeaderBytes) return;
  const std::uint64_t payload_at = load_number(file, 12, 4);
  if (payload_at <= file.size()) attune::store_digest(file, 64, sha256(std::span(file).subspan(payload_at)));
  const std::uint64_t metadata_bytes = load_number(file, 16, 8);
  if (metadata_bytes > file.size() - kHeaderBytes) return;
  Bytes hashed(file.begin(), file.begin() + 96);
  const auto metadata = std::span(file).subspan(kHeaderBytes, metadata_bytes);
  hashed.insert(hashed.end(), metadata.begin(), metadata.end());
  attune::store_digest(file, 96, sha256(hashed));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const auto input = std::as_bytes(std::span(data + 1, size - 1));
  Bytes file(input.begin(), input.end());
  if (data[0] % 2 == 1) seal(file);
  const attune::Digest key = file.size() < kHeaderBytes ? attune::Digest() : attune::load_digest(file, 32);
  const auto entry = attune::cache::decode(file, key);
  // Whatever is accepted is what the writer writes, to the byte.
  if (entry.ok() && attune::cache::encode(*entry) != file) std::abort();
  return 0;
}
