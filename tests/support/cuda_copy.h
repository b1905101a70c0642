// Copies to and from a GPU, for tests alone: attune.h neither has nor needs them. Opens libcuda at run time.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace attune::test {

/// Makes the primary context of GPU 0 current in this thread. "" on success, else why there is no GPU to
/// test.
std::string use_gpu();

/// Each waits for the GPU's work and for the copy, and throws std::runtime_error with the driver's code.
void copy_to_gpu(void* target, std::span<const std::byte> source);
void copy_from_gpu(std::span<std::byte> target, const void* source);

}  // namespace attune::test
