// Needs a compiler for CPU kernels, and counts what it compiles: in a cache of its own.
#define DOCTEST_CONFIG_IMPLEMENT
#include "tests/support/temp_dir.h"

#include <doctest/doctest.h>

#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
#if !ATTUNE_HAVE_LLVM
  std::puts("[SKIP] built without LLVM: there is no compiler for CPU kernels");
  return 77;
#endif
  const attune::test::TempDir cache;
  setenv("ATTUNE_CACHE_DIR", cache.path().c_str(), 1);
  return doctest::Context(argc, argv).run();
}
