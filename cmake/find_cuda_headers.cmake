# Finds cuda.h and nvrtc.h: in a CUDA toolkit, else in the PyPI wheels (nvidia-cuda-runtime, nvidia-cuda-nvrtc). Only headers:
# libcuda and libnvrtc are opened at run time.
# Sets ATTUNE_HAVE_CUDA, attune_cuda_include and attune_cuda_summary.
set(ATTUNE_HAVE_CUDA OFF)
set(attune_cuda_include "")
set(attune_cuda_summary "off")
if(NOT ATTUNE_CUDA STREQUAL "OFF")
  file(GLOB attune_wheel_includes
    "${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/nvidia/cu13/include"
    "${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/nvidia/cuda_*/include")
  find_path(ATTUNE_CUDA_H cuda.h HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda ${attune_wheel_includes}
    PATH_SUFFIXES include)
  find_path(ATTUNE_NVRTC_H nvrtc.h HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda ${attune_wheel_includes}
    PATH_SUFFIXES include)
  if(ATTUNE_CUDA_H AND ATTUNE_NVRTC_H)
    set(ATTUNE_HAVE_CUDA ON)
    set(attune_cuda_include ${ATTUNE_CUDA_H} ${ATTUNE_NVRTC_H})
    list(REMOVE_DUPLICATES attune_cuda_include)
    set(attune_cuda_summary "on (headers in ${ATTUNE_CUDA_H})")
  elseif(ATTUNE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "ATTUNE_CUDA=ON, but cuda.h and nvrtc.h were not found: install a CUDA toolkit, "
      "or 'pip install nvidia-cuda-runtime nvidia-cuda-nvrtc' into .venv")
  else()
    set(attune_cuda_summary "off: no cuda.h and nvrtc.h (CUDA toolkit, or the PyPI wheels nvidia-cuda-runtime and nvidia-cuda-nvrtc)")
  endif()
endif()
