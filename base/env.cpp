#include "base/env.h"

#include <array>
#include <cstdlib>

namespace attune {
namespace {

constexpr std::array kVariables{
    EnvVariable{.name = "ATTUNE_BACKEND",
                .values = "auto|cuda|cpu",
                .effect = "The backend that calls may use; auto allows both.",
                .fallback = "auto",
                .read_in = "runtime/engine_options.cpp"},
    EnvVariable{
        .name = "ATTUNE_CACHE_DIR",
        .values = "a folder",
        .effect = "The cache's own folder. It must belong to the user and be writable by nobody else.",
        .fallback = "$XDG_CACHE_HOME/attune",
        .read_in = "cache/store.cpp"},
    EnvVariable{
        .name = "ATTUNE_CACHE_MAX_SIZE",
        .values = "a size: 500M, 2G, 2GiB",
        .effect =
            "How large the cache may grow before kernels that were not used for long go; 0 is no bound.",
        .fallback = "1G",
        .read_in = "runtime/engine_options.cpp"},
    EnvVariable{.name = "ATTUNE_CACHE_MODE",
                .values = "rw|ro|off|refresh",
                .effect = "Read and write the cache, only read it, do neither, or write it without reading.",
                .fallback = "rw",
                .read_in = "runtime/engine_options.cpp"},
    EnvVariable{.name = "ATTUNE_CACHE_PATH",
                .values = "packs and folders, colons between",
                .effect = "Only read: packs before the user's own cache, caches that others keep after it.",
                .fallback = "none",
                .read_in = "cache/layers.cpp"},
    EnvVariable{
        .name = "ATTUNE_CAPTURE",
        .values = "refuse|compile",
        .effect =
            "What a call on a stream that is captured into a graph does when its kernel is not loaded: fail, "
            "or compile and load it.",
        .fallback = "refuse",
        .read_in = "runtime/engine_options.cpp"},
    EnvVariable{.name = "ATTUNE_COMPILE_IN",
                .values = "process|child",
                .effect =
                    "Compile in the process, or each kernel in a child process, whose crash or hang is an "
                    "error of the call.",
                .fallback = "process",
                .read_in = "runtime/engine_options.cpp"},
    EnvVariable{.name = "ATTUNE_COMPILE_LIMIT",
                .values = "seconds, 1 or more",
                .effect = "How long a child process may take for one kernel before it is killed.",
                .fallback = "300",
                .read_in = "runtime/engine_options.cpp"},
    EnvVariable{
        .name = "ATTUNE_JIT",
        .values = "auto|never|always",
        .effect =
            "Compile what the cache lacks, fail instead of compiling, or compile although it is cached.",
        .fallback = "auto",
        .read_in = "runtime/engine_options.cpp"},
    EnvVariable{.name = "ATTUNE_LOG",
                .values = "error|warn|info|debug",
                .effect = "The least important level that the logger writes to stderr.",
                .fallback = "warn",
                .read_in = "base/log.cpp"},
    EnvVariable{
        .name = "ATTUNE_NVRTC",
        .values = "a shared library",
        .effect = "The NVRTC to load, in place of the loader's path, the toolkit and the PyPI wheels.",
        .fallback = "searched for",
        .read_in = "runtime/cuda/nvrtc_search.cpp"},
    EnvVariable{
        .name = "ATTUNE_PACK_KEY",
        .values = "a PEM file",
        .effect = "An Ed25519 public key: packs that are not signed with its private key are refused.",
        .fallback = "packs need no signature",
        .read_in = "cache/pack_key.cpp"},
    EnvVariable{
        .name = "ATTUNE_RECORD",
        .values = "a file",
        .effect = "Appends each problem at its first use, one a line, as `attune precompile` reads them.",
        .fallback = "nothing is recorded",
        .read_in = "runtime/engine_options.cpp"},
    EnvVariable{.name = "ATTUNE_REMOTE",
                .values = "http://HOST/PATH or https://HOST/PATH",
                .effect = "A server that is asked for what no cache on disk has; kernels lie under its URL.",
                .fallback = "no network",
                .read_in = "cache/remote.cpp"},
    EnvVariable{.name = "ATTUNE_REMOTE_MODE",
                .values = "ro|rw",
                .effect = "Only ask that server, or also send it what is compiled here.",
                .fallback = "ro",
                .read_in = "cache/remote.cpp"},
    EnvVariable{
        .name = "ATTUNE_TEMPLATE_DIR",
        .values = "a folder",
        .effect = "Reads the kernel templates from there instead of the library. For work on kernels.",
        .fallback = "the embedded templates",
        .read_in = "runtime/engine_options.cpp"},
    EnvVariable{.name = "ATTUNE_THREADS",
                .values = "a count, 1 to 4096",
                .effect = "Threads that a call on the CPU uses.",
                .fallback = "one for each CPU of the process",
                .read_in = "runtime/cpu/cpu_backend.cpp"},
    EnvVariable{.name = "ATTUNE_TUNED",
                .values = "follow|ignore",
                .effect = "Whether calls follow the choices that `attune bench --tune` kept.",
                .fallback = "follow",
                .read_in = "runtime/engine_options.cpp"},
    EnvVariable{.name = "CUDA_HOME",
                .values = "a folder",
                .effect = "A CUDA toolkit whose lib64 or lib may hold NVRTC.",
                .fallback = "/usr/local/cuda",
                .read_in = "runtime/cuda/nvrtc_search.cpp"},
    EnvVariable{.name = "HOME",
                .values = "a folder",
                .effect = "Holds .cache/attune, the cache's folder when no other variable names one.",
                .fallback = "no cache on disk",
                .read_in = "cache/store.cpp"},
    EnvVariable{.name = "NO_COLOR",
                .values = "anything",
                .effect = "The attune command prints without colours.",
                .fallback = "colours on a terminal",
                .read_in = "tools/console.cpp"},
    EnvVariable{.name = "VIRTUAL_ENV",
                .values = "a folder",
                .effect = "A Python environment whose PyPI wheels may hold NVRTC.",
                .fallback = "no environment is looked at",
                .read_in = "runtime/cuda/nvrtc_search.cpp"},
    EnvVariable{.name = "XDG_CACHE_HOME",
                .values = "an absolute path",
                .effect = "Holds attune, the cache's folder when ATTUNE_CACHE_DIR is not set.",
                .fallback = "$HOME/.cache",
                .read_in = "cache/store.cpp"},
    EnvVariable{.name = "XDG_RUNTIME_DIR",
                .values = "an absolute path",
                .effect = "Holds attune.locks when the cache's folder is on no local disk.",
                .fallback = "no locks then",
                .read_in = "cache/lock.cpp"},
};

}  // namespace

std::span<const EnvVariable> env_variables() {
  return kVariables;
}

std::optional<std::string> env(const char* name) {
  const char* value = secure_getenv(name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  return value;
}

}  // namespace attune
