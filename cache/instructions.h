// What a kernel is made of: its instructions by class. NVIDIA documents no encoding; docs/cache_format.md
// says how this one was found out.
#pragma once

#include <cstddef>
#include <optional>
#include <span>

namespace attune::cache {

/// As they stand in the code, however often they run.
struct InstructionCounts {
  int all = 0;      // but for those that do nothing
  int tensor = 0;   // products of matrices
  int float32 = 0;  // products and sums
  int special = 0;  // exponents, logarithms, reciprocals
  int global = 0;   // loads, stores, atomics and copies, of global memory
  int shared = 0;   // loads and stores
  int local = 0;    // loads and stores: spills, and arrays that are indexed at run time
  int barrier = 0;  // of a block, and in memory

  bool operator==(const InstructionCounts&) const = default;
};

/// In a kernel's code; nothing for a compute capability whose encoding is another.
std::optional<InstructionCounts> count_instructions(int sm, std::span<const std::byte> code);

}  // namespace attune::cache
