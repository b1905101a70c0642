#include "runtime/cuda/driver.h"

#include <fmt/format.h>

#include <dlfcn.h>
#include <unistd.h>

#include <mutex>

namespace attune::runtime {
namespace {

// The versioned name, not libcuda.so: that one may be a linker's stub.
constexpr const char* kDriverLibrary = "libcuda.so.1";

/// How functions are looked up. cuGetProcAddress hands out the ABI of a given CUDA version; drivers
/// before 11.3 lack it, and the exported names are then the only way.
class Resolver {
 public:
  explicit Resolver(void* library) : library_(library) {
    current_ = reinterpret_cast<Current>(dlsym(library, "cuGetProcAddress_v2"));
    older_ = reinterpret_cast<Older>(dlsym(library, "cuGetProcAddress"));
  }

  /// `exported` is the symbol that the headers' macros map `name` to, "cuMemAlloc_v2".
  void* find(const char* name, const char* exported, int version) const {
    void* function = nullptr;
    CUresult result = CUDA_ERROR_NOT_FOUND;
    if (current_ != nullptr) {
      result = current_(name, &function, version, CU_GET_PROC_ADDRESS_DEFAULT, nullptr);
    } else if (older_ != nullptr) {
      result = older_(name, &function, version, CU_GET_PROC_ADDRESS_DEFAULT);
    }
    return result == CUDA_SUCCESS && function != nullptr ? function : dlsym(library_, exported);
  }

 private:
  using Current = CUresult (*)(const char*, void**, int, cuuint64_t, CUdriverProcAddressQueryResult*);
  using Older = CUresult (*)(const char*, void**, int, cuuint64_t);
  void* library_;
  Current current_;
  Older older_;
};

#define ATTUNE_STRINGIZE_(name) #name
#define ATTUNE_STRINGIZE(name) ATTUNE_STRINGIZE_(name)

/// Fills the table; returns the name of a required function that is missing, or null.
const char* resolve(Driver& driver, const Resolver& resolver) {
#define ATTUNE_CUDA_RESOLVE(function, version)                   \
  driver.function = reinterpret_cast<decltype(driver.function)>( \
      resolver.find(#function, ATTUNE_STRINGIZE(function), version));
  ATTUNE_CUDA_REQUIRED(ATTUNE_CUDA_RESOLVE)
  ATTUNE_CUDA_OPTIONAL(ATTUNE_CUDA_RESOLVE)
#undef ATTUNE_CUDA_RESOLVE
#define ATTUNE_CUDA_PRESENT(function, version) \
  if (driver.function == nullptr) return #function;
  ATTUNE_CUDA_REQUIRED(ATTUNE_CUDA_PRESENT)
#undef ATTUNE_CUDA_PRESENT
  return nullptr;
}

std::string path_of(const void* symbol, const char* fallback) {
  Dl_info info{};
  return dladdr(symbol, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : fallback;
}

Result<Driver*> open_driver() {
  void* library = dlopen(kDriverLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    return environment_failure(fmt::format("no CUDA driver: {}. Install NVIDIA's driver, or use CPU tensors",
                                           reason == nullptr ? kDriverLibrary : reason));
  }
  auto* driver = new Driver;  // lives as long as the process: kernels may still run while it exits
  if (const char* missing = resolve(*driver, Resolver(library))) {
    delete driver;
    return environment_failure(fmt::format(
        "the CUDA driver {} lacks {}: install driver 450 (CUDA 11) or later", kDriverLibrary, missing));
  }
  driver->path = path_of(reinterpret_cast<const void*>(driver->cuInit), kDriverLibrary);
  return driver;
}

Result<void> initialise(Driver& driver) {
  driver.process = getpid();
  ATTUNE_TRY(driver.check(driver.cuInit(0), "initialising the CUDA driver"));
  return driver.check(driver.cuDriverGetVersion(&driver.version), "asking the CUDA driver's version");
}

}  // namespace

Result<const Driver*> driver() {
  static const auto* opened = new Result<Driver*>(open_driver());
  static std::mutex mutex;
  if (!opened->ok()) return opened->failure();
  Driver& driver = ***opened;
  const std::lock_guard lock(mutex);
  if (driver.version == 0) ATTUNE_TRY(initialise(driver));
  return &driver;
}

Result<void> Driver::check(CUresult result, const char* what) const {
  if (result == CUDA_SUCCESS) return done();
  if (getpid() != process) {
    return environment_failure(
        fmt::format("{}: this process was forked from one that had used CUDA, and the driver does not work "
                    "across a fork: start it anew instead (Python's multiprocessing: \"spawn\"), fork before "
                    "the first use of CUDA, or use CPU tensors here",
                    what));
  }
  const char* name = nullptr;
  const char* text = nullptr;
  if (cuGetErrorName(result, &name) != CUDA_SUCCESS) name = "unknown error";
  if (cuGetErrorString(result, &text) != CUDA_SUCCESS) text = "no description";
  return environment_failure(fmt::format("{}: {} ({}): {}", what, name, static_cast<int>(result), text));
}

std::string cuda_version_text(int version) {
  return fmt::format("{}.{}", version / 1000, version % 1000 / 10);
}

Result<void> check_not_captured(const Driver& driver, CUstream stream, const char* advice) {
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  ATTUNE_TRY(driver.check(driver.cuStreamIsCapturing(stream, &status),
                          "asking whether the stream is being captured"));
  if (status == CU_STREAM_CAPTURE_STATUS_NONE) return done();
  return environment_failure(advice);
}

Result<ScopedContext> ScopedContext::enter(const Driver& driver, CUdevice device, CUcontext primary) {
  CUcontext current = nullptr;
  ATTUNE_TRY(driver.check(driver.cuCtxGetCurrent(&current), "asking for the current CUDA context"));
  if (current != nullptr) {
    CUdevice owner = -1;
    ATTUNE_TRY(driver.check(driver.cuCtxGetDevice(&owner), "asking for the current CUDA context's device"));
    if (owner == device) return ScopedContext(nullptr);
  }
  ATTUNE_TRY(driver.check(driver.cuCtxPushCurrent(primary), "entering the device's primary CUDA context"));
  return ScopedContext(&driver);
}

ScopedContext::~ScopedContext() {
  CUcontext popped = nullptr;
  if (driver_ != nullptr) driver_->cuCtxPopCurrent(&popped);
}

}  // namespace attune::runtime
