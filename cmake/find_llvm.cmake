# Finds LLVM and Clang 19 for the plugin that compiles CPU kernels.
# Sets ATTUNE_HAVE_LLVM, ATTUNE_CLANG_VERSION and attune_llvm_summary.
set(ATTUNE_HAVE_LLVM OFF)
set(ATTUNE_CLANG_VERSION "19.1.7")  # what a library built without LLVM expects of a cache and a plugin
set(attune_llvm_summary "off")
if(NOT ATTUNE_LLVM STREQUAL "OFF")
  find_program(ATTUNE_LLVM_CONFIG llvm-config-19 llvm-config HINTS /usr/lib/llvm-19/bin)
  set(attune_llvm_found "")
  if(ATTUNE_LLVM_CONFIG)
    execute_process(COMMAND ${ATTUNE_LLVM_CONFIG} --version OUTPUT_VARIABLE attune_llvm_found OUTPUT_STRIP_TRAILING_WHITESPACE)
    execute_process(COMMAND ${ATTUNE_LLVM_CONFIG} --libdir OUTPUT_VARIABLE ATTUNE_LLVM_LIBDIR OUTPUT_STRIP_TRAILING_WHITESPACE)
    execute_process(COMMAND ${ATTUNE_LLVM_CONFIG} --includedir OUTPUT_VARIABLE ATTUNE_LLVM_INCLUDE OUTPUT_STRIP_TRAILING_WHITESPACE)
  endif()
  if(attune_llvm_found MATCHES "^19\\." AND EXISTS "${ATTUNE_LLVM_LIBDIR}/libclangCodeGen.a"
     AND EXISTS "${ATTUNE_LLVM_LIBDIR}/liblldELF.a")
    set(ATTUNE_HAVE_LLVM ON)
    set(ATTUNE_CLANG_VERSION "${attune_llvm_found}")
    set(attune_llvm_summary "on (LLVM ${attune_llvm_found} in ${ATTUNE_LLVM_LIBDIR})")
  elseif(ATTUNE_LLVM STREQUAL "ON")
    message(FATAL_ERROR "ATTUNE_LLVM=ON, but LLVM 19 with static Clang and lld was not found: "
      "install llvm-19-dev libclang-19-dev liblld-19-dev")
  else()
    set(attune_llvm_summary "off: no LLVM 19 (Debian: llvm-19-dev libclang-19-dev liblld-19-dev)")
  endif()
endif()
