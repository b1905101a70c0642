// Entry points that a user's program calls: contexts, streams and graphs of its own.
#include "tests/driver/stand_in_state.h"

#include <utility>

// By its first signature, which every driver has; cuda.h may declare later ones only.
extern "C" CUresult cuCtxCreate_v2(CUcontext* context, unsigned, CUdevice device) {
  STAND_IN_ENTER(cuCtxCreate, driver);
  *context = driver.add_context(device);
  thread.contexts.push_back(*context);
  return CUDA_SUCCESS;
}

CUresult cuCtxDestroy(CUcontext context) {
  STAND_IN_ENTER(cuCtxDestroy, driver);
  if (!driver.contexts.has(context)) return CUDA_ERROR_INVALID_CONTEXT;
  std::erase(thread.contexts, context);
  driver.remove_context(context);
  return CUDA_SUCCESS;
}

/// Attune keeps one for the life of the process.
CUresult cuDevicePrimaryCtxRelease(CUdevice) {
  STAND_IN_ENTER(cuDevicePrimaryCtxRelease, driver);
  return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* stream, unsigned) {
  STAND_IN_ENTER(cuStreamCreate, context);
  *stream = driver.add_stream(thread.current());
  return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream stream) {
  STAND_IN_ENTER(cuStreamDestroy, driver);
  return driver.streams.remove(stream) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode mode) {
  STAND_IN_ENTER(cuStreamBeginCapture, context);
  CUstream stream = driver.find_stream(handle);
  if (stream == nullptr || stream->capture != CU_STREAM_CAPTURE_STATUS_NONE) return CUDA_ERROR_INVALID_HANDLE;
  stream->capture = CU_STREAM_CAPTURE_STATUS_ACTIVE;
  stream->capture_mode = mode;
  stream->captured_by = std::this_thread::get_id();
  return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
  STAND_IN_ENTER(cuStreamEndCapture, context);
  CUstream stream = driver.find_stream(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  auto launches = std::exchange(stream->captured, {});
  const auto status = std::exchange(stream->capture, CU_STREAM_CAPTURE_STATUS_NONE);
  *graph = nullptr;
  if (status == CU_STREAM_CAPTURE_STATUS_NONE) return CUDA_ERROR_INVALID_HANDLE;
  if (status == CU_STREAM_CAPTURE_STATUS_INVALIDATED) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  *graph = driver.graphs.add(std::make_unique<CUgraph_st>(CUgraph_st{std::move(launches)}));
  return CUDA_SUCCESS;
}

CUresult cuGraphInstantiate(CUgraphExec* executable, CUgraph graph, unsigned long long) {
  STAND_IN_ENTER(cuGraphInstantiate, context);
  if (!driver.graphs.has(graph)) return CUDA_ERROR_INVALID_HANDLE;
  *executable = driver.executables.add(std::make_unique<CUgraphExec_st>(CUgraphExec_st{*graph}));
  return CUDA_SUCCESS;
}

CUresult cuGraphLaunch(CUgraphExec executable, CUstream handle) {
  STAND_IN_ENTER(cuGraphLaunch, context);
  if (!driver.executables.has(executable)) return CUDA_ERROR_INVALID_HANDLE;
  for (attune::stand_in::Launch launch : executable->launches) {
    launch.captured = false;
    launch.stream = handle;
    if (driver.recording.on) driver.recording.launches.push_back(std::move(launch));
  }
  return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph graph) {
  STAND_IN_ENTER(cuGraphDestroy, driver);
  return driver.graphs.remove(graph) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuGraphExecDestroy(CUgraphExec executable) {
  STAND_IN_ENTER(cuGraphExecDestroy, driver);
  return driver.executables.remove(executable) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
