#include "runtime/cpu/shared_object.h"

#include <fmt/format.h>

#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <string>
#include <system_error>

namespace attune::runtime {
namespace {

#ifndef MFD_EXEC
#define MFD_EXEC 0x0010U  // Linux 6.3
#endif

bool write_all(int fd, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
  return true;
}

/// An executable file in memory, or -1. Kernels before 6.3 refuse MFD_EXEC; some later ones demand it.
int memory_file() {
  const int fd = memfd_create("attune-kernel", MFD_CLOEXEC | MFD_EXEC);
  return fd < 0 && errno == EINVAL ? memfd_create("attune-kernel", MFD_CLOEXEC) : fd;
}

void* open_library(const std::string& path, std::string& problem) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) problem = dlerror();
  return handle;
}

void* open_through_temporary_file(std::span<const std::byte> image, std::string& problem) {
  std::error_code error;
  const std::filesystem::path folder = std::filesystem::temp_directory_path(error);
  std::string path = ((error ? "/tmp" : folder) / "attune-kernel-XXXXXX").string();
  const int fd = mkostemp(path.data(), O_CLOEXEC);
  if (fd < 0) {
    problem = fmt::format("cannot create {}: {}", path, std::strerror(errno));
    return nullptr;
  }
  void* handle = nullptr;
  if (write_all(fd, image)) {
    handle = open_library(path, problem);
  } else {
    problem = fmt::format("cannot write {}: {}", path, std::strerror(errno));
  }
  close(fd);
  unlink(path.c_str());
  return handle;
}

}  // namespace

Result<SharedObject> SharedObject::load(std::span<const std::byte> image) {
  std::string problem = "cannot create a file in memory (memfd_create)";
  const int fd = memory_file();
  if (fd >= 0) {
    // The descriptor stays open as long as the library: dlopen takes a path that it has seen for the same
    // library, so a reused number would give an older kernel.
    if (write_all(fd, image)) {
      if (void* handle = open_library(fmt::format("/proc/self/fd/{}", fd), problem)) {
        return SharedObject(handle, fd);
      }
    }
    close(fd);
  }
  // No /proc, or a system that forbids executable memory files.
  std::string second_problem;
  if (void* handle = open_through_temporary_file(image, second_problem)) return SharedObject(handle, -1);
  return invalid_argument(
      fmt::format("cannot load a CPU kernel of {} bytes: {}; through a temporary file: {}", image.size(),
                  problem, second_problem));
}

SharedObject::~SharedObject() {
  if (handle_ != nullptr) dlclose(handle_);
  if (memory_fd_ >= 0) close(memory_fd_);
}

void* SharedObject::symbol(const char* name) const {
  return dlsym(handle_, name);
}

}  // namespace attune::runtime
