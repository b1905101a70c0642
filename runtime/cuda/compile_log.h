// What ptxas says about a kernel (--ptxas-options=-v). Spills stand nowhere else, not in the cubin either.
#pragma once

#include <string_view>

namespace attune::runtime {

struct CompileFacts {
  int registers = 0;
  int spill_bytes = 0;  // stores and loads together
  int stack_bytes = 0;
  int static_shared_bytes = 0;
  double assembly_milliseconds = 0;  // ptxas's part of the time
};

/// Reads the log of a program with one kernel. What is not mentioned is 0.
CompileFacts read_compile_log(std::string_view log);

}  // namespace attune::runtime
