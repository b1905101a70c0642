// Random damage to the bytes of a file.
#pragma once

#include "tests/support/random.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

namespace attune::test {

using Bytes = std::vector<std::byte>;

inline std::size_t below(Random& random, std::size_t limit) {
  return static_cast<std::size_t>(random.bits() % limit);
}

inline std::byte any_byte(Random& random) {
  // Extremes are where sizes overflow.
  return static_cast<std::byte>(random.chance(0.5) ? random.pick({0, 1, 0x7f, 0x80, 0xfe, 0xff})
                                                   : random.integer(0, 255));
}

/// One to eight changes: flipped bits, bytes, runs of one byte, a cut, a copy of one part over another.
inline void damage(Bytes& bytes, Random& random) {
  for (int change = random.integer(1, 8); change > 0 && !bytes.empty(); --change) {
    const std::size_t at = below(random, bytes.size());
    const std::size_t run = std::min<std::size_t>(bytes.size() - at, random.integer(1, 8));
    switch (random.integer(0, 9)) {
      case 0: bytes.resize(at); break;
      case 1: bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), run, any_byte(random)); break;
      case 2: std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), run, any_byte(random)); break;
      case 3: {
        const std::size_t from = below(random, bytes.size() - run + 1);
        std::memmove(&bytes[at], &bytes[from], run);
        break;
      }
      case 4:
      case 5: bytes[at] = any_byte(random); break;
      default: bytes[at] ^= static_cast<std::byte>(1 << random.integer(0, 7));
    }
  }
}

/// Most changes go where the structure is: the first `head` bytes, if the file has them.
inline void damage_head(Bytes& bytes, std::size_t head, Random& random) {
  Bytes front(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(std::min(head, bytes.size())));
  damage(front, random);
  bytes.erase(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(std::min(head, bytes.size())));
  bytes.insert(bytes.begin(), front.begin(), front.end());
  bytes.shrink_to_fit();  // so that AddressSanitizer sees the first byte past the end
}

}  // namespace attune::test
