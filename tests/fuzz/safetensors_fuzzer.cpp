// libFuzzer on the reader of .safetensors files.
#include "tools/safetensors.h"

#include <algorithm>
#include <cstdlib>
#include <span>
#include <utility>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using attune::tools::SafetensorsFile;
  const auto input = std::as_bytes(std::span(data, size));
  const auto file = SafetensorsFile::parse({input.begin(), input.end()}, "input");
  if (!file.ok()) return 0;
  // Written again, the same tensors come back.
  auto bytes = attune::tools::encode_safetensors(file->tensors(), file->metadata());
  if (!bytes.ok()) std::abort();
  const auto again = SafetensorsFile::parse(std::move(*bytes), "again");
  if (!again.ok() || again->tensors().size() != file->tensors().size()) std::abort();
  for (const auto& tensor : file->tensors()) {
    const auto* same = again->find(tensor.name);
    if (same == nullptr || !std::ranges::equal(same->bytes, tensor.bytes)) std::abort();
  }
  return 0;
}
