// Kernel hits: how often each kernel of a cache was found on disk, by all processes, in a table of fixed
// size. Nothing but a column of `attune cache list` rests on it.
#pragma once

#include "base/descriptor.h"
#include "base/digest.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace attune::cache {

/// Adds a hit to the file, which may be new. One writer at a time, or a count is lost; so it is where more
/// kernels fall together than there is room for: the least used one's. False when it can't be written.
bool add_hit(const Descriptor& file, const Digest& key);

/// The file's bytes, to be asked.
class KernelHits {
 public:
  explicit KernelHits(std::vector<std::byte> bytes = {}) : bytes_(std::move(bytes)) {}
  std::uint64_t of(const Digest& key) const;

 private:
  std::vector<std::byte> bytes_;
};

}  // namespace attune::cache
