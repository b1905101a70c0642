// SHA-256, through OpenSSL. Throws Error when OpenSSL itself fails: no digest is better than a wrong one.
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace attune {

struct Digest {
  std::array<std::uint8_t, 32> bytes{};

  std::string hex() const;
  /// Exactly 64 hexadecimal digits; anything else is nothing.
  static std::optional<Digest> from_hex(std::string_view text);
  auto operator<=>(const Digest&) const =
      default;  // NOLINT(modernize-use-nullptr): clang-tidy 14 is mistaken
};

struct DigestHash {
  std::size_t operator()(const Digest& digest) const noexcept;
};

Digest sha256(std::span<const std::byte> bytes);
Digest sha256(std::string_view text);

/// SHA-256 over tagged, length-prefixed fields: no two different field lists give the same byte stream.
class FieldDigest {
 public:
  FieldDigest();
  ~FieldDigest();
  FieldDigest(const FieldDigest&) = delete;
  FieldDigest& operator=(const FieldDigest&) = delete;

  /// Adds length(tag) tag length(value) value; a length is 8 bytes, little endian.
  FieldDigest& field(std::string_view tag, std::string_view value);
  FieldDigest& field(std::string_view tag, const Digest& value);
  /// The digest of the fields since the start or the last finish().
  Digest finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace attune
