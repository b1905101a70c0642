// Runs a test's cases twice: with a driver of today and with one that has only what Attune requires. A
// process knows one driver, so each has its own; the kernels of the first serve the second.
#define DOCTEST_CONFIG_IMPLEMENT
#include "codegen/arch.h"
#include "runtime/cuda/cuda_backend.h"
#include "tests/driver/old_driver.h"
#include "tests/support/random.h"
#include "tests/support/temp_dir.h"

#include <doctest/doctest.h>

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

using namespace attune;

#ifdef __SANITIZE_THREAD__
/// NVRTC is not built for ThreadSanitizer, which sees accesses there and not what orders them.
extern "C" const char* __tsan_default_suppressions() {
  return "called_from_lib:libnvrtc.so\n";
}
#endif

namespace {

constexpr int kSkipped = 77;

int run_cases(int argc, char** argv, bool old) {
  test::old_driver = old;
  if (old) stand_in::machine().absent = test::optional_entry_points();
  if (const auto compiler = runtime::nvrtc_compiler(*codegen::cuda_arch(90)); !compiler.ok()) {
    std::printf("skipped: %s\n", compiler.failure().message.c_str());
    return kSkipped;
  }
  std::printf("%s driver\n", old ? "an old" : "a new");
  return doctest::Context(argc, argv).run();
}

int run_in_child(int argc, char** argv, bool old) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) std::exit(run_cases(argc, argv, old));
  int status = 1;
  if (child < 0 || waitpid(child, &status, 0) != child) return 1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

}  // namespace

int main(int argc, char** argv) {
  const test::TempDir cache;
  setenv("ATTUNE_CACHE_DIR", cache.path().c_str(), 1);
  test::test_seed();  // one for both
  const int of_new = run_in_child(argc, argv, /*old=*/false);
  return of_new != 0 ? of_new : run_in_child(argc, argv, /*old=*/true);
}
