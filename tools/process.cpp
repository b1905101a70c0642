#include "tools/process.h"

#include "base/descriptor.h"

#include <fmt/format.h>

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

extern char** environ;  // NOLINT: POSIX has it without a header

namespace attune::tools {
namespace {

Failure failure_of(const char* what, int error) {
  return environment_failure(fmt::format("{}: {}", what, std::strerror(error)));
}

/// What the child opens: nothing to read, and the pipe to write to.
class FileActions {
 public:
  explicit FileActions(int output) {
    posix_spawn_file_actions_init(&actions_);
    posix_spawn_file_actions_addopen(&actions_, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&actions_, output, STDOUT_FILENO);
  }
  ~FileActions() { posix_spawn_file_actions_destroy(&actions_); }
  FileActions(const FileActions&) = delete;
  FileActions& operator=(const FileActions&) = delete;

  const posix_spawn_file_actions_t* get() const { return &actions_; }

 private:
  posix_spawn_file_actions_t actions_{};
};

/// Everything until the writers have closed it.
Result<std::string> drain(int fd) {
  std::string all;
  std::array<char, 65536> piece{};
  for (;;) {
    const ssize_t size = ::read(fd, piece.data(), piece.size());
    if (size > 0) all.append(piece.data(), static_cast<std::size_t>(size));
    if (size == 0) return all;
    if (size < 0 && errno != EINTR) return failure_of("cannot read a program's output", errno);
  }
}

int wait_for(pid_t pid) {
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

Result<std::optional<Outcome>> run_program(const std::vector<std::string>& arguments) {
  std::vector<char*> argv;
  for (const std::string& argument : arguments)
    argv.push_back(const_cast<char*>(argument.c_str()));  // NOLINT
  argv.push_back(nullptr);
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) return failure_of("cannot make a pipe", errno);
  const Descriptor reader(ends[0]);
  Descriptor writer(ends[1]);

  const FileActions actions(writer.get());
  pid_t pid = 0;
  const int error = ::posix_spawnp(&pid, argv[0], actions.get(), nullptr, argv.data(), environ);
  if (error == ENOENT) return std::optional<Outcome>();
  if (error != 0) return failure_of(arguments[0].c_str(), error);
  writer.close();
  auto output = drain(reader.get());
  const int exit_code = wait_for(pid);
  if (!output.ok()) return output.failure();
  return std::optional(Outcome{exit_code, std::move(*output)});
}

}  // namespace attune::tools
