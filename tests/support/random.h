// The seed of a test run. The numbers that come from it are tools/verify's.
#pragma once

#include "tools/verify/random.h"

#include <cstdint>

namespace attune::test {

using verify::Random;

/// The seed of this run: ATTUNE_TEST_SEED where it is set, else a new one each time. Printed at first use, so
/// that any failure can be run again.
std::uint64_t test_seed();

}  // namespace attune::test
