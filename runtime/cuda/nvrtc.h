// NVRTC, opened at run time: found, identified, asked to compile.
#pragma once

#include "base/result.h"
#include "codegen/arch.h"
#include "codegen/unit.h"
#include "runtime/backend.h"

#include <nvrtc.h>

#include <string>
#include <vector>

#define ATTUNE_NVRTC_FUNCTIONS(X) \
  X(nvrtcVersion)                 \
  X(nvrtcGetErrorString)          \
  X(nvrtcGetNumSupportedArchs)    \
  X(nvrtcGetSupportedArchs)       \
  X(nvrtcCreateProgram)           \
  X(nvrtcDestroyProgram)          \
  X(nvrtcCompileProgram)          \
  X(nvrtcGetProgramLogSize)       \
  X(nvrtcGetProgramLog)           \
  X(nvrtcGetCUBINSize)            \
  X(nvrtcGetCUBIN)

namespace attune::runtime {

/// "nvrtc 13.0 <build id>": equal names compile equally.
std::string nvrtc_identity(int major, int minor, const std::string& build_id);
/// What a version is told when it compiles for an architecture.
std::vector<std::string> nvrtc_options(int major, int minor, const codegen::Arch& arch);

/// One NVRTC library. Thread-safe: NVRTC compiles in parallel.
class Nvrtc {
 public:
  /// Opens a library by its path or, for the loader's search, its soname. Fails with environment.
  static Result<Nvrtc> open(const std::string& library, bool only_if_loaded = false);

  const std::string& path() const { return path_; }
  int major() const { return major_; }
  int minor() const { return minor_; }
  const std::vector<int>& archs() const { return archs_; }  // compute capabilities, ascending
  bool knows(int sm) const;
  const std::string& identity() const { return identity_; }
  std::vector<std::string> options(const codegen::Arch& arch) const {
    return nvrtc_options(major_, minor_, arch);
  }

  /// Fails with internal and the compiler's log when the source does not compile, with environment for a unit
  /// of another compiler.
  Result<Image> compile(const codegen::Unit& unit) const;

 private:
  Nvrtc() = default;
  Result<void> resolve(void* library, const std::string& name);

#define ATTUNE_NVRTC_MEMBER(name) decltype(&::name) name##_ = nullptr;
  ATTUNE_NVRTC_FUNCTIONS(ATTUNE_NVRTC_MEMBER)
#undef ATTUNE_NVRTC_MEMBER
  std::string path_;
  std::string identity_;
  int major_ = 0;
  int minor_ = 0;
  std::vector<int> archs_;
};

/// The NVRTC that compiles for an architecture: the newest major that knows it, finds its place in the search
/// order and is no newer than this machine's driver, if there is one. Kept for the life of the process. Fails
/// with environment and every place that was looked at.
Result<const Nvrtc*> nvrtc_for(const codegen::Arch& arch);

/// The search's outcome for any recent architecture, and where it looked. For cuda_report().
struct NvrtcSearch {
  Result<const Nvrtc*> found;
  std::vector<std::string> tried;
};
NvrtcSearch search_nvrtc();

}  // namespace attune::runtime
