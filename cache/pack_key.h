// Who vouches for a pack: Ed25519 signatures, through OpenSSL.
#pragma once

#include "base/result.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>

struct evp_pkey_st;

namespace attune::cache {

using Signature = std::array<std::uint8_t, 64>;
using OpensslKey = std::unique_ptr<evp_pkey_st, void (*)(evp_pkey_st*)>;

class SigningKey {
 public:
  /// `openssl genpkey -algorithm ed25519` writes one. Fails with invalid_argument for anything else, a
  /// key behind a passphrase too: nobody is asked for one.
  static Result<SigningKey> from_pem(std::string_view pem);

  Result<Signature> sign(std::span<const std::byte> message) const;

 private:
  explicit SigningKey(OpensslKey key) : key_(std::move(key)) {}
  OpensslKey key_;
};

class VerifyingKey {
 public:
  /// `openssl pkey -in KEY.pem -pubout` writes one. Fails with invalid_argument for anything else.
  static Result<VerifyingKey> from_pem(std::string_view pem);

  bool verifies(std::span<const std::byte> message, const Signature& signature) const;

 private:
  explicit VerifyingKey(OpensslKey key) : key_(std::move(key)) {}
  OpensslKey key_;
};

/// The key in the file that ATTUNE_PACK_KEY names, or nothing when it names none. A file that can't be read
/// or is no key is a failure: no pack may be trusted then.
Result<std::optional<VerifyingKey>> configured_pack_key();

}  // namespace attune::cache
