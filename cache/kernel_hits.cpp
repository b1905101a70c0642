#include "cache/kernel_hits.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <type_traits>

namespace attune::cache {
namespace {

/// The table is 8192 rows of 8 of these; a kernel is in the row that the first bits of its key say. At the
/// cache's default bound one row in a thousand is too short.
struct Slot {
  std::uint64_t key = 0;  // its last 8 bytes; 0: nobody's
  std::uint64_t hits = 0;
};
using Row = std::array<Slot, 8>;
constexpr std::size_t kRows = 8192;
static_assert(sizeof(Row) == 128 && std::is_trivially_copyable_v<Row>);
static_assert(std::endian::native == std::endian::little, "the file's numbers are little endian");

std::size_t row_offset(const Digest& key) {
  std::uint16_t first = 0;
  std::memcpy(&first, key.bytes.data(), sizeof first);
  return first % kRows * sizeof(Row);
}

std::uint64_t name_of(const Digest& key) {
  std::uint64_t name = 0;
  std::memcpy(&name, key.bytes.data() + key.bytes.size() - sizeof name, sizeof name);
  return name;
}

}  // namespace

bool add_hit(const Descriptor& file, const Digest& key) {
  Row row{};  // what a short file lacks is empty
  const auto begin = static_cast<off_t>(row_offset(key));
  if (::pread(file.get(), row.data(), sizeof row, begin) < 0) return false;
  auto slot = std::ranges::find(row, name_of(key), &Slot::key);
  if (slot == row.end()) {
    slot = std::ranges::min_element(row, {}, &Slot::hits);
    *slot = {.key = name_of(key)};
  }
  ++slot->hits;
  const off_t at = begin + static_cast<off_t>((slot - row.begin()) * sizeof(Slot));
  return ::pwrite(file.get(), &*slot, sizeof(Slot), at) == sizeof(Slot);
}

std::uint64_t KernelHits::of(const Digest& key) const {
  const std::size_t begin = row_offset(key);
  if (begin >= bytes_.size()) return 0;
  Row row{};
  std::memcpy(row.data(), bytes_.data() + begin, std::min(sizeof row, bytes_.size() - begin));
  const auto slot = std::ranges::find(row, name_of(key), &Slot::key);
  return slot == row.end() ? 0 : slot->hits;
}

}  // namespace attune::cache
