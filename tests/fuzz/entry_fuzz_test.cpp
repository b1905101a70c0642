// Random damage to cache entries and cubins. Entries must be refused; cubins may still read, but must never
// crash a sanitizer.
#include "cache/cubin.h"
#include "cache/entry.h"
#include "tests/support/random.h"
#include "tests/unit/tiny_cubin.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace attune {
namespace {

using test::Random;
using Bytes = std::vector<std::byte>;

constexpr int kRounds = 20000;

std::size_t below(Random& random, std::size_t limit) {
  return static_cast<std::size_t>(random.bits() % limit);
}

std::byte any_byte(Random& random) {
  // Extremes are where sizes overflow.
  return static_cast<std::byte>(random.chance(0.5) ? random.pick({0, 1, 0x7f, 0x80, 0xfe, 0xff})
                                                   : random.integer(0, 255));
}

/// One to eight changes: flipped bits, bytes, runs of one byte, a cut, a copy of one part over another.
void damage(Bytes& bytes, Random& random) {
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
void damage_head(Bytes& bytes, std::size_t head, Random& random) {
  Bytes front(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(std::min(head, bytes.size())));
  damage(front, random);
  bytes.erase(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(std::min(head, bytes.size())));
  bytes.insert(bytes.begin(), front.begin(), front.end());
  bytes.shrink_to_fit();  // so that AddressSanitizer sees the first byte past the end
}

TEST_CASE("a damaged entry is refused") {
  const std::uint64_t seed = test::test_seed();
  const cache::Entry entry{
      .key = sha256("key"), .metadata_json = "{\"a\": [1, 2]}", .payload = Bytes(300, std::byte{7})};
  const Bytes good = cache::encode(entry);
  int accepted = 0;
  for (int round = 0; round < kRounds; ++round) {
    Random random(seed, static_cast<std::uint64_t>(round));
    Bytes file = good;
    damage_head(file, random.chance(0.7) ? 160 : good.size(), random);
    if (file != good && cache::decode(file, entry.key).ok()) ++accepted;
  }
  CHECK(accepted == 0);
}

TEST_CASE("bytes at random are no entry") {
  const std::uint64_t seed = test::test_seed();
  for (int round = 0; round < 2000; ++round) {
    Random random(seed, static_cast<std::uint64_t>(kRounds + round));
    Bytes file(below(random, 9000));
    for (std::byte& byte : file) byte = any_byte(random);
    file.shrink_to_fit();
    CHECK_FALSE(cache::decode(file, sha256("key")).ok());
  }
}

TEST_CASE("a damaged cubin reads within its bounds") {
  const std::uint64_t seed = test::test_seed();
  const Bytes good = test::TinyCubin::build(
      0x6005a04, 8,
      {{.name = "alpha", .registers = 40, .barriers = 1, .shared = 2048, .threads = {128, 1, 1}, .code = 640},
       {.name = "beta", .registers = 255, .stack = 64, .code = 1280},
       {.name = "helper", .entry = false}});
  REQUIRE(cache::read_cubin(good).ok());
  int refused = 0;
  for (int round = 0; round < kRounds; ++round) {
    Random random(seed, static_cast<std::uint64_t>(2 * kRounds + round));
    Bytes file = good;
    damage_head(file, random.chance(0.3) ? 64 : good.size(), random);
    const auto info = cache::read_cubin(file);
    if (!info.ok()) ++refused;
    for (const cache::CubinKernel& kernel : info.ok() ? info->kernels : std::vector<cache::CubinKernel>()) {
      CHECK(kernel.name.size() < 4096);
      CHECK(kernel.shared_bytes >= 0);
      CHECK(kernel.max_threads >= 0);
    }
  }
  CHECK(refused > kRounds / 10);  // the damage does reach the structure
  CHECK(refused < kRounds);       // and the reader gets past the header
}

}  // namespace
}  // namespace attune
