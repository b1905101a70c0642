// ElfFile: what a shared object defines, lacks and depends on, as the loader sees it.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace attune::test {

struct ElfFile {
  std::vector<std::string> defined;    // dynamic symbols
  std::vector<std::string> undefined;  // strong ones
  std::vector<std::string> needed;     // libraries

  /// Of a 64-bit little-endian shared object that is whole; throws std::runtime_error for anything else.
  static ElfFile parse(std::span<const std::byte> bytes);
};

}  // namespace attune::test
