// Devices and architectures as users spell them.
#pragma once

#include "attune/attune.h"
#include "base/result.h"
#include "codegen/arch.h"

#include <string>

namespace attune::tools {

/// "cpu", "cuda", "cuda:1"; "auto" is what ATTUNE_BACKEND says, and without it the first GPU that works, else
/// the CPU.
Result<Device> parse_device(const std::string& text);

/// "cpu" or "cuda:0".
std::string to_text(Device device);

inline constexpr const char* kNativeArch = "native";

/// An architecture's name, or "native": the one of the "auto" device.
Result<codegen::Arch> parse_arch(const std::string& text);

}  // namespace attune::tools
