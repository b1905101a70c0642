/* The C ABI of the compiler plugin, libattune_clang.so: the only thing that the library and the plugin share.
 * Plain C, so that neither side's C++ runtime matters. Structs only ever grow at the end; each carries its
 * size. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define ATTUNE_CLANG_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

struct attune_clang_file {
  const char* name; /* as in #include "name" */
  const char* text;
  size_t text_size;
};

struct attune_clang_request {
  size_t struct_size;
  struct attune_clang_file source;
  const struct attune_clang_file* headers; /* the only files that exist for the compiler, the source aside */
  size_t header_count;
  const char* const* options; /* of clang -cc1 */
  size_t option_count;
};

/* Filled by attune_clang_compile, whether it succeeds or not; release it with attune_clang_free. */
struct attune_clang_result {
  size_t struct_size;
  void* image; /* a shared object without dependencies; null on failure */
  size_t image_size;
  char* log; /* diagnostics; never null after attune_clang_compile */
  double frontend_ms;
  double optimise_ms;
  double codegen_ms;
  double link_ms;
};

typedef uint32_t (*attune_clang_abi_version_fn)(void);
/* The version of Clang inside, "19.1.7". */
typedef const char* (*attune_clang_version_fn)(void);
/* 0 on success. Thread-safe. */
typedef int (*attune_clang_compile_fn)(const struct attune_clang_request*, struct attune_clang_result*);
typedef void (*attune_clang_free_fn)(struct attune_clang_result*);

#ifdef __cplusplus
}
#endif
