// PackWriter: entries in any order, in; the bytes of one pack, out. The same entries give the same bytes.
#pragma once

#include "base/result.h"
#include "cache/entry.h"
#include "cache/pack_key.h"

#include <cstddef>
#include <map>
#include <mutex>
#include <string_view>
#include <vector>

namespace attune::cache {

class PackWriter {
 public:
  /// Keeps the entry compressed. Thread-safe: compression takes milliseconds, and goes on side by side. Fails
  /// with invalid_argument when its key is there already.
  Result<void> add(const Entry& entry);

  /// The pack's bytes. The manifest is opaque here. Signed when there is a key.
  Result<std::vector<std::byte>> finish(std::string_view manifest, const SigningKey* key = nullptr) const;

  std::size_t size() const { return packed_.size(); }

 private:
  struct Packed {
    std::vector<std::byte> stored;
    std::uint64_t metadata_bytes = 0;
    std::uint64_t payload_bytes = 0;
  };
  std::mutex mutex_;  // of add()
  std::map<Digest, Packed> packed_;
};

}  // namespace attune::cache
