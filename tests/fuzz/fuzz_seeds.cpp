// fuzz_seeds DIR: good files for the fuzzers to start from, in DIR/entry, DIR/pack and DIR/safetensors.
#include "tests/unit/pack_bytes.h"
#include "tools/safetensors.h"

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;
using attune::test::Bytes;
using attune::test::sample_entry;

/// `prefix` is the byte that the fuzzers of entries and packs read first.
void write(const fs::path& path, const Bytes& bytes, const std::string& prefix = "") {
  fs::create_directories(path.parent_path());
  std::ofstream file(path, std::ios::binary);
  file << prefix;
  file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

Bytes safetensors() {
  static const Bytes data(24, std::byte{1});
  const std::vector<attune::tools::StoredTensor> tensors{{"query", "F32", {2, 1, 3}, data},
                                                         {"lse", "BF16", {}, std::span(data).first(2)}};
  const auto bytes = attune::tools::encode_safetensors(tensors, {{"made", "by fuzz_seeds"}});
  return bytes.ok() ? *bytes : Bytes();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fputs("usage: fuzz_seeds DIR\n", stderr);
    return 2;
  }
  const fs::path root = argv[1];
  const Bytes pack =
      attune::test::pack_of({sample_entry("a"), sample_entry("b", 0), sample_entry("c", 2000)});
  for (const char mode : {'0', '1', '2', '3'}) {  // their lowest bits say what is sealed
    write(root / "pack" / (std::string("good_") + mode), pack, std::string(1, mode));
    write(root / "entry" / (std::string("good_") + mode), attune::cache::encode(sample_entry("a", 20)),
          std::string(1, mode));
  }
  write(root / "safetensors" / "good", safetensors());
  return 0;
}
