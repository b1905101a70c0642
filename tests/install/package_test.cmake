# cmake -DBUILD_DIR=... -DWORK_DIR=... -P package_test.cmake
# The installed package: a C++ and a C program find it, build against it and run; the library exports the public API alone.
cmake_minimum_required(VERSION 3.25)

function(run_step name)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE code OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "${name} failed (${code}):\n${output}")
  endif()
  set(step_output "${output}" PARENT_SCOPE)
endfunction()

file(REMOVE_RECURSE "${WORK_DIR}")
set(prefix "${WORK_DIR}/prefix")
run_step(install ${CMAKE_COMMAND} --install "${BUILD_DIR}" --prefix "${prefix}")

# Only the public headers are installed, and each of them stands alone.
file(GLOB_RECURSE headers RELATIVE "${prefix}/include" "${prefix}/include/*")
list(SORT headers)
if(NOT headers STREQUAL "attune/attn_bias.h;attune/attune.h;attune/attune_c.h;attune/error.h;attune/tensor.h;attune/version.h")
  message(FATAL_ERROR "installed headers: ${headers}")
endif()

foreach(file bash-completion/completions/attune zsh/site-functions/_attune fish/vendor_completions.d/attune.fish
    man/man1/attune.1)
  file(READ "${prefix}/share/${file}" text)
  if(NOT text MATCHES "precompile")
    message(FATAL_ERROR "share/${file} does not know the command:\n${text}")
  endif()
endforeach()

set(sanitize_flags "")
if(SANITIZE)
  set(sanitize_flags "-fsanitize=${SANITIZE}")
endif()
run_step(configure ${CMAKE_COMMAND} -S "${CONSUMER_DIR}" -B "${WORK_DIR}/build" -DCMAKE_PREFIX_PATH=${prefix}
  -DCMAKE_C_COMPILER=${C_COMPILER} -DCMAKE_CXX_COMPILER=${CXX_COMPILER}
  -DCMAKE_C_FLAGS=${sanitize_flags} -DCMAKE_CXX_FLAGS=${sanitize_flags})
run_step(build ${CMAKE_COMMAND} --build "${WORK_DIR}/build")

set(ENV{ATTUNE_CACHE_DIR} "${WORK_DIR}/cache")
foreach(program consumer_cpp consumer_c)
  if(RUN)
    run_step(${program} "${WORK_DIR}/build/${program}")
    if(NOT step_output MATCHES "^output 3\n$")
      message(FATAL_ERROR "${program} printed: ${step_output}")
    endif()
  endif()
endforeach()

# What the library exports: functions of attune:: and attune_*, and the exception's type.
run_step(nm ${NM} -D --defined-only "${prefix}/${LIBRARY_DIR}/libattune.so")
string(REGEX MATCHALL "[^\n]+" lines "${step_output}")
set(exported 0)
foreach(line IN LISTS lines)
  if(NOT line MATCHES " (attune_[a-z_]+|_ZN?K?6attune[A-Za-z0-9_]*|_ZT[ISV]N6attune[A-Za-z0-9_]*|_ZNK?6attune[A-Za-z0-9_]*)(@.*)?$")
    message(SEND_ERROR "libattune.so exports ${line}")
  endif()
  math(EXPR exported "${exported} + 1")
endforeach()
if(exported LESS 20)
  message(FATAL_ERROR "libattune.so exports only ${exported} symbols:\n${step_output}")
endif()
message(STATUS "${exported} symbols exported")
