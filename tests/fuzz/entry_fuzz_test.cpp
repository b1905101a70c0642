// Random damage to cache entries and cubins. Entries must be refused; cubins may still read, but must never
// crash a sanitizer.
#include "cache/cubin.h"
#include "cache/entry.h"
#include "tests/fuzz/cases.h"
#include "tests/fuzz/damage.h"
#include "tests/unit/tiny_cubin.h"

#include <doctest/doctest.h>

#include <vector>

namespace attune {
namespace {

using test::any_byte;
using test::below;
using test::Bytes;
using test::cases;
using test::damage_head;
using test::Random;

TEST_CASE("a damaged entry is refused") {
  const std::uint64_t seed = test::test_seed();
  const cache::Entry entry{
      .key = sha256("key"), .metadata_json = "{\"a\": [1, 2]}", .payload = Bytes(300, std::byte{7})};
  const Bytes good = cache::encode(entry);
  int accepted = 0;
  for (int round = 0; round < cases(); ++round) {
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
    Random random(seed, static_cast<std::uint64_t>(cases() + round));
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
  for (int round = 0; round < cases(); ++round) {
    Random random(seed, static_cast<std::uint64_t>(2 * cases() + round));
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
  CHECK(refused > cases() / 10);  // the damage does reach the structure
  CHECK(refused < cases());       // and the reader gets past the header
}

}  // namespace
}  // namespace attune
