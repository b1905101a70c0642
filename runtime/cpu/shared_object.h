// SharedObject: a shared library loaded from bytes, without a name on disk.
#pragma once

#include "base/result.h"

#include <cstddef>
#include <span>
#include <utility>

namespace attune::runtime {

class SharedObject {
 public:
  /// Fails with invalid_argument when the bytes are no loadable shared object.
  static Result<SharedObject> load(std::span<const std::byte> image);

  SharedObject(SharedObject&& other) noexcept
      : handle_(std::exchange(other.handle_, nullptr)), memory_fd_(std::exchange(other.memory_fd_, -1)) {}
  SharedObject& operator=(SharedObject&&) = delete;
  ~SharedObject();

  /// Null when the object does not define it.
  void* symbol(const char* name) const;

 private:
  SharedObject(void* handle, int memory_fd) : handle_(handle), memory_fd_(memory_fd) {}

  void* handle_;
  int memory_fd_;  // -1 when the image went through a temporary file
};

}  // namespace attune::runtime
