// The CUDA driver API, opened at run time: nothing here links against libcuda.
#pragma once

#include "base/result.h"

#include <cuda.h>

#include <sys/types.h>

#include <string>

// name, the CUDA version whose signature is wanted. A driver has all of the first list and, by its age, part
// of the second.
#define ATTUNE_CUDA_REQUIRED(X)               \
  X(cuInit, 2000)                             \
  X(cuDriverGetVersion, 2020)                 \
  X(cuGetErrorName, 6000)                     \
  X(cuGetErrorString, 6000)                   \
  X(cuDeviceGetCount, 2000)                   \
  X(cuDeviceGet, 2000)                        \
  X(cuDeviceGetName, 2000)                    \
  X(cuDeviceGetAttribute, 2000)               \
  X(cuDeviceTotalMem, 3020)                   \
  X(cuDevicePrimaryCtxRetain, 7000)           \
  X(cuCtxGetCurrent, 4000)                    \
  X(cuCtxGetDevice, 2000)                     \
  X(cuCtxPushCurrent, 4000)                   \
  X(cuCtxPopCurrent, 4000)                    \
  X(cuCtxSynchronize, 2000)                   \
  X(cuThreadExchangeStreamCaptureMode, 10010) \
  X(cuStreamIsCapturing, 10000)               \
  X(cuModuleLoadData, 2000)                   \
  X(cuModuleUnload, 2000)                     \
  X(cuModuleGetFunction, 2000)                \
  X(cuFuncSetAttribute, 9000)                 \
  X(cuLaunchKernel, 4000)                     \
  X(cuMemAlloc, 3020)                         \
  X(cuMemFree, 3020)                          \
  X(cuMemcpyHtoD, 3020)                       \
  X(cuMemcpyDtoH, 3020)                       \
  X(cuMemcpyHtoDAsync, 3020)                  \
  X(cuMemcpyDtoDAsync, 3020)                  \
  X(cuMemsetD32Async, 3020)                   \
  X(cuStreamSynchronize, 2000)                \
  X(cuEventCreate, 2000)                      \
  X(cuEventDestroy, 4000)                     \
  X(cuEventRecord, 2000)                      \
  X(cuEventSynchronize, 2000)                 \
  X(cuEventElapsedTime, 2000)
#define ATTUNE_CUDA_OPTIONAL(X)    \
  X(cuMemAllocAsync, 11020)        \
  X(cuMemFreeAsync, 11020)         \
  X(cuCtxGetId, 12000)             \
  X(cuStreamGetId, 12000)          \
  X(cuLaunchKernelEx, 11060)       \
  X(cuTensorMapEncodeTiled, 12000) \
  X(cuLibraryLoadData, 12000)      \
  X(cuLibraryUnload, 12000)        \
  X(cuLibraryGetKernel, 12000)     \
  X(cuKernelGetFunction, 12000)    \
  X(cuFuncLoad, 12040)

namespace attune::runtime {

/// The driver's functions under their own names: driver.cuInit(0). Optional ones may be null.
struct Driver {
#define ATTUNE_CUDA_MEMBER(name, version) decltype(&::name) name = nullptr;
  ATTUNE_CUDA_REQUIRED(ATTUNE_CUDA_MEMBER)
  ATTUNE_CUDA_OPTIONAL(ATTUNE_CUDA_MEMBER)
#undef ATTUNE_CUDA_MEMBER
  std::string path;   // of the library
  int version = 0;    // 13000 for 13.0; 0: not initialised yet
  pid_t process = 0;  // that initialised it

  /// done() for success; otherwise an environment failure: what was tried, the error's name and the driver's
  /// words, or that a forked process can't use its parent's driver.
  Result<void> check(CUresult result, const char* what) const;
};

/// The driver, opened and initialised at the first call. Fails with environment: for good when there is none,
/// until it succeeds when it could not be initialised.
Result<const Driver*> driver();

/// "13.0" of 13000.
std::string cuda_version_text(int version);

/// Lets this thread load and allocate while some other stream of the process is being captured.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Driver& driver) : driver_(driver) {
    driver_.cuThreadExchangeStreamCaptureMode(&mode_);
  }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;
  ~RelaxedCapture() { driver_.cuThreadExchangeStreamCaptureMode(&mode_); }

 private:
  const Driver& driver_;
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

/// Fails with environment, saying `advice`, while the stream is being captured into a graph, whose capture it
/// leaves unharmed.
Result<void> check_not_captured(const Driver& driver, CUstream stream, const char* advice);

/// Makes a context of the device current for a scope: the caller's, when it belongs to the device, else the
/// device's primary context.
class ScopedContext {
 public:
  static Result<ScopedContext> enter(const Driver& driver, CUdevice device, CUcontext primary);
  ScopedContext(ScopedContext&& other) noexcept : driver_(other.driver_) { other.driver_ = nullptr; }
  ScopedContext(const ScopedContext&) = delete;
  ScopedContext& operator=(const ScopedContext&) = delete;
  ScopedContext& operator=(ScopedContext&&) = delete;
  ~ScopedContext();

 private:
  explicit ScopedContext(const Driver* pushed) : driver_(pushed) {}
  const Driver* driver_;  // null: nothing was pushed
};

}  // namespace attune::runtime
