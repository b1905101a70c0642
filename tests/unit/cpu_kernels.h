// CPU kernels as the backend calls them, for every instruction set of this CPU.
#pragma once

#include "codegen/arch.h"
#include "codegen/problem.h"
#include "runtime/backend.h"

#include <doctest/doctest.h>

#include <cstddef>
#include <vector>

namespace attune::test {

std::vector<codegen::Arch> this_cpus_archs();

template <typename Check>
void on_every_isa(Check check) {
  for (const codegen::Arch& arch : this_cpus_archs()) {
    CAPTURE(arch.target);
    check(arch);
  }
}

/// Compiled once for each problem and instruction set.
runtime::Kernel& kernel_of(const codegen::Problem& problem, const codegen::Arch& arch);

/// Bytes whose last one is followed by memory that cannot be read.
class AtTheEnd {
 public:
  AtTheEnd(const void* bytes, std::size_t count);
  ~AtTheEnd();
  AtTheEnd(const AtTheEnd&) = delete;
  AtTheEnd& operator=(const AtTheEnd&) = delete;
  const void* data() const { return data_; }

 private:
  std::size_t size_;
  char* memory_;
  char* data_;
};

}  // namespace attune::test
