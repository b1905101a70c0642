#include "base/digest.h"

#include "attune/error.h"

#include <openssl/evp.h>

#include <cstring>

namespace attune {
namespace {

/// A digest that could not be computed must not pass for one: two keys would be equal. OpenSSL fails here
/// only without memory or in a configuration that lacks SHA-256.
void require(int openssl_status) {
  if (openssl_status != 1) throw Error(ErrorKind::environment, "OpenSSL cannot compute SHA-256");
}

EVP_MD_CTX* context_of(void* context) {
  return static_cast<EVP_MD_CTX*>(context);
}

int hex_value(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

void add_counted(EVP_MD_CTX* context, std::string_view text) {
  std::array<unsigned char, 8> length{};
  for (std::size_t i = 0; i < length.size(); ++i) {
    length[i] = static_cast<unsigned char>(std::uint64_t{text.size()} >> (8 * i));
  }
  require(EVP_DigestUpdate(context, length.data(), length.size()));
  require(EVP_DigestUpdate(context, text.data(), text.size()));
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
  Digest digest;
  require(EVP_Digest(bytes.data(), bytes.size(), digest.bytes.data(), nullptr, EVP_sha256(), nullptr));
  return digest;
}

Digest sha256(std::string_view text) {
  return sha256(std::as_bytes(std::span(text)));
}

FieldDigest::FieldDigest() : context_(EVP_MD_CTX_new()) {
  require(context_ != nullptr ? 1 : 0);
  require(EVP_DigestInit_ex(context_of(context_), EVP_sha256(), nullptr));
}

FieldDigest::~FieldDigest() {
  EVP_MD_CTX_free(context_of(context_));
}

FieldDigest& FieldDigest::field(std::string_view tag, std::string_view value) {
  add_counted(context_of(context_), tag);
  add_counted(context_of(context_), value);
  return *this;
}

Digest FieldDigest::finish() {
  Digest digest;
  require(EVP_DigestFinal_ex(context_of(context_), digest.bytes.data(), nullptr));
  require(EVP_DigestInit_ex(context_of(context_), EVP_sha256(), nullptr));
  return digest;
}

}  // namespace attune
