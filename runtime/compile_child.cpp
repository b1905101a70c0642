#include "runtime/compile_child.h"

#include "base/descriptor.h"
#include "base/installation.h"
#include "runtime/compile_wire.h"
#include "runtime/cuda/cuda_backend.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>

extern char** environ;  // NOLINT: POSIX has it without a header

namespace attune::runtime {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr const char* kProgram = "attune-compile";
constexpr std::size_t kLastWords = 2000;  // bytes of stderr that an error quotes

Failure failed(const char* what, int error) {
  return environment_failure(
      fmt::format("cannot compile in a child process: {}: {}", what, std::strerror(error)));
}

Result<fs::path> installed_program() {
  const auto candidates = installed_candidates(kProgram);
  const auto found = std::ranges::find_if(candidates, [](const std::string& path) {
    std::error_code error;  // what can't be looked at is not there
    return fs::exists(path, error);
  });
  if (found != candidates.end()) return fs::path(*found);
  return environment_failure(
      fmt::format("{} is not there (looked for {}): install it beside libattune.so, or unset "
                  "ATTUNE_COMPILE_IN",
                  kProgram, fmt::join(candidates, ", ")));
}

/// A file without a name that holds the text and is read from its begin.
Result<Descriptor> memory_file(std::string_view text) {
  Descriptor file(memfd_create(kProgram, MFD_CLOEXEC));
  if (!file.valid()) return failed("memfd_create", errno);
  for (std::size_t done = 0; done < text.size();) {
    const ssize_t count =
        ::pwrite(file.get(), text.data() + done, text.size() - done, static_cast<off_t>(done));
    if (count < 0 && errno != EINTR) return failed("write", errno);
    if (count > 0) done += static_cast<std::size_t>(count);
  }
  return file;
}

std::string last_words_in(const Descriptor& file) {
  const off_t size = ::lseek(file.get(), 0, SEEK_END);
  const off_t begin = std::max<off_t>(0, size - static_cast<off_t>(kLastWords));
  std::string text(static_cast<std::size_t>(std::max<off_t>(0, size - begin)), '\0');
  const ssize_t count = ::pread(file.get(), text.data(), text.size(), begin);
  text.resize(static_cast<std::size_t>(std::max<ssize_t>(0, count)));
  return text;
}

/// Standard streams and nothing else of ours; default signals, none blocked.
class SpawnSettings {
 public:
  SpawnSettings(int input, int output, int errors) {
    posix_spawn_file_actions_init(&files_);
    posix_spawn_file_actions_adddup2(&files_, input, STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&files_, output, STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&files_, errors, STDERR_FILENO);
    posix_spawn_file_actions_addclosefrom_np(&files_, STDERR_FILENO + 1);
    posix_spawnattr_init(&attributes_);
    sigset_t signals;
    sigemptyset(&signals);
    posix_spawnattr_setsigmask(&attributes_, &signals);
    sigfillset(&signals);
    posix_spawnattr_setsigdefault(&attributes_, &signals);
    posix_spawnattr_setflags(&attributes_, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  }
  ~SpawnSettings() {
    posix_spawn_file_actions_destroy(&files_);
    posix_spawnattr_destroy(&attributes_);
  }
  SpawnSettings(const SpawnSettings&) = delete;
  SpawnSettings& operator=(const SpawnSettings&) = delete;

  const posix_spawn_file_actions_t* files() const { return &files_; }
  const posix_spawnattr_t* attributes() const { return &attributes_; }

 private:
  posix_spawn_file_actions_t files_{};
  posix_spawnattr_t attributes_{};
};

/// A process that is over, and waited for, when the object is.
class Child {
 public:
  explicit Child(pid_t pid) : pid_(pid) {}
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  ~Child() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    while (::waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) {}
  }

  /// waitpid()'s status once it ends; nothing when it lives at the deadline, or another part of the program
  /// waits for all children.
  std::optional<int> status_by(Clock::time_point deadline) {
    for (;;) {
      int status = 0;
      const pid_t ended = ::waitpid(pid_, &status, WNOHANG);
      if (ended < 0 && errno == EINTR) continue;
      if (ended != 0) pid_ = 0;
      if (ended > 0) return status;
      if (ended < 0 || Clock::now() >= deadline) return std::nullopt;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

 private:
  pid_t pid_;
};

/// What is written to the pipe until its other end is closed; nothing when that is not so at the deadline.
std::optional<std::string> read_by(Clock::time_point deadline, const Descriptor& pipe) {
  std::string all;
  std::array<char, 65536> piece{};
  for (;;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
    if (left <= 0) return std::nullopt;
    pollfd ready{.fd = pipe.get(), .events = POLLIN};
    if (::poll(&ready, 1, static_cast<int>(std::min<long long>(left, 1'000'000))) <= 0) continue;
    const ssize_t count = ::read(pipe.get(), piece.data(), piece.size());
    if (count == 0) return all;
    if (count > 0) all.append(piece.data(), static_cast<std::size_t>(count));
    if (count < 0 && errno != EINTR) return all;
  }
}

std::string end_of(std::optional<int> status) {
  if (!status) return "it left no answer";
  if (WIFSIGNALED(*status)) {
    const char* name = sigdescr_np(WTERMSIG(*status));
    return fmt::format("signal {} ended it ({})", WTERMSIG(*status), name == nullptr ? "unknown" : name);
  }
  return fmt::format("it left with exit code {} and no answer", WEXITSTATUS(*status));
}

}  // namespace

Result<Image> compile_in_child(const codegen::Unit& unit, const CompileChild& child) {
  const bool on_gpu = unit.arch.backend == codegen::Backend::cuda;
  ATTUNE_ASSIGN(library, on_gpu ? nvrtc_path(unit.arch) : Result<std::string>(""));
  ATTUNE_ASSIGN(program, child.program.empty() ? installed_program() : Result<fs::path>(child.program));
  ATTUNE_ASSIGN(request, memory_file(encode_request(unit, library)));
  ATTUNE_ASSIGN(errors, memory_file(""));
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) return failed("pipe", errno);
  const Descriptor answers(ends[0]);
  Descriptor write_end(ends[1]);

  const auto deadline = Clock::now() + child.limit;
  const SpawnSettings settings(request.get(), write_end.get(), errors.get());
  char* const arguments[] = {const_cast<char*>(program.c_str()), nullptr};  // NOLINT: POSIX takes them so
  pid_t pid = 0;
  if (const int error =
          ::posix_spawn(&pid, program.c_str(), settings.files(), settings.attributes(), arguments, environ))
    return failed(program.c_str(), error);
  Child process(pid);
  write_end.close();

  const auto said = read_by(deadline, answers);
  if (said) {
    if (auto answer = decode_answer(*said)) return std::move(*answer);
  }
  const auto status = said ? process.status_by(deadline) : std::nullopt;
  const std::string end = said && (status || Clock::now() < deadline)
                              ? end_of(status)
                              : fmt::format("it took longer than {} s (ATTUNE_COMPILE_LIMIT)",
                                            std::chrono::duration<double>(child.limit).count());
  const std::string words = last_words_in(errors);
  return environment_failure(
      fmt::format("the compiler ({}) of kernel {} for {} failed in its process: {}{}{}", unit.compiler.name,
                  unit.key.hex().substr(0, 12), unit.arch.target, end, words.empty() ? "" : "\n", words));
}

}  // namespace attune::runtime
