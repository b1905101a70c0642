// doctest's main, with --cases N before its own options.
#define DOCTEST_CONFIG_IMPLEMENT
#include "tests/fuzz/cases.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace {
int chosen = 20'000;
}  // namespace

int attune::test::cases() {
  return chosen;
}

int main(int argc, char** argv) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::string_view(argv[i]) == "--cases") chosen = std::max(1, std::atoi(argv[i + 1]));
  }
  return doctest::Context(argc, argv).run();
}
