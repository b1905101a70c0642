// Fields of a file's bytes: little-endian numbers and digests at known places. Unchecked: the caller knows
// that the bytes are there.
#pragma once

#include "base/digest.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace attune {

inline std::uint64_t load_number(std::span<const std::byte> bytes, std::size_t at, std::size_t size) {
  std::uint64_t value = 0;
  for (std::size_t i = size; i-- > 0;) value = value << 8 | std::to_integer<std::uint64_t>(bytes[at + i]);
  return value;
}

inline void store_number(std::span<std::byte> bytes, std::size_t at, std::size_t size, std::uint64_t value) {
  for (std::size_t i = 0; i < size; ++i) bytes[at + i] = static_cast<std::byte>(value >> (8 * i));
}

inline Digest load_digest(std::span<const std::byte> bytes, std::size_t at) {
  Digest digest;
  std::memcpy(digest.bytes.data(), &bytes[at], digest.bytes.size());
  return digest;
}

inline void store_digest(std::span<std::byte> bytes, std::size_t at, const Digest& digest) {
  std::memcpy(&bytes[at], digest.bytes.data(), digest.bytes.size());
}

}  // namespace attune
