#include "tests/driver/stand_in_state.h"

#include <pthread.h>

#include <atomic>
#include <utility>

namespace attune::stand_in {
namespace {

std::atomic<bool> forked_after_use{false};

bool captured(const CUstream_st& stream) {
  return stream.capture == CU_STREAM_CAPTURE_STATUS_ACTIVE;
}

/// Does a capture forbid this thread what might wait for the stream?
bool forbids(const CUstream_st& stream) {
  if (!captured(stream) || stream.capture_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return false;
  if (stream.captured_by == std::this_thread::get_id()) return true;
  return stream.capture_mode == CU_STREAM_CAPTURE_MODE_GLOBAL &&
         this_thread().capture_mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
}

}  // namespace

DeviceTraits hopper() {
  return {.name = "Stand-in H200",
          .sm = 90,
          .multiprocessors = 132,
          .memory_bytes = std::size_t{141} << 30,
          .shared_bytes_of_block = 227 * 1024};
}

DeviceTraits ampere() {
  return {.name = "Stand-in A100",
          .sm = 80,
          .multiprocessors = 108,
          .memory_bytes = std::size_t{80} << 30,
          .shared_bytes_of_block = 163 * 1024};
}

Machine& machine() {
  static Machine chosen;
  return chosen;
}

// Never destroyed: a program calls the driver while it exits.
State& state() {
  static auto* shared = [] {
    pthread_atfork(nullptr, nullptr, [] { forked_after_use = state().initialised; });
    return new State;
  }();
  return *shared;
}

ThreadState& this_thread() {
  static thread_local ThreadState own;
  return own;
}

CUcontext State::add_context(int device) {
  CUcontext context = contexts.add(std::make_unique<CUctx_st>(CUctx_st{device, ++last_id}));
  default_streams[context] = add_stream(context);
  return context;
}

void State::remove_context(CUcontext context) {
  std::erase_if(default_streams, [&](const auto& entry) { return entry.first == context; });
  std::vector<CUstream> gone;
  for (const auto& [handle, stream] : streams.all()) {
    if (stream->context == context) gone.push_back(handle);
  }
  for (CUstream stream : gone) streams.remove(stream);
  contexts.remove(context);
}

CUstream State::add_stream(CUcontext context) {
  auto stream = std::make_unique<CUstream_st>();
  stream->context = context;
  stream->id = ++last_id;
  return streams.add(std::move(stream));
}

CUstream State::find_stream(CUstream handle) {
  CUcontext current = this_thread().current();
  if (handle == nullptr || handle == CU_STREAM_LEGACY || handle == CU_STREAM_PER_THREAD) {
    return default_streams.at(current);
  }
  return streams.has(handle) && handle->context == current ? handle : nullptr;
}

CUresult State::unsafe_in_capture() {
  if (this_thread().capture_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_SUCCESS;
  CUresult result = CUDA_SUCCESS;
  for (const auto& [handle, stream] : streams.all()) {
    if (!forbids(*stream)) continue;
    stream->capture = CU_STREAM_CAPTURE_STATUS_INVALIDATED;
    result = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  return result;
}

Entry::Entry(const char* name, Needs needs) {
  if (forked_after_use) {  // a lock that another thread held at the fork would never be free
    failure = CUDA_ERROR_NOT_INITIALIZED;
    return;
  }
  State& driver = state();
  lock_ = std::unique_lock(driver.mutex);
  if (driver.recording.on) driver.recording.calls.emplace_back(name);
  const bool watched = driver.fault.entry_point == name;
  if (watched) --driver.fault.calls_until;
  const bool due =
      driver.fault.lasting == Lasting::once ? driver.fault.calls_until == 0 : driver.fault.calls_until <= 0;
  if (watched && due) {
    ++driver.fault.failures;
    failure = driver.fault.error;
  } else if (needs != Needs::nothing && !driver.initialised) {
    failure = CUDA_ERROR_NOT_INITIALIZED;
  } else if (needs == Needs::context && !driver.contexts.has(this_thread().current())) {
    failure = CUDA_ERROR_INVALID_CONTEXT;
  }
}

Recording::Recording() {
  const std::lock_guard lock(state().mutex);
  state().recording = {.on = true, .calls = {}, .launches = {}};
}

Recording::~Recording() {
  const std::lock_guard lock(state().mutex);
  state().recording = {};
}

std::vector<std::string> Recording::calls() const {
  const std::lock_guard lock(state().mutex);
  return state().recording.calls;
}

std::vector<Launch> Recording::launches() const {
  const std::lock_guard lock(state().mutex);
  return state().recording.launches;
}

Fault::Fault(std::string entry_point, CUresult error, int nth, Lasting lasting) {
  const std::lock_guard lock(state().mutex);
  state().fault = {.entry_point = std::move(entry_point),
                   .error = error,
                   .calls_until = nth,
                   .lasting = lasting,
                   .failures = 0};
}

Fault::~Fault() {
  const std::lock_guard lock(state().mutex);
  state().fault = {};
}

int Fault::failures() const {
  const std::lock_guard lock(state().mutex);
  return state().fault.failures;
}

Objects objects() {
  const State& driver = state();
  const std::lock_guard lock(state().mutex);
  return {.allocations = driver.allocations.size(),
          .images = driver.modules.size() + driver.libraries.size(),
          .events = driver.events.size(),
          .entered_contexts = this_thread().contexts.size(),
          .capture_mode = this_thread().capture_mode};
}

TensorMap tensor_map(const void* opaque) {
  TensorMap map;
  std::memcpy(&map, opaque, sizeof map);
  if (map.mark != kTensorMapMark) throw std::logic_error("no tensor map");
  return map;
}

}  // namespace attune::stand_in
