// What GPU tests are told on their command line.
#pragma once

#include "attune/tensor.h"

#include <string>

namespace attune::test {

inline constexpr Device kGpu{DeviceType::cuda, 0};

extern int case_count;           // --cases N: random problems of each family, default 512
extern std::string only_family;  // --family simt|mma|sm90|all

}  // namespace attune::test
