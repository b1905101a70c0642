// Random damage to packs: refused, or where the damage comes with good checksums, read within its bounds.
#include "tests/fuzz/cases.h"
#include "tests/fuzz/damage.h"
#include "tests/fuzz/read_pack.h"
#include "tests/unit/pack_bytes.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

namespace attune {
namespace {

using test::Bytes;
using test::cases;
using test::damage_head;
using test::Random;

/// Up to the end of the manifest.
constexpr std::size_t kHead = cache::kPackHeaderBytes + 3 * cache::kPackRecordBytes + 13;

Bytes valid_pack() {
  return test::pack_of({test::sample_entry("a"), test::sample_entry("b", 0), test::sample_entry("c", 2000)});
}

TEST_CASE("a damaged pack is refused") {
  const std::uint64_t seed = test::test_seed();
  const Bytes good = valid_pack();
  REQUIRE(test::read_pack(good).ok());
  int accepted = 0;
  for (int round = 0; round < cases(); ++round) {
    Random random(seed, static_cast<std::uint64_t>(round));
    Bytes file = good;
    damage_head(file, random.chance(0.7) ? kHead : good.size(), random);
    if (file != good && test::read_pack(file).ok()) ++accepted;
  }
  CHECK(accepted == 0);
}

TEST_CASE("a damaged pack with good checksums is refused or safe") {
  const std::uint64_t seed = test::test_seed();
  const Bytes good = valid_pack();
  int accepted = 0;
  std::vector<std::string> unseen{"bytes of manifest", "out of order", "bytes at", "claims",
                                  "entries end at",    "another size", "frame",    "magic",
                                  "format version",    "lacks",        "of kind"};
  for (int round = 0; round < cases(); ++round) {
    Random random(seed, static_cast<std::uint64_t>(cases() + round));
    Bytes file = good;
    damage_head(file, random.chance(0.7) ? kHead : good.size(), random);
    test::seal_bodies(file);
    test::seal(file);
    const auto entries = test::read_pack(file);
    if (entries.ok()) {
      ++accepted;
      CHECK(std::ranges::is_sorted(*entries, {}, &cache::Entry::key));
      continue;
    }
    std::erase_if(unseen, [&](const std::string& words) {
      return entries.failure().message.find(words) != std::string::npos;
    });
  }
  // The damage reaches behind every check.
  CAPTURE(unseen.empty() ? "" : unseen.front());
  CHECK(unseen.empty());
  CHECK(accepted > 0);
  CHECK(accepted < cases());
}

}  // namespace
}  // namespace attune
