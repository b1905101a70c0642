// libcurl, opened at run time: nothing here links against it, and who names no remote never loads it.
#pragma once

#include "base/result.h"

#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace attune::cache {

/// The largest body that is received.
inline constexpr std::size_t kMaxBody = std::size_t{64} << 20;

struct Response {
  long status = 0;  // of HTTP
  std::vector<std::byte> body;
};

/// Each is one request of two seconds at most, and follows no redirect. The failure says why there was no
/// whole answer: no connection, no libcurl, too slow, too large.
Result<Response> http_get(const std::string& url);
Result<Response> http_put(const std::string& url, std::span<const std::byte> body);

/// Version and path of the libcurl that is used. Loads it.
Result<std::string> curl_description();

}  // namespace attune::cache
