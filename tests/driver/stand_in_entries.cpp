// The entry points that Attune asks for.
#include "runtime/cuda/driver.h"
#include "tests/driver/stand_in_state.h"

#include <elf.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <span>
#include <tuple>

using attune::stand_in::kTensorMapMark;
using attune::stand_in::Launch;
using attune::stand_in::machine;

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kRegistersOfBlock = 65536;

struct ErrorText {
  CUresult error;
  const char* name;
  const char* text;
};
#define STAND_IN_ERROR(error, text) \
  { error, #error, text }
constexpr ErrorText kErrors[] = {
    STAND_IN_ERROR(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    STAND_IN_ERROR(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    STAND_IN_ERROR(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    STAND_IN_ERROR(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    STAND_IN_ERROR(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    STAND_IN_ERROR(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    STAND_IN_ERROR(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    STAND_IN_ERROR(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    STAND_IN_ERROR(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    STAND_IN_ERROR(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    STAND_IN_ERROR(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    STAND_IN_ERROR(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"),
    STAND_IN_ERROR(CUDA_ERROR_INVALID_CLUSTER_SIZE, "invalid cluster size"),
    STAND_IN_ERROR(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"),
    STAND_IN_ERROR(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
                   "operation failed due to a previous error during capture"),
};

const ErrorText* text_of(CUresult error) {
  const auto* found = std::ranges::find(kErrors, error, &ErrorText::error);
  return found == std::end(kErrors) ? nullptr : found;
}

const attune::stand_in::DeviceTraits& traits_of(CUdevice device) {
  return machine().devices[static_cast<std::size_t>(device)];
}

bool is_device(CUdevice device) {
  return device >= 0 && device < static_cast<int>(machine().devices.size());
}

int attribute_of(const attune::stand_in::DeviceTraits& device, CUdevice_attribute which) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return device.sm / 10;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return device.sm % 10;
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: return device.memory_pools ? 1 : 0;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return device.multiprocessors;
    default: throw std::logic_error("the stand-in driver has no such attribute");
  }
}

// ---- Images ----

/// Cubins run on their own compute capability and on later minor versions of it.
bool fits(const attune::cache::CubinInfo& image, int sm) {
  return image.sm / 10 == sm / 10 && image.sm <= sm;
}

/// The bytes of a cubin end with its section table, which its header tells of.
std::span<const std::byte> bytes_of(const void* image) {
  Elf64_Ehdr header;
  std::memcpy(&header, image, sizeof header);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return {};
  const std::size_t sections = header.e_shoff + std::size_t{header.e_shnum} * header.e_shentsize;
  const std::size_t segments = header.e_phoff + std::size_t{header.e_phnum} * header.e_phentsize;
  return {static_cast<const std::byte*>(image), std::max(sections, segments)};
}

CUresult read_image(const void* bytes, CUmod_st& module) {
  auto image = attune::cache::read_cubin(bytes_of(bytes));
  if (!image.ok() || image->kernels.empty()) return CUDA_ERROR_INVALID_IMAGE;
  module.image = std::move(*image);
  return CUDA_SUCCESS;
}

const attune::cache::CubinKernel* find_kernel(const CUmod_st& module, const std::string& name) {
  const auto found = std::ranges::find(module.image.kernels, name, &attune::cache::CubinKernel::name);
  return found == module.image.kernels.end() ? nullptr : &*found;
}

CUresult find_function(CUmod_st& module, const std::string& name, CUcontext context, CUfunction* function) {
  const auto* kernel = find_kernel(module, name);
  if (kernel == nullptr) return CUDA_ERROR_NOT_FOUND;
  if (!fits(module.image, traits_of(context->device).sm)) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  auto& known = module.functions[{context, name}];
  if (known == nullptr) known = std::make_unique<CUfunc_st>(CUfunc_st{.context = context, .kernel = kernel});
  *function = known.get();
  return CUDA_SUCCESS;
}

// ---- Memory ----

CUresult allocate(CUdeviceptr* address, std::size_t bytes) {
  constexpr std::size_t kAlignment = 256;  // that of the driver
  auto& driver = attune::stand_in::state();
  if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  const std::size_t most = traits_of(attune::stand_in::this_thread().current()->device).memory_bytes;
  void* memory = bytes > most
                     ? nullptr
                     : std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (memory == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
  *address = reinterpret_cast<CUdeviceptr>(memory);
  driver.allocations[*address] = bytes;
  return CUDA_SUCCESS;
}

CUresult release(CUdeviceptr address) {
  if (attune::stand_in::state().allocations.erase(address) == 0) return CUDA_ERROR_INVALID_VALUE;
  std::free(reinterpret_cast<void*>(address));  // NOLINT(performance-no-int-to-ptr)
  return CUDA_SUCCESS;
}

/// Does one allocation hold all of these bytes?
bool is_allocated(CUdeviceptr address, std::size_t bytes) {
  const auto& allocations = attune::stand_in::state().allocations;
  const auto behind = allocations.upper_bound(address);
  if (behind == allocations.begin()) return false;
  const auto& [begin, size] = *std::prev(behind);
  return address - begin <= size && bytes <= size - (address - begin);
}

void* host(CUdeviceptr address) {
  return reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr)
}

/// What work for a stream meets first: its capture may be broken.
CUresult enqueue(CUstream handle, CUstream* stream) {
  *stream = attune::stand_in::state().find_stream(handle);
  if (*stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if ((*stream)->capture == CU_STREAM_CAPTURE_STATUS_INVALIDATED)
    return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  return CUDA_SUCCESS;
}

bool is_captured(CUstream stream) {
  return stream->capture == CU_STREAM_CAPTURE_STATUS_ACTIVE;
}

/// What attributes say of a launch.
struct LaunchTraits {
  unsigned cluster = 1;
  bool begins_early = false;
};

/// A launch, in a context.
CUresult launch(const CUlaunchConfig& config, const LaunchTraits& traits, CUfunction function,
                void** parameters, void** extra) {
  CUstream stream = nullptr;
  if (const CUresult met = enqueue(config.hStream, &stream); met != CUDA_SUCCESS) return met;
  if (function->context != attune::stand_in::this_thread().current()) return CUDA_ERROR_INVALID_HANDLE;
  const attune::cache::CubinKernel& kernel = *function->kernel;
  const bool few_axes =
      config.gridDimY == 1 && config.gridDimZ == 1 && config.blockDimY > 0 && config.blockDimZ == 1;
  const bool one_parameter = kernel.parameter_bytes.size() == 1 && extra == nullptr;
  const unsigned block = config.blockDimX * config.blockDimY;
  const bool some =
      config.gridDimX > 0 && config.gridDimX <= 0x7fff'ffffu && block > 0 && block <= kMaxThreads;
  if (!few_axes || !one_parameter || !some || traits.cluster == 0 || config.gridDimX % traits.cluster != 0 ||
      static_cast<int>(config.sharedMemBytes) > function->granted_shared_bytes) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const int threads = static_cast<int>(block);
  if ((kernel.max_threads != 0 && threads > kernel.max_threads) ||
      kernel.registers * threads > kRegistersOfBlock) {
    return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  }
  auto& driver = attune::stand_in::state();
  ++driver.launches;
  if (!driver.recording.on && !is_captured(stream)) return CUDA_SUCCESS;
  const auto* told = static_cast<const std::byte*>(parameters[0]);
  Launch launch{.kernel = kernel.name,
                .device = function->context->device,
                .blocks = config.gridDimX,
                .cluster = traits.cluster,
                .threads = block,
                .shared_bytes = config.sharedMemBytes,
                .stream = config.hStream,
                .captured = is_captured(stream),
                .begins_early = traits.begins_early,
                .parameters = {told, told + kernel.parameter_bytes[0]}};
  if (launch.captured) stream->captured.push_back(launch);
  if (driver.recording.on) driver.recording.launches.push_back(std::move(launch));
  return CUDA_SUCCESS;
}

}  // namespace

// ---- The driver ----

CUresult cuInit(unsigned flags) {
  STAND_IN_ENTER(cuInit, nothing);
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (machine().devices.empty()) return CUDA_ERROR_NO_DEVICE;
  driver.initialised = true;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  STAND_IN_ENTER(cuDriverGetVersion, nothing);
  *version = machine().driver_version;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** name) {
  STAND_IN_ENTER(cuGetErrorName, nothing);
  const ErrorText* known = text_of(error);
  if (known == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *name = known->name;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  STAND_IN_ENTER(cuGetErrorString, nothing);
  const ErrorText* known = text_of(error);
  if (known == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *text = known->text;
  return CUDA_SUCCESS;
}

// ---- Devices ----

CUresult cuDeviceGetCount(int* count) {
  STAND_IN_ENTER(cuDeviceGetCount, driver);
  *count = static_cast<int>(machine().devices.size());
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int index) {
  STAND_IN_ENTER(cuDeviceGet, driver);
  if (!is_device(index)) return CUDA_ERROR_INVALID_DEVICE;
  *device = index;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int bytes, CUdevice device) {
  STAND_IN_ENTER(cuDeviceGetName, driver);
  if (!is_device(device) || bytes <= 0) return CUDA_ERROR_INVALID_VALUE;
  const std::string known = traits_of(device).name.substr(0, static_cast<std::size_t>(bytes) - 1);
  std::memcpy(name, known.c_str(), known.size() + 1);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  STAND_IN_ENTER(cuDeviceGetAttribute, driver);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *value = attribute_of(traits_of(device), which);
  return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(std::size_t* bytes, CUdevice device) {
  STAND_IN_ENTER(cuDeviceTotalMem, driver);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *bytes = traits_of(device).memory_bytes;
  return CUDA_SUCCESS;
}

// ---- Contexts ----

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  STAND_IN_ENTER(cuDevicePrimaryCtxRetain, driver);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  CUcontext& primary = driver.primaries[device];
  if (primary == nullptr) primary = driver.add_context(device);
  *context = primary;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  STAND_IN_ENTER(cuCtxGetCurrent, driver);
  *context = thread.current();
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  STAND_IN_ENTER(cuCtxGetDevice, context);
  *device = thread.current()->device;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetId(CUcontext context, unsigned long long* id) {
  STAND_IN_ENTER(cuCtxGetId, driver);
  if (!driver.contexts.has(context)) return CUDA_ERROR_INVALID_CONTEXT;
  *id = context->id;
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) {
  STAND_IN_ENTER(cuCtxPushCurrent, driver);
  if (!driver.contexts.has(context)) return CUDA_ERROR_INVALID_CONTEXT;
  thread.contexts.push_back(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext* context) {
  STAND_IN_ENTER(cuCtxPopCurrent, driver);
  if (thread.contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = thread.current();
  thread.contexts.pop_back();
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize() {
  STAND_IN_ENTER(cuCtxSynchronize, context);
  return driver.unsafe_in_capture();
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  STAND_IN_ENTER(cuThreadExchangeStreamCaptureMode, driver);
  std::swap(*mode, thread.capture_mode);
  return CUDA_SUCCESS;
}

// ---- Streams and events ----

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
  STAND_IN_ENTER(cuStreamIsCapturing, context);
  CUstream stream = driver.find_stream(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  *status = stream->capture;
  return CUDA_SUCCESS;
}

CUresult cuStreamGetId(CUstream handle, unsigned long long* id) {
  STAND_IN_ENTER(cuStreamGetId, context);
  CUstream stream = driver.find_stream(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  *id = stream->id;
  return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream handle) {
  STAND_IN_ENTER(cuStreamSynchronize, context);
  CUstream stream = nullptr;
  if (const CUresult met = enqueue(handle, &stream); met != CUDA_SUCCESS) return met;
  if (!is_captured(stream)) return CUDA_SUCCESS;
  stream->capture = CU_STREAM_CAPTURE_STATUS_INVALIDATED;
  return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

CUresult cuEventCreate(CUevent* event, unsigned) {
  STAND_IN_ENTER(cuEventCreate, context);
  *event = driver.events.add(std::make_unique<CUevent_st>());
  return CUDA_SUCCESS;
}

CUresult cuEventDestroy(CUevent event) {
  STAND_IN_ENTER(cuEventDestroy, driver);
  return driver.events.remove(event) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuEventRecord(CUevent event, CUstream handle) {
  STAND_IN_ENTER(cuEventRecord, context);
  CUstream stream = nullptr;
  if (const CUresult met = enqueue(handle, &stream); met != CUDA_SUCCESS) return met;
  if (!driver.events.has(event)) return CUDA_ERROR_INVALID_HANDLE;
  *event = {.launches_before = driver.launches, .recorded = true};
  return CUDA_SUCCESS;
}

CUresult cuEventSynchronize(CUevent event) {
  STAND_IN_ENTER(cuEventSynchronize, context);
  if (!driver.events.has(event)) return CUDA_ERROR_INVALID_HANDLE;
  return driver.unsafe_in_capture();
}

/// A launch takes a microsecond.
CUresult cuEventElapsedTime(float* milliseconds, CUevent begin, CUevent end) {
  STAND_IN_ENTER(cuEventElapsedTime, context);
  if (!driver.events.has(begin) || !driver.events.has(end)) return CUDA_ERROR_INVALID_HANDLE;
  if (!begin->recorded || !end->recorded) return CUDA_ERROR_INVALID_HANDLE;
  *milliseconds = static_cast<float>(end->launches_before - begin->launches_before) / 1000.0f;
  return CUDA_SUCCESS;
}

// ---- Memory ----

CUresult cuMemAlloc(CUdeviceptr* address, std::size_t bytes) {
  STAND_IN_ENTER(cuMemAlloc, context);
  if (const CUresult met = driver.unsafe_in_capture(); met != CUDA_SUCCESS) return met;
  return allocate(address, bytes);
}

CUresult cuMemFree(CUdeviceptr address) {
  STAND_IN_ENTER(cuMemFree, context);
  if (const CUresult met = driver.unsafe_in_capture(); met != CUDA_SUCCESS) return met;
  return release(address);
}

CUresult cuMemAllocAsync(CUdeviceptr* address, std::size_t bytes, CUstream handle) {
  STAND_IN_ENTER(cuMemAllocAsync, context);
  CUstream stream = nullptr;
  if (const CUresult met = enqueue(handle, &stream); met != CUDA_SUCCESS) return met;
  return allocate(address, bytes);
}

CUresult cuMemFreeAsync(CUdeviceptr address, CUstream handle) {
  STAND_IN_ENTER(cuMemFreeAsync, context);
  CUstream stream = nullptr;
  if (const CUresult met = enqueue(handle, &stream); met != CUDA_SUCCESS) return met;
  return release(address);
}

CUresult cuMemcpyHtoD(CUdeviceptr to, const void* from, std::size_t bytes) {
  STAND_IN_ENTER(cuMemcpyHtoD, context);
  if (const CUresult met = driver.unsafe_in_capture(); met != CUDA_SUCCESS) return met;
  if (!is_allocated(to, bytes)) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(host(to), from, bytes);
  return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, std::size_t bytes) {
  STAND_IN_ENTER(cuMemcpyDtoH, context);
  if (const CUresult met = driver.unsafe_in_capture(); met != CUDA_SUCCESS) return met;
  if (!is_allocated(from, bytes)) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(to, host(from), bytes);
  return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, std::size_t bytes, CUstream handle) {
  STAND_IN_ENTER(cuMemcpyHtoDAsync, context);
  CUstream stream = nullptr;
  if (const CUresult met = enqueue(handle, &stream); met != CUDA_SUCCESS) return met;
  if (!is_allocated(to, bytes)) return CUDA_ERROR_INVALID_VALUE;
  if (!is_captured(stream)) std::memcpy(host(to), from, bytes);
  return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, std::size_t bytes, CUstream handle) {
  STAND_IN_ENTER(cuMemcpyDtoDAsync, context);
  CUstream stream = nullptr;
  if (const CUresult met = enqueue(handle, &stream); met != CUDA_SUCCESS) return met;
  if (!is_allocated(to, bytes) || !is_allocated(from, bytes)) return CUDA_ERROR_INVALID_VALUE;
  if (!is_captured(stream)) std::memmove(host(to), host(from), bytes);
  return CUDA_SUCCESS;
}

CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, std::size_t count, CUstream handle) {
  STAND_IN_ENTER(cuMemsetD32Async, context);
  CUstream stream = nullptr;
  if (const CUresult met = enqueue(handle, &stream); met != CUDA_SUCCESS) return met;
  if (!is_allocated(to, count * sizeof value)) return CUDA_ERROR_INVALID_VALUE;
  if (!is_captured(stream)) std::fill_n(static_cast<unsigned*>(host(to)), count, value);
  return CUDA_SUCCESS;
}

// ---- Images and their kernels ----

CUresult cuModuleLoadData(CUmodule* module, const void* bytes) {
  STAND_IN_ENTER(cuModuleLoadData, context);
  if (const CUresult met = driver.unsafe_in_capture(); met != CUDA_SUCCESS) return met;
  auto loaded = std::make_unique<CUmod_st>();
  if (const CUresult read = read_image(bytes, *loaded); read != CUDA_SUCCESS) return read;
  if (!fits(loaded->image, traits_of(thread.current()->device).sm)) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  *module = driver.modules.add(std::move(loaded));
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  STAND_IN_ENTER(cuModuleUnload, context);
  if (const CUresult met = driver.unsafe_in_capture(); met != CUDA_SUCCESS) return met;
  return driver.modules.remove(module) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  STAND_IN_ENTER(cuModuleGetFunction, context);
  if (!driver.modules.has(module)) return CUDA_ERROR_INVALID_HANDLE;
  return find_function(*module, name, thread.current(), function);
}

CUresult cuLibraryLoadData(CUlibrary* library, const void* bytes, CUjit_option*, void**, unsigned,
                           CUlibraryOption*, void**, unsigned) {
  STAND_IN_ENTER(cuLibraryLoadData, driver);
  if (const CUresult met = driver.unsafe_in_capture(); met != CUDA_SUCCESS) return met;
  auto loaded = std::make_unique<CUlib_st>();
  if (const CUresult read = read_image(bytes, loaded->image); read != CUDA_SUCCESS) return read;
  *library = driver.libraries.add(std::move(loaded));
  return CUDA_SUCCESS;
}

CUresult cuLibraryUnload(CUlibrary library) {
  STAND_IN_ENTER(cuLibraryUnload, driver);
  if (const CUresult met = driver.unsafe_in_capture(); met != CUDA_SUCCESS) return met;
  return driver.libraries.remove(library) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  STAND_IN_ENTER(cuLibraryGetKernel, driver);
  if (!driver.libraries.has(library)) return CUDA_ERROR_INVALID_HANDLE;
  if (find_kernel(library->image, name) == nullptr) return CUDA_ERROR_NOT_FOUND;
  CUkern_st& known = library->kernels[name];
  known = {.image = &library->image, .name = name};
  *kernel = &known;
  return CUDA_SUCCESS;
}

CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  STAND_IN_ENTER(cuKernelGetFunction, context);
  return find_function(*kernel->image, kernel->name, thread.current(), function);
}

CUresult cuFuncLoad(CUfunction) {
  STAND_IN_ENTER(cuFuncLoad, context);
  return driver.unsafe_in_capture();
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  STAND_IN_ENTER(cuFuncSetAttribute, context);
  if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  const int most =
      traits_of(function->context->device).shared_bytes_of_block - function->kernel->shared_bytes;
  if (value < 0 || value > most) return CUDA_ERROR_INVALID_VALUE;
  function->granted_shared_bytes = value;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                        CUstream handle, void** parameters, void** extra) {
  STAND_IN_ENTER(cuLaunchKernel, context);
  return launch({.gridDimX = grid_x,
                 .gridDimY = grid_y,
                 .gridDimZ = grid_z,
                 .blockDimX = block_x,
                 .blockDimY = block_y,
                 .blockDimZ = block_z,
                 .sharedMemBytes = shared_bytes,
                 .hStream = handle,
                 .attrs = nullptr,
                 .numAttrs = 0},
                {}, function, parameters, extra);
}

/// Of attributes it knows the two that Attune sets, one at a time: the size of clusters, up to what every GPU
/// has that has any, and that a launch may begin early.
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void** extra) {
  STAND_IN_ENTER(cuLaunchKernelEx, context);
  if (config->numAttrs != 1) return CUDA_ERROR_INVALID_VALUE;
  LaunchTraits traits;
  if (config->attrs[0].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) {
    traits.begins_early = config->attrs[0].value.programmaticStreamSerializationAllowed != 0;
  } else if (config->attrs[0].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
    const auto& cluster = config->attrs[0].value.clusterDim;
    const bool fits = cluster.x <= 8 && cluster.y == 1 && cluster.z == 1;
    if (!fits || traits_of(function->context->device).sm < 90) return CUDA_ERROR_INVALID_CLUSTER_SIZE;
    traits.cluster = cluster.x;
  } else {
    return CUDA_ERROR_INVALID_VALUE;
  }
  return launch(*config, traits, function, parameters, extra);
}

// ---- Tensor maps, within the limits of the driver's documentation ----

namespace {

constexpr std::size_t kMapRank = 4;  // of all maps that Attune makes

int item_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32: return 4;
    default: throw std::logic_error("the stand-in driver has no such element");
  }
}

unsigned swizzle_bytes(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_32B: return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B: return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B: return 128;
    default: throw std::logic_error("the stand-in driver has no such swizzle");
  }
}

}  // namespace

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                const cuuint64_t* extents, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  STAND_IN_ENTER(cuTensorMapEncodeTiled, nothing);
  if (rank != kMapRank || reinterpret_cast<std::uintptr_t>(map) % 64 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (data == nullptr || reinterpret_cast<std::uintptr_t>(data) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  attune::stand_in::TensorMap encoded{
      .mark = kTensorMapMark, .data = data, .type = std::uint32_t(type), .swizzle = std::uint32_t(swizzle)};
  for (std::size_t axis = 0; axis < kMapRank; ++axis) {
    const bool fits = extents[axis] > 0 && extents[axis] <= std::uint64_t{1} << 32 && box[axis] > 0 &&
                      box[axis] <= 256 && element_strides[axis] == 1;
    if (!fits) return CUDA_ERROR_INVALID_VALUE;
    encoded.extents[axis] = extents[axis];
    encoded.box[axis] = static_cast<std::uint16_t>(box[axis]);
    if (axis + 1 == kMapRank) continue;
    if (strides[axis] % 16 != 0 || strides[axis] >= std::uint64_t{1} << 40) return CUDA_ERROR_INVALID_VALUE;
    encoded.strides[axis] = strides[axis];
  }
  const unsigned row_bytes = box[0] * static_cast<unsigned>(item_bytes(type));
  if (row_bytes % 16 != 0 || row_bytes > swizzle_bytes(swizzle)) return CUDA_ERROR_INVALID_VALUE;
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &encoded, sizeof encoded);
  return CUDA_SUCCESS;
}

// ---- Looking entry points up ----

namespace {

#define STAND_IN_TABLE_ROW(name, version) {#name, version, reinterpret_cast<void*>(&::name)},
const std::tuple<const char*, int, void*> kTable[] = {ATTUNE_CUDA_REQUIRED(STAND_IN_TABLE_ROW)
                                                          ATTUNE_CUDA_OPTIONAL(STAND_IN_TABLE_ROW)};

}  // namespace

CUresult cuGetProcAddress(const char* name, void** function, int version, cuuint64_t,
                          CUdriverProcAddressQueryResult*) {
  *function = nullptr;
  for (const auto& [known, since, address] : kTable) {
    const bool there = since <= machine().driver_version && !machine().absent.contains(known);
    if (there && version >= since && std::strcmp(known, name) == 0) *function = address;
  }
  return *function == nullptr ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}
