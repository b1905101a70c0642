// attune-compile: the process that compile_in_child() starts. A request on stdin, the answer on stdout.
#include "runtime/compile_wire.h"
#include "runtime/cpu/cpu_backend.h"
#include "runtime/cuda/cuda_backend.h"

#include <sys/prctl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <string>

using namespace attune;

namespace {

std::string read_all(int fd) {
  std::string all;
  std::array<char, 65536> piece{};
  for (;;) {
    const ssize_t count = read(fd, piece.data(), piece.size());
    if (count > 0) all.append(piece.data(), static_cast<std::size_t>(count));
    if (count == 0 || (count < 0 && errno != EINTR)) return all;
  }
}

bool write_all(int fd, const std::string& text) {
  for (std::size_t done = 0; done < text.size();) {
    const ssize_t count = write(fd, text.data() + done, text.size() - done);
    if (count < 0 && errno != EINTR) return false;
    if (count > 0) done += static_cast<std::size_t>(count);
  }
  return true;
}

Result<runtime::Image> compile(const std::string& message) {
  ATTUNE_ASSIGN(request, runtime::decode_request(message));
  if (request.unit.arch.backend == codegen::Backend::cpu) return runtime::clang_compile(request.unit);
  return runtime::nvrtc_compile_with(request.library, request.unit);
}

}  // namespace

int main() {
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // nobody waits for the answer when the caller is gone
  // What a compiler prints must not get between the answer's bytes.
  const int answers = dup(STDOUT_FILENO);
  dup2(STDERR_FILENO, STDOUT_FILENO);
  return write_all(answers, runtime::encode_answer(compile(read_all(STDIN_FILENO)))) ? 0 : 1;
}
