// Descriptor: an open file, closed when it goes.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <utility>

namespace attune {

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  bool valid() const { return fd_ >= 0; }
  int get() const { return fd_; }
  /// Closes now. False, with errno, when the kernel reports an error that it had kept back.
  bool close() {
    const int fd = std::exchange(fd_, -1);
    return ::close(fd) == 0 || errno == EINTR;  // Linux has closed it even then
  }

 private:
  int fd_;
};

}  // namespace attune
