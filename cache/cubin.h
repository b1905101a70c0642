// What a cubin says about its kernels, read from its ELF64 container without any CUDA library.
// docs/cache_format.md names the attributes. Spills are not in a cubin: only the compiler's log has them.
#pragma once

#include "base/result.h"
#include "cache/instructions.h"

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace attune::cache {

struct CubinKernel {
  std::string name;
  int registers = 0;     // of a thread. With setmaxnreg the largest that a warp asks for
  int stack_bytes = 0;   // of a thread
  int shared_bytes = 0;  // static, of a block, without what the driver reserves
  int barriers = 0;
  int max_threads = 0;               // of a block, from __launch_bounds__; 0: not stated
  std::vector<int> parameter_bytes;  // of each parameter
  std::size_t code_bytes = 0;
  std::optional<InstructionCounts> instructions;  // where the encoding is known
};

struct CubinInfo {
  int sm = 0;                        // 90 for sm_90 and sm_90a
  std::vector<CubinKernel> kernels;  // by name
};

/// Safe on any bytes: what is not a well-formed cubin is a failure that says where.
Result<CubinInfo> read_cubin(std::span<const std::byte> bytes);

}  // namespace attune::cache
