#include "runtime/cpu/plugin/phases.h"

#include <fcntl.h>
#include <lld/Common/Driver.h>
#include <llvm/Support/raw_ostream.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <mutex>
#include <thread>

LLD_HAS_DRIVER(elf)

namespace attune::plugin {
namespace {

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() { close(); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }
  /// A name under which this process can open the same file.
  std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }

 private:
  int fd_;
};

std::string error_text(const char* what) {
  return std::string(what) + ": " + std::strerror(errno) + "\n";
}

bool write_all(int fd, const char* data, size_t size) {
  while (size > 0) {
    const ssize_t n = write(fd, data, size);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    data += n;
    size -= static_cast<size_t>(n);
  }
  return true;
}

void read_to_end(int fd, Bytes& bytes) {
  char buffer[1 << 16];
  for (;;) {
    const ssize_t n = read(fd, buffer, sizeof buffer);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;
    bytes.append(buffer, buffer + n);
  }
}

/// lld keeps its state in globals: one link at a time, and none after one that it could not clean up.
bool run_lld(const std::string& input, const std::string& output, std::string& log) {
  static std::mutex mutex;
  static bool usable = true;
  const std::lock_guard lock(mutex);
  if (!usable) {
    log += "an earlier link crashed inside lld; restart the process\n";
    return false;
  }
  const char* arguments[] = {
      "ld.lld",           "-shared",       "-o",         output.c_str(), input.c_str(),
      "--no-undefined",   "--gc-sections", "-Bsymbolic", "--threads=1",  "--build-id=none",
      "--hash-style=gnu", "-znoexecstack", "-znow"};
  llvm::raw_string_ostream log_stream(log);
  const lld::Result result = lld::lldMain(arguments, log_stream, log_stream, {{lld::Gnu, &lld::elf::link}});
  usable = result.canRunAgain;
  return result.retCode == 0;
}

}  // namespace

// lld wants paths. The object goes in through a memory file. The image comes out through a pipe: lld writes a
// path that is no regular file in place, without a temporary file beside it.
bool link_shared(const Bytes& object, Bytes& image, std::string& log) {
  const Descriptor input(memfd_create("attune-kernel.o", MFD_CLOEXEC));
  if (!input.valid() || !write_all(input.get(), object.data(), object.size())) {
    log += error_text("cannot write the object file to memory (memfd_create)");
    return false;
  }
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) {
    log += error_text("cannot make a pipe for the linker");
    return false;
  }
  const Descriptor read_end(ends[0]);
  Descriptor write_end(ends[1]);

  std::thread reader([&] { read_to_end(read_end.get(), image); });
  const bool linked = run_lld(input.path(), write_end.path(), log);
  write_end.close();  // the reader's end of file
  reader.join();
  if (linked && image.empty()) log += "lld wrote nothing; is /proc mounted?\n";
  return linked && !image.empty();
}

}  // namespace attune::plugin
