// Occupancy: how many blocks of a kernel an SM of a GPU holds at a time, and what limits that.
#pragma once

#include "base/result.h"

#include <string>
#include <string_view>

namespace attune::tools {

/// What one block takes.
struct BlockNeeds {
  int threads = 0;
  int registers = 0;     // of a thread
  int shared_bytes = 0;  // static and dynamic
};

struct Occupancy {
  int blocks = 0;  // of one SM; 0: the kernel does not run there
  int warps = 0;
  int max_warps = 0;
  const char* limit = "";  // "registers", "shared memory", "threads", "blocks"
};

/// The compute capability, 90 for 9.0, of a GPU by its name ("H100", "rtx 4090") or an architecture's
/// ("sm_90", "sm_90a"). Fails with invalid_argument and the names there are.
Result<int> compute_capability_of(std::string_view gpu);

/// Fails with invalid_argument for a compute capability that is not in the table.
Result<Occupancy> occupancy(const BlockNeeds& needs, int compute_capability);

}  // namespace attune::tools
