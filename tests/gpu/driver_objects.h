// Streams, graphs and contexts, made as a program does that calls the CUDA driver itself. A failure of the
// driver throws.
#pragma once

#include "runtime/cuda/driver.h"
#include "runtime/raise.h"

#include <dlfcn.h>

#include <functional>
#include <stdexcept>
#include <string>

#define ATTUNE_TEXT_(name) #name
#define ATTUNE_TEXT(name) ATTUNE_TEXT_(name)  // of what a macro of cuda.h makes of a name
#define ATTUNE_DRIVER_CALL(name, ...) \
  attune::test::driver_call<decltype(&::name)>(ATTUNE_TEXT(name), __VA_ARGS__)

namespace attune::test {

template <typename Function, typename... Arguments>
void driver_call(const char* name, Arguments... arguments) {
  const runtime::Driver& driver = *runtime::take(runtime::driver());
  void* library = dlopen(driver.path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  const auto function = reinterpret_cast<Function>(library == nullptr ? nullptr : dlsym(library, name));
  if (function == nullptr) throw std::runtime_error(std::string("the driver lacks ") + name);
  runtime::take(driver.check(function(arguments...), name));
}

class Graph {
 public:
  explicit Graph(CUgraph captured) : graph_(captured) {
    ATTUNE_DRIVER_CALL(cuGraphInstantiate, &executable_, graph_, 0ULL);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    ATTUNE_DRIVER_CALL(cuGraphExecDestroy, executable_);
    ATTUNE_DRIVER_CALL(cuGraphDestroy, graph_);
  }

  void launch(CUstream stream) const { ATTUNE_DRIVER_CALL(cuGraphLaunch, executable_, stream); }

 private:
  CUgraph graph_;
  CUgraphExec executable_ = nullptr;
};

/// Of the current context.
class Stream {
 public:
  Stream() { ATTUNE_DRIVER_CALL(cuStreamCreate, &stream_, unsigned{CU_STREAM_NON_BLOCKING}); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { ATTUNE_DRIVER_CALL(cuStreamDestroy, stream_); }

  CUstream get() const { return stream_; }
  void wait() const { ATTUNE_DRIVER_CALL(cuStreamSynchronize, stream_); }

  /// What `work` enqueues, in the mode that forbids the most. Fails when that broke the capture.
  Graph capture(const std::function<void()>& work) const {
    ATTUNE_DRIVER_CALL(cuStreamBeginCapture, stream_, CU_STREAM_CAPTURE_MODE_GLOBAL);
    work();
    CUgraph graph = nullptr;
    ATTUNE_DRIVER_CALL(cuStreamEndCapture, stream_, &graph);
    return Graph(graph);
  }

 private:
  CUstream stream_ = nullptr;
};

/// A context of the first device beside its primary one, current in this thread while it lives.
class Context {
 public:
  Context() {
    // By its first signature, which every driver has.
    using Create = CUresult (*)(CUcontext*, unsigned, CUdevice);
    driver_call<Create>("cuCtxCreate_v2", &context_, 0U, CUdevice{0});
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  ~Context() { ATTUNE_DRIVER_CALL(cuCtxDestroy, context_); }

 private:
  CUcontext context_ = nullptr;
};

/// A device's primary context, current in this thread while it lives, as CUDA's runtime has it.
class PrimaryContext {
 public:
  explicit PrimaryContext(CUdevice device = 0) : device_(device) {
    CUcontext context = nullptr;
    ATTUNE_DRIVER_CALL(cuDevicePrimaryCtxRetain, &context, device_);
    ATTUNE_DRIVER_CALL(cuCtxPushCurrent, context);
  }
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;
  ~PrimaryContext() {
    CUcontext popped = nullptr;
    ATTUNE_DRIVER_CALL(cuCtxPopCurrent, &popped);
    ATTUNE_DRIVER_CALL(cuDevicePrimaryCtxRelease, device_);
  }

 private:
  const CUdevice device_;
};

}  // namespace attune::test
