#include "cache/pack_key.h"

#include "pem_keys.h"
#include "tests/support/temp_dir.h"

#include <doctest/doctest.h>

#include <stdlib.h>

#include <algorithm>
#include <fstream>

namespace attune::cache {
namespace {

using test::ed25519;
using test::private_pem;
using test::public_pem;

// RFC 8032, section 7.1, test 2: its secret key, and its signature of the byte 0x72.
const Digest kSeed = *Digest::from_hex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb");
constexpr std::byte kMessage[]{std::byte{0x72}};
const std::string kSignature =
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00";

std::string hex_of(const Signature& signature) {
  Digest half;
  std::string text;
  for (const std::size_t at : {0, 32}) {
    std::copy_n(signature.begin() + static_cast<std::ptrdiff_t>(at), 32, half.bytes.begin());
    text += half.hex();
  }
  return text;
}

TEST_CASE("a signature is the one that RFC 8032 prints") {
  const auto key = SigningKey::from_pem(private_pem(ed25519(kSeed).get()));
  REQUIRE(key.ok());
  const auto signature = key->sign(kMessage);
  REQUIRE(signature.ok());
  CHECK(hex_of(*signature) == kSignature);
}

TEST_CASE("a signature verifies for its message and its key alone") {
  const auto key = SigningKey::from_pem(private_pem(ed25519(kSeed).get()));
  const auto own = VerifyingKey::from_pem(public_pem(ed25519(kSeed).get()));
  const auto other = VerifyingKey::from_pem(public_pem(ed25519(sha256("another")).get()));
  REQUIRE((key.ok() && own.ok() && other.ok()));
  Signature signature = *key->sign(kMessage);
  CHECK(own->verifies(kMessage, signature));
  CHECK_FALSE(other->verifies(kMessage, signature));
  CHECK_FALSE(own->verifies({}, signature));
  for (std::size_t bit = 0; bit < 8 * signature.size(); ++bit) {
    signature[bit / 8] ^= static_cast<std::uint8_t>(1 << bit % 8);
    CHECK_FALSE(own->verifies(kMessage, signature));
    signature[bit / 8] ^= static_cast<std::uint8_t>(1 << bit % 8);
  }
}

TEST_CASE("only Ed25519 keys in PEM are keys") {
  const auto key = ed25519(kSeed);
  const test::OwnedKey curve(EVP_EC_gen("P-256"), EVP_PKEY_free);
  const std::string refused_private = "not an Ed25519 private key in PEM without a passphrase";
  for (const std::string& pem :
       {std::string(), std::string("no key"), public_pem(key.get()), private_pem(curve.get()),
        private_pem(key.get(), "secret"), private_pem(key.get()).substr(0, 60)}) {
    CAPTURE(pem);
    const auto read = SigningKey::from_pem(pem);
    REQUIRE_FALSE(read.ok());
    CHECK(read.failure().kind == ErrorKind::invalid_argument);
    CHECK(read.failure().message.find(refused_private) == 0);
  }
  for (const std::string& pem : {std::string(), private_pem(key.get()), public_pem(curve.get()),
                                 public_pem(key.get()).substr(0, 60)}) {
    CAPTURE(pem);
    const auto read = VerifyingKey::from_pem(pem);
    REQUIRE_FALSE(read.ok());
    CHECK(read.failure().message.find("not an Ed25519 public key in PEM") == 0);
  }
}

TEST_CASE("ATTUNE_PACK_KEY that is no key is a failure, not the absence of one") {
  const test::TempDir dir;
  const std::string path = dir.path() / "key.pem";
  REQUIRE(::unsetenv("ATTUNE_PACK_KEY") == 0);
  const auto none = configured_pack_key();
  REQUIRE(none.ok());
  CHECK_FALSE(none->has_value());

  REQUIRE(::setenv("ATTUNE_PACK_KEY", path.c_str(), 1) == 0);
  const auto missing = configured_pack_key();
  REQUIRE_FALSE(missing.ok());
  CHECK(missing.failure().message.find("ATTUNE_PACK_KEY: cannot open " + path) == 0);

  std::ofstream(path) << private_pem(ed25519(kSeed).get());
  const auto wrong = configured_pack_key();
  REQUIRE_FALSE(wrong.ok());
  CHECK(wrong.failure().kind == ErrorKind::environment);
  CHECK(wrong.failure().message.find("ATTUNE_PACK_KEY: " + path + ": not an Ed25519 public key") == 0);

  std::ofstream(path) << public_pem(ed25519(kSeed).get());
  const auto key = configured_pack_key();
  REQUIRE(key.ok());
  CHECK(key->has_value());
  REQUIRE(::unsetenv("ATTUNE_PACK_KEY") == 0);
}

}  // namespace
}  // namespace attune::cache
