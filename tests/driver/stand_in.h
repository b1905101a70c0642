// A stand-in for NVIDIA's driver: a libcuda.so.1 for machines without a GPU, so that what the host does there
// can be tested. Device memory is host memory; streams and events are in order and immediate; contexts,
// captures and handles are as strict as the driver's where Attune relies on them; images must be cubins for
// the device. A launch is checked and recorded, and no kernel ever runs: nothing here says anything about
// results.
//
// It has the entry points that Attune asks for (runtime/cuda/driver.h) and those that
// tests/gpu/driver_objects.h calls as a user's program would. A test links it and looks inside with what
// follows; a program without such a look loads it with LD_LIBRARY_PATH and sees the default machine.
#pragma once

#include <cuda.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace attune::stand_in {

struct DeviceTraits {
  std::string name;
  int sm = 0;  // 90 for compute capability 9.0
  int multiprocessors = 0;
  std::size_t memory_bytes = 0;
  int shared_bytes_of_block = 0;  // the most that a kernel can be granted
  bool memory_pools = true;
};

DeviceTraits hopper();  // the default machine's device 0
DeviceTraits ampere();  // and 1

struct Machine {
  int driver_version = 13000;
  std::vector<DeviceTraits> devices{hopper(), ampere()};
  std::set<std::string> absent;  // entry points that cuGetProcAddress does not find
};

/// Of this process; to be changed before its first use of the driver.
Machine& machine();

/// A launch that the driver accepted.
struct Launch {
  std::string kernel;
  int device = 0;
  unsigned blocks = 0;   // of the grid's x axis; the others must be 1
  unsigned cluster = 1;  // of so many of them, where the launch says so
  unsigned threads = 0;  // of a block, on its x and y axes
  unsigned shared_bytes = 0;
  CUstream stream = nullptr;
  bool captured = false;      // into a graph: it would run when that is launched
  bool begins_early = false;  // as soon as the blocks of the launch before let it
  std::vector<std::byte> parameters;

  bool operator==(const Launch&) const = default;
  /// What the kernel is told, when its image says that it takes so many bytes.
  template <typename Params>
  Params told() const {
    if (parameters.size() != sizeof(Params)) throw std::logic_error("the kernel takes other parameters");
    Params params;
    std::memcpy(&params, parameters.data(), sizeof(Params));
    return params;
  }
};

/// What all threads asked the driver for since the object was made. One at a time.
class Recording {
 public:
  Recording();
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;
  ~Recording();

  std::vector<std::string> calls() const;  // entry points, in order
  std::vector<Launch> launches() const;
};

enum class Lasting { once, onwards };

/// Makes an entry point return an error at its nth call from now on, the first being 1, or from that on while
/// the object lives. One at a time.
class Fault {
 public:
  Fault(std::string entry_point, CUresult error, int nth = 1, Lasting lasting = Lasting::onwards);
  Fault(const Fault&) = delete;
  Fault& operator=(const Fault&) = delete;
  ~Fault();

  int failures() const;
};

/// What is alive, and how this thread is left.
struct Objects {
  std::size_t allocations = 0;
  std::size_t images = 0;  // loaded as modules or libraries
  std::size_t events = 0;
  std::size_t entered_contexts = 0;
  CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
  bool operator==(const Objects&) const = default;
};
Objects objects();

/// What cuTensorMapEncodeTiled wrote.
struct TensorMap {
  std::uint64_t mark = 0;
  const void* data = nullptr;
  std::array<std::uint64_t, 4> extents{};
  std::array<std::uint64_t, 3> strides{};  // in bytes
  std::array<std::uint16_t, 4> box{};
  std::uint32_t type = 0;  // CUtensorMapDataType
  std::uint32_t swizzle = 0;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
/// Fails, by throwing, when the bytes are none.
TensorMap tensor_map(const void* opaque);

}  // namespace attune::stand_in
