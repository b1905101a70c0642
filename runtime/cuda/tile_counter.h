// Counters in device memory from which the blocks of a launch take tiles. A kernel leaves its counter at 0,
// so launches that follow each other, those of one stream, can share one, also where one begins early: it
// waits before it takes. Launches that may overlap must not.
#pragma once

#include "runtime/cuda/driver.h"

#include <cstdint>

namespace attune::runtime {

/// The counter of a stream of the current context; made at its first launch, kept for the process. Null where
/// there is none to be had: while the stream is being captured (the graph may later run beside the stream),
/// with drivers before CUDA 12, and beyond a few hundred streams. Lock-free once made.
std::uint32_t* tile_counter(const Driver& driver, CUstream stream);

}  // namespace attune::runtime
