// Remote: entries by key on a server that knows GET and PUT. Never fails a caller: what can't be had is a
// miss, what can't be sent is a warning. docs/cache_format.md, "The remote".
#pragma once

#include "base/digest.h"
#include "base/result.h"
#include "cache/breaker.h"
#include "cache/entry.h"

#include <optional>
#include <string>
#include <utility>

namespace attune::cache {

struct RemoteOptions {
  std::string url;        // without a slash at its end
  bool writable = false;  // ATTUNE_REMOTE_MODE=rw
};

class Remote {
 public:
  explicit Remote(RemoteOptions options) : options_(std::move(options)) {}

  /// The verified entry, nothing, or why it can't be had. Nothing, too, while the breaker is open.
  Result<std::optional<Entry>> find(const Digest& key);
  /// Sends an entry that was made here. Does nothing to a remote that is only read or while the breaker is
  /// open.
  Result<void> store(const Entry& entry);

  const std::string& url() const { return options_.url; }

 private:
  std::string url_of(const Digest& key) const { return options_.url + "/" + key.hex(); }
  Failure failed(const std::string& why);

  RemoteOptions options_;
  Breaker breaker_;
};

/// ATTUNE_REMOTE and ATTUNE_REMOTE_MODE; nothing when the first is not set. An invalid_argument when one is
/// no choice.
Result<std::optional<RemoteOptions>> remote_options();

}  // namespace attune::cache
