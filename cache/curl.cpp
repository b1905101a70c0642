#include "cache/curl.h"

#include "attune/version.h"

#include <fmt/format.h>

// CURLOPT_PROTOCOLS: what came after it is unknown to the libcurl of older systems.
#define CURL_DISABLE_DEPRECATION
#include <curl/curl.h>
#include <dlfcn.h>
#include <signal.h>
#include <time.h>

#include <array>
#include <memory>
#include <new>
#include <string_view>
#include <utility>

#define ATTUNE_CURL_FUNCTIONS(X) \
  X(curl_global_init)            \
  X(curl_easy_init)              \
  X(curl_easy_cleanup)           \
  X(curl_easy_setopt)            \
  X(curl_easy_perform)           \
  X(curl_easy_getinfo)           \
  X(curl_easy_strerror)          \
  X(curl_version)

namespace attune::cache {
namespace {

constexpr const char* kLibrary = "libcurl.so.4";
constexpr long kConnectMilliseconds = 300;
constexpr long kRequestMilliseconds = 2000;

struct Curl {
#define ATTUNE_CURL_MEMBER(function) decltype(&::function) function = nullptr;  // NOLINT: a name
  ATTUNE_CURL_FUNCTIONS(ATTUNE_CURL_MEMBER)
#undef ATTUNE_CURL_MEMBER
};

Result<Curl> open_curl() {
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    return environment_failure(
        fmt::format("no libcurl: {}. Install libcurl4", reason == nullptr ? kLibrary : reason));
  }
  Curl curl;
#define ATTUNE_CURL_RESOLVE(function)                                                 \
  curl.function = reinterpret_cast<decltype(&::function)>(dlsym(library, #function)); \
  if (curl.function == nullptr)                                                       \
    return environment_failure(fmt::format("{} lacks {}: install libcurl4", kLibrary, #function));
  ATTUNE_CURL_FUNCTIONS(ATTUNE_CURL_RESOLVE)
#undef ATTUNE_CURL_RESOLVE
  if (const CURLcode code = curl.curl_global_init(CURL_GLOBAL_DEFAULT); code != CURLE_OK) {
    return environment_failure(fmt::format("{}: {}", kLibrary, curl.curl_easy_strerror(code)));
  }
  return curl;
}

/// Opens libcurl at first use; never closes it.
const Result<Curl>& curl() {
  static const auto* opened = new Result<Curl>(open_curl());
  return *opened;
}

/// A CURLOPT_WRITEFUNCTION: less than `size` ends the request.
std::size_t receive(const char* data, std::size_t, std::size_t size, void* into) {
  auto& body = *static_cast<std::vector<std::byte>*>(into);
  if (size > kMaxBody - body.size()) return 0;
  try {
    const auto* bytes = reinterpret_cast<const std::byte*>(data);
    body.insert(body.end(), bytes, bytes + size);
  } catch (const std::bad_alloc&) {
    return 0;
  }
  return size;
}

/// While it lives this thread gets no SIGPIPE: with CURLOPT_NOSIGNAL libcurl leaves that to its caller, and
/// its TLS library may write to a connection that the server has closed.
class SigpipeBlocked {
 public:
  SigpipeBlocked() {
    sigemptyset(&sigpipe_);
    sigaddset(&sigpipe_, SIGPIPE);
    sigset_t pending;
    sigpending(&pending);
    was_pending_ = sigismember(&pending, SIGPIPE) == 1;
    pthread_sigmask(SIG_BLOCK, &sigpipe_, &before_);
  }
  ~SigpipeBlocked() {
    const timespec at_once{};
    if (!was_pending_) sigtimedwait(&sigpipe_, nullptr, &at_once);
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  SigpipeBlocked(const SigpipeBlocked&) = delete;
  SigpipeBlocked& operator=(const SigpipeBlocked&) = delete;

 private:
  sigset_t sigpipe_{};
  sigset_t before_{};
  bool was_pending_ = false;
};

/// One request, with the limits that hold for all.
class Request {
 public:
  explicit Request(const Curl& curl) : curl_(curl), handle_(curl.curl_easy_init(), curl.curl_easy_cleanup) {
    if (!handle_) code_ = CURLE_OUT_OF_MEMORY;
  }

  template <typename Value>
  void set(CURLoption option, Value value) {
    if (code_ == CURLE_OK) code_ = curl_.curl_easy_setopt(handle_.get(), option, value);
  }

  Result<Response> perform(const std::string& url) {
    Response response;
    set(CURLOPT_URL, url.c_str());
    set(CURLOPT_PROTOCOLS, static_cast<long>(CURLPROTO_HTTP | CURLPROTO_HTTPS));
    set(CURLOPT_FOLLOWLOCATION, 0L);
    set(CURLOPT_PROXY, "");  // else libcurl takes one from the environment
    set(CURLOPT_NOSIGNAL, 1L);
#if LIBCURL_VERSION_NUM >= CURL_VERSION_BITS(7, 87, 0)
    // Don't wait for a name server that does not answer. An older libcurl lacks the option, and waits.
    if (code_ == CURLE_OK) curl_.curl_easy_setopt(handle_.get(), CURLOPT_QUICK_EXIT, 1L);
#endif
    set(CURLOPT_CONNECTTIMEOUT_MS, kConnectMilliseconds);
    set(CURLOPT_TIMEOUT_MS, kRequestMilliseconds);
    set(CURLOPT_MAXFILESIZE_LARGE, static_cast<curl_off_t>(kMaxBody));
    set(CURLOPT_USERAGENT, "attune/" ATTUNE_VERSION);
    set(CURLOPT_WRITEFUNCTION, &receive);
    set(CURLOPT_WRITEDATA, static_cast<void*>(&response.body));
    if (code_ == CURLE_OK) code_ = curl_.curl_easy_perform(handle_.get());
    if (code_ != CURLE_OK) return environment_failure(curl_.curl_easy_strerror(code_));
    curl_.curl_easy_getinfo(handle_.get(), CURLINFO_RESPONSE_CODE, &response.status);
    return response;
  }

 private:
  const Curl& curl_;
  SigpipeBlocked guard_;  // outlives the handle, whose end may write, too
  std::unique_ptr<CURL, decltype(&::curl_easy_cleanup)> handle_;
  CURLcode code_ = CURLE_OK;
};

}  // namespace

Result<Response> http_get(const std::string& url) {
  if (!curl().ok()) return curl().failure();
  return Request(*curl()).perform(url);
}

Result<Response> http_put(const std::string& url, std::span<const std::byte> body) {
  if (!curl().ok()) return curl().failure();
  // A list of headers in place: libcurl reads it while the request lasts. The empty one keeps libcurl from
  // asking first, and waiting a second, whether the body is welcome.
  std::array<char, 39> type{"Content-Type: application/octet-stream"};
  std::array<char, 8> expect{"Expect:"};
  curl_slist second{.data = expect.data(), .next = nullptr};
  curl_slist first{.data = type.data(), .next = &second};
  Request request(*curl());
  request.set(CURLOPT_CUSTOMREQUEST, "PUT");
  request.set(CURLOPT_HTTPHEADER, &first);
  request.set(CURLOPT_POSTFIELDS, reinterpret_cast<const char*>(body.data()));
  request.set(CURLOPT_POSTFIELDSIZE_LARGE, static_cast<curl_off_t>(body.size()));
  return request.perform(url);
}

Result<std::string> curl_description() {
  if (!curl().ok()) return curl().failure();
  Dl_info info{};
  const bool known = dladdr(reinterpret_cast<void*>(curl()->curl_version), &info) != 0;
  const std::string_view version = curl()->curl_version();  // "libcurl/7.88.1 OpenSSL/3.0.19 ..."
  return fmt::format("{} in {}", version.substr(0, version.find(' ')), known ? info.dli_fname : kLibrary);
}

}  // namespace attune::cache
