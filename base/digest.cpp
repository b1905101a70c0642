// OpenSSL 3 deprecates SHA-256's own functions for EVP's, whose first use in a process reads its
// configuration and loads a provider. That takes a millisecond, as long as all else that a cache hit does.
#define OPENSSL_SUPPRESS_DEPRECATED
#include "base/digest.h"

#include "attune/error.h"

#include <openssl/sha.h>

#include <cstring>

namespace attune {
namespace {

/// A digest that could not be computed must not pass for one: two keys would be equal.
void require(int openssl_status) {
  if (openssl_status != 1) throw Error(ErrorKind::environment, "OpenSSL cannot compute SHA-256");
}

class Sha256 {
 public:
  Sha256() { begin(); }
  void add(const void* data, std::size_t size) { require(SHA256_Update(&context_, data, size)); }
  /// Begins anew, too.
  Digest finish() {
    Digest digest;
    require(SHA256_Final(digest.bytes.data(), &context_));
    begin();
    return digest;
  }

 private:
  void begin() { require(SHA256_Init(&context_)); }
  SHA256_CTX context_{};
};

int hex_value(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

}  // namespace

std::string Digest::hex() const {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  text.reserve(2 * bytes.size());
  for (const std::uint8_t byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

std::optional<Digest> Digest::from_hex(std::string_view text) {
  Digest digest;
  if (text.size() != 2 * digest.bytes.size()) return std::nullopt;
  for (std::size_t i = 0; i < digest.bytes.size(); ++i) {
    const int high = hex_value(text[2 * i]);
    const int low = hex_value(text[2 * i + 1]);
    if (high < 0 || low < 0) return std::nullopt;
    digest.bytes[i] = static_cast<std::uint8_t>(high << 4 | low);
  }
  return digest;
}

std::size_t DigestHash::operator()(const Digest& digest) const noexcept {
  std::size_t hash = 0;  // any bytes of a SHA-256 are a good hash
  std::memcpy(&hash, digest.bytes.data(), sizeof(hash));
  return hash;
}

Digest sha256(std::span<const std::byte> bytes) {
  Sha256 hash;
  hash.add(bytes.data(), bytes.size());
  return hash.finish();
}

Digest sha256(std::string_view text) {
  return sha256(std::as_bytes(std::span(text)));
}

struct FieldDigest::State : Sha256 {
  void add_counted(std::string_view text) {
    std::array<unsigned char, 8> length{};
    for (std::size_t i = 0; i < length.size(); ++i) {
      length[i] = static_cast<unsigned char>(std::uint64_t{text.size()} >> (8 * i));
    }
    add(length.data(), length.size());
    add(text.data(), text.size());
  }
};

FieldDigest::FieldDigest() : state_(std::make_unique<State>()) {}
FieldDigest::~FieldDigest() = default;

FieldDigest& FieldDigest::field(std::string_view tag, std::string_view value) {
  state_->add_counted(tag);
  state_->add_counted(value);
  return *this;
}

FieldDigest& FieldDigest::field(std::string_view tag, const Digest& value) {
  return field(tag, {reinterpret_cast<const char*>(value.bytes.data()), value.bytes.size()});
}

Digest FieldDigest::finish() {
  return state_->finish();
}

}  // namespace attune
