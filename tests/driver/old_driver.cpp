#include "tests/driver/old_driver.h"

#include "runtime/cuda/driver.h"

#include <string_view>

namespace attune::test {

bool old_driver = false;

std::set<std::string> optional_entry_points() {
#define ATTUNE_TEST_NAME(name, version) #name,
  return {"cuGetProcAddress", ATTUNE_CUDA_OPTIONAL(ATTUNE_TEST_NAME)};
#undef ATTUNE_TEST_NAME
}

}  // namespace attune::test

// The linker puts this in the place of dlsym, so that an entry point which the machine lacks is not found by
// its exported name, "cuMemAlloc_v2", either.
extern "C" void* __real_dlsym(void* library, const char* name);
extern "C" void* __wrap_dlsym(void* library, const char* name) {
  std::string_view entry_point = name;
  if (const auto version = entry_point.rfind("_v"); version != std::string_view::npos) {
    entry_point = entry_point.substr(0, version);
  }
  if (attune::stand_in::machine().absent.contains(std::string(entry_point))) return nullptr;
  return __real_dlsym(library, name);
}
