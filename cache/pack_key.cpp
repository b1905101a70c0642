#include "cache/pack_key.h"

#include "base/env.h"
#include "base/file.h"

#include <fmt/format.h>

#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>

#include <string>
#include <utility>

namespace attune::cache {
namespace {

struct FreeBio {
  void operator()(BIO* bio) const { BIO_free(bio); }
};
struct FreeContext {
  void operator()(EVP_MD_CTX* context) const { EVP_MD_CTX_free(context); }
};
using Bio = std::unique_ptr<BIO, FreeBio>;
using Context = std::unique_ptr<EVP_MD_CTX, FreeContext>;

/// OpenSSL's own callback would ask on the terminal.
int no_passphrase(char* /*buffer*/, int /*size*/, int /*writing*/, void* /*user*/) {
  return -1;
}

using PemReader = EVP_PKEY* (*)(BIO*, EVP_PKEY**, pem_password_cb*, void*);

/// Null unless the text holds an Ed25519 key of the kind that `read` reads.
OpensslKey read_key(std::string_view pem, PemReader read) {
  const Bio bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
  OpensslKey key(bio ? read(bio.get(), nullptr, no_passphrase, nullptr) : nullptr, EVP_PKEY_free);
  ERR_clear_error();  // what is wrong is said in our words; the program's own queue stays clean
  if (key && EVP_PKEY_get_id(key.get()) != EVP_PKEY_ED25519) key.reset();
  return key;
}

const unsigned char* data_of(std::span<const std::byte> bytes) {
  return reinterpret_cast<const unsigned char*>(bytes.data());
}

}  // namespace

Result<SigningKey> SigningKey::from_pem(std::string_view pem) {
  OpensslKey key = read_key(pem, PEM_read_bio_PrivateKey);
  if (!key) {
    return invalid_argument(
        "not an Ed25519 private key in PEM without a passphrase; `openssl genpkey -algorithm ed25519` makes "
        "one");
  }
  return SigningKey(std::move(key));
}

Result<Signature> SigningKey::sign(std::span<const std::byte> message) const {
  const Context context(EVP_MD_CTX_new());
  Signature signature{};
  std::size_t size = signature.size();
  // Ed25519 hashes by itself: no digest is named.
  if (!context || EVP_DigestSignInit(context.get(), nullptr, nullptr, nullptr, key_.get()) != 1 ||
      EVP_DigestSign(context.get(), signature.data(), &size, data_of(message), message.size()) != 1 ||
      size != signature.size()) {
    ERR_clear_error();
    return environment_failure("OpenSSL cannot sign with Ed25519");
  }
  return signature;
}

Result<VerifyingKey> VerifyingKey::from_pem(std::string_view pem) {
  OpensslKey key = read_key(pem, PEM_read_bio_PUBKEY);
  if (!key) {
    return invalid_argument(
        "not an Ed25519 public key in PEM; `openssl pkey -in KEY.pem -pubout` writes a private key's");
  }
  return VerifyingKey(std::move(key));
}

bool VerifyingKey::verifies(std::span<const std::byte> message, const Signature& signature) const {
  const Context context(EVP_MD_CTX_new());
  const bool verified =
      context && EVP_DigestVerifyInit(context.get(), nullptr, nullptr, nullptr, key_.get()) == 1 &&
      EVP_DigestVerify(context.get(), signature.data(), signature.size(), data_of(message), message.size()) ==
          1;
  ERR_clear_error();
  return verified;
}

Result<std::optional<VerifyingKey>> configured_pack_key() {
  const auto path = env("ATTUNE_PACK_KEY");
  if (!path) return std::optional<VerifyingKey>();
  const auto pem = read_file(*path);
  if (!pem.ok()) return environment_failure("ATTUNE_PACK_KEY: " + pem.failure().message);
  auto key = VerifyingKey::from_pem({reinterpret_cast<const char*>(pem->data()), pem->size()});
  if (!key.ok())
    return environment_failure(fmt::format("ATTUNE_PACK_KEY: {}: {}", *path, key.failure().message));
  return std::optional(std::move(*key));
}

}  // namespace attune::cache
