// libattune_clang.so: Clang, LLVM and lld behind four C functions.
#include "runtime/cpu/plugin/phases.h"

#include <clang/Basic/Version.h>

#include <cstdlib>
#include <cstring>

namespace {

/// What is handed out crosses to another C++ runtime, so it comes from malloc.
void* copy_of(const void* data, size_t size) {
  void* copy = std::malloc(size == 0 ? 1 : size);
  if (copy != nullptr) std::memcpy(copy, data, size);
  return copy;
}

bool compile(const attune_clang_request& request, attune_clang_result& result, std::string& log) {
  attune::plugin::Bytes object;
  attune::plugin::Bytes image;
  if (!attune::plugin::compile_object(request, result, object, log)) return false;
  attune::plugin::Stopwatch watch;
  if (!attune::plugin::link_shared(object, image, log)) return false;
  result.link_ms = watch.lap();
  result.image = copy_of(image.data(), image.size());
  result.image_size = image.size();
  return result.image != nullptr;
}

}  // namespace

extern "C" {

uint32_t attune_clang_abi_version(void) {
  return ATTUNE_CLANG_ABI_VERSION;
}

const char* attune_clang_version(void) {
  return CLANG_VERSION_STRING;
}

int attune_clang_compile(const attune_clang_request* request, attune_clang_result* result) {
  if (request->struct_size != sizeof *request || result->struct_size != sizeof *result) {
    result->log = static_cast<char*>(copy_of("mismatched plugin", sizeof "mismatched plugin"));
    return 1;
  }
  *result = {};
  result->struct_size = sizeof *result;
  std::string log;
  const bool ok = compile(*request, *result, log);
  result->log = static_cast<char*>(copy_of(log.c_str(), log.size() + 1));
  return ok ? 0 : 1;
}

void attune_clang_free(attune_clang_result* result) {
  std::free(result->image);
  std::free(result->log);
  result->image = nullptr;
  result->log = nullptr;
}

}  // extern "C"
