// What the stand-in driver remembers between calls. One lock guards all of it: every entry point takes it.
#pragma once

#include "cache/cubin.h"
#include "tests/driver/stand_in.h"

#include <cuda.h>

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

// The handles that cuda.h leaves open.

struct CUctx_st {
  int device = 0;
  std::uint64_t id = 0;
};

struct CUstream_st {
  CUcontext context = nullptr;
  std::uint64_t id = 0;
  CUstreamCaptureStatus capture = CU_STREAM_CAPTURE_STATUS_NONE;
  CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
  std::thread::id captured_by;
  std::vector<attune::stand_in::Launch> captured;
};

/// A kernel of an image in a context.
struct CUfunc_st {
  CUcontext context = nullptr;
  const attune::cache::CubinKernel* kernel = nullptr;
  int granted_shared_bytes = 48 * 1024;
};

/// An image: in one context, or as a library in all of them.
struct CUmod_st {
  attune::cache::CubinInfo image;
  std::map<std::pair<CUcontext, std::string>, std::unique_ptr<CUfunc_st>> functions;
};

struct CUkern_st {
  CUmodule image = nullptr;
  std::string name;
};

struct CUlib_st {
  CUmod_st image;
  std::map<std::string, CUkern_st> kernels;
};

struct CUevent_st {
  std::uint64_t launches_before = 0;
  bool recorded = false;
};

struct CUgraph_st {
  std::vector<attune::stand_in::Launch> launches;
};

struct CUgraphExec_st : CUgraph_st {};

namespace attune::stand_in {

inline constexpr std::uint64_t kTensorMapMark = 0x4154'5455'4e45'4d41;

/// Objects that a handle may name; what is not among them is no handle.
template <typename Object>
class Registry {
 public:
  Object* add(std::unique_ptr<Object> object) {
    Object* handle = object.get();
    objects_.emplace(handle, std::move(object));
    return handle;
  }
  bool remove(Object* handle) { return objects_.erase(handle) != 0; }
  bool has(Object* handle) const { return objects_.contains(handle); }
  std::size_t size() const { return objects_.size(); }
  const auto& all() const { return objects_; }

 private:
  std::map<Object*, std::unique_ptr<Object>> objects_;
};

struct State {
  std::mutex mutex;
  bool initialised = false;
  std::uint64_t last_id = 0;  // of contexts and streams, none of which comes again
  std::uint64_t launches = 0;

  Registry<CUctx_st> contexts;
  Registry<CUstream_st> streams;  // each context's default stream among them
  Registry<CUmod_st> modules;
  Registry<CUlib_st> libraries;
  Registry<CUevent_st> events;
  Registry<CUgraph_st> graphs;
  Registry<CUgraphExec_st> executables;
  std::map<int, CUcontext> primaries;
  std::map<CUcontext, CUstream> default_streams;
  std::map<CUdeviceptr, std::size_t> allocations;

  struct {
    bool on = false;
    std::vector<std::string> calls;
    std::vector<Launch> launches;
  } recording;
  struct {
    std::string entry_point;
    CUresult error = CUDA_SUCCESS;
    int calls_until = 0;
    Lasting lasting = Lasting::onwards;
    int failures = 0;
  } fault;

  CUcontext add_context(int device);
  void remove_context(CUcontext context);
  CUstream add_stream(CUcontext context);
  /// The stream of a handle in the current context; null when it is none of it.
  CUstream find_stream(CUstream handle);
  /// While a capture goes on that may not meet such a call, breaks it and fails.
  CUresult unsafe_in_capture();
};
State& state();

/// Contexts that this thread has entered, the current one last, and the captures that it minds.
struct ThreadState {
  std::vector<CUcontext> contexts;
  CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

  CUcontext current() const { return contexts.empty() ? nullptr : contexts.back(); }
};
ThreadState& this_thread();

/// Opens each entry point: takes the lock, notes the call, and fails where a test wants that, in a process
/// that was forked after cuInit and, but for the first calls of all, before it.
class Entry {
 public:
  enum class Needs { nothing, driver, context };
  Entry(const char* name, Needs needs);

  CUresult failure = CUDA_SUCCESS;

 private:
  std::unique_lock<std::mutex> lock_;
};

}  // namespace attune::stand_in

#define STAND_IN_ENTER(name, needs)                                                    \
  const attune::stand_in::Entry entered(#name, attune::stand_in::Entry::Needs::needs); \
  if (entered.failure != CUDA_SUCCESS) return entered.failure;                         \
  [[maybe_unused]] attune::stand_in::State& driver = attune::stand_in::state();        \
  [[maybe_unused]] attune::stand_in::ThreadState& thread = attune::stand_in::this_thread()
