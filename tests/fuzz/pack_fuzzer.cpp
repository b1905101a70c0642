// libFuzzer on the reader of packs. The first byte of an input says which checksums are made right, so that
// what stands behind them is reached.
#include "tests/fuzz/read_pack.h"
#include "tests/unit/pack_bytes.h"

#include <algorithm>
#include <cstdlib>
#include <span>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const auto input = std::as_bytes(std::span(data + 1, size - 1));
  attune::test::Bytes file(input.begin(), input.end());
  if (data[0] % 4 >= 2) attune::test::seal_bodies(file);
  if (data[0] % 2 == 1) attune::test::seal(file);
  const auto entries = attune::test::read_pack(file);
  if (!entries.ok()) return 0;
  // Packed again, the same entries come back.
  const auto again = attune::test::read_pack(attune::test::pack_of(*entries));
  const auto same = [](const attune::cache::Entry& a, const attune::cache::Entry& b) {
    return a.key == b.key && a.metadata_json == b.metadata_json && a.payload == b.payload;
  };
  if (!again.ok() || !std::ranges::equal(*entries, *again, same)) std::abort();
  return 0;
}
