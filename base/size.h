// Sizes as people write them: "500M", "2G".
#pragma once

#include "base/result.h"

#include <cstdint>
#include <string_view>

namespace attune {

/// A whole number of bytes, or of powers of 1024 behind it: K, M, G, T, or KiB, MiB, GiB, TiB.
Result<std::uint64_t> parse_size(std::string_view text);

}  // namespace attune
