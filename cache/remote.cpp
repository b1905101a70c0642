#include "cache/remote.h"

#include "base/env.h"
#include "cache/curl.h"

#include <fmt/format.h>

#include <chrono>
#include <utility>

namespace attune::cache {
namespace {

constexpr long kOk = 200;
constexpr long kNotFound = 404;

bool is_success(long status) {
  return status >= 200 && status < 300;
}

Breaker::Time now() {
  return std::chrono::steady_clock::now();
}

}  // namespace

/// Counts it, and says so when the remote is left alone from now on.
Failure Remote::failed(const std::string& why) {
  const bool off = breaker_.failed(now());
  const std::string pause = fmt::format("; it is not asked again for {} s", Breaker::kPause.count());
  return environment_failure(fmt::format("ATTUNE_REMOTE: {}{}", why, off ? pause : ""));
}

Result<std::optional<Entry>> Remote::find(const Digest& key) {
  if (!breaker_.allows(now())) return std::optional<Entry>();
  const auto response = http_get(url_of(key));
  if (!response.ok()) return failed(response.failure().message);
  if (response->status != kOk && response->status != kNotFound) {
    return failed(fmt::format("status {}", response->status));
  }
  breaker_.succeeded();
  if (response->status == kNotFound) return std::optional<Entry>();
  ATTUNE_ASSIGN(entry, decode(response->body, key));
  return std::optional(std::move(entry));
}

Result<void> Remote::store(const Entry& entry) {
  if (!options_.writable || !breaker_.allows(now())) return done();
  const auto response = http_put(url_of(entry.key), encode(entry));
  if (!response.ok()) return failed(response.failure().message);
  if (!is_success(response->status)) return failed(fmt::format("status {}", response->status));
  breaker_.succeeded();
  return done();
}

Result<std::optional<RemoteOptions>> remote_options() {
  const std::string mode = env("ATTUNE_REMOTE_MODE").value_or("ro");
  if (mode != "ro" && mode != "rw") {
    return invalid_argument(fmt::format("ATTUNE_REMOTE_MODE={}: expected one of ro, rw", mode));
  }
  const auto text = env("ATTUNE_REMOTE");
  if (!text) return std::optional<RemoteOptions>();
  std::string url = *text;
  while (url.ends_with('/')) url.pop_back();
  if (!url.starts_with("http://") && !url.starts_with("https://")) {
    return invalid_argument(fmt::format("ATTUNE_REMOTE={}: expected http://HOST or https://HOST", *text));
  }
  return std::optional(RemoteOptions{.url = std::move(url), .writable = mode == "rw"});
}

}  // namespace attune::cache
