# Finds LLVM, Clang and lld 19, as static archives, for the plugin that compiles CPU kernels.
# Sets ATTUNE_HAVE_LLVM, ATTUNE_CLANG_VERSION, attune_llvm_summary, and for the plugin attune_llvm_include,
# attune_llvm_libdir and attune_llvm_libraries.
set(ATTUNE_HAVE_LLVM OFF)
set(ATTUNE_CLANG_VERSION "19.1.7")  # what a library built without LLVM expects of a cache and a plugin
set(attune_llvm_summary "off")

# llvm_config(out flags...): one line of llvm-config's output.
function(llvm_config out)
  execute_process(COMMAND ${ATTUNE_LLVM_CONFIG} --link-static ${ARGN} OUTPUT_VARIABLE text ERROR_QUIET
    OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(${out} "${text}" PARENT_SCOPE)
endfunction()

# Everything that the plugin links, in link order. llvm-config lists Polly, whose archives Debian does not package.
function(list_llvm_libraries out)
  llvm_config(llvm --libs x86 passes irreader lto coverage option windowsdriver frontenddriver frontendhlsl)
  llvm_config(system --system-libs)
  separate_arguments(llvm UNIX_COMMAND "${llvm}")
  separate_arguments(system UNIX_COMMAND "${system}")
  list(REMOVE_ITEM llvm -lPolly -lPollyISL)
  list(TRANSFORM system REPLACE "^-l(z|zstd|tinfo)$" "-l:lib\\1.a")
  set(clang Frontend Driver Serialization CodeGen Parse Sema APINotes Analysis Edit ASTMatchers AST Support ExtractAPI
    Rewrite Lex Basic)
  list(TRANSFORM clang PREPEND "-lclang")
  set(${out} -llldELF -llldCommon -Wl,--start-group ${clang} -Wl,--end-group ${llvm} ${system} PARENT_SCOPE)
endfunction()

if(NOT ATTUNE_LLVM STREQUAL "OFF")
  find_program(ATTUNE_LLVM_CONFIG NAMES llvm-config-19 llvm-config HINTS /usr/lib/llvm-19/bin)
  set(attune_llvm_found "")
  if(ATTUNE_LLVM_CONFIG)
    llvm_config(attune_llvm_found --version)
    llvm_config(attune_llvm_libdir --libdir)
    llvm_config(attune_llvm_include --includedir)
  endif()
  if(attune_llvm_found MATCHES "^19\\." AND EXISTS "${attune_llvm_libdir}/libclangCodeGen.a"
     AND EXISTS "${attune_llvm_libdir}/liblldELF.a")
    set(ATTUNE_HAVE_LLVM ON)
    set(ATTUNE_CLANG_VERSION "${attune_llvm_found}")
    set(attune_llvm_summary "on (LLVM ${attune_llvm_found} in ${attune_llvm_libdir})")
    list_llvm_libraries(attune_llvm_libraries)
  elseif(ATTUNE_LLVM STREQUAL "ON")
    message(FATAL_ERROR "ATTUNE_LLVM=ON, but LLVM 19 with static Clang and lld was not found: "
      "install llvm-19-dev libclang-19-dev liblld-19-dev")
  else()
    set(attune_llvm_summary "off: no LLVM 19 (Debian: llvm-19-dev libclang-19-dev liblld-19-dev)")
  endif()
endif()
