#!/usr/bin/env bash
# Installs what building and running Attune needs and this machine lacks: Debian packages through apt-get, Python
# packages into .venv. Does nothing where everything is there. With --tests also what only the tests need.
#
# Without the GPU packages or LLVM 19 Attune still builds, minus that backend, so only a missing compiler or library is
# an error; with --tests everything is required. Exit status 3: something required could not be installed.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1-}" in
  "") for_tests=false ;;
  --tests) for_tests=true ;;
  *) echo "usage: tools/setup.sh [--tests]" >&2; exit 2 ;;
esac

build_packages=(g++ cmake ninja-build libfmt-dev nlohmann-json3-dev doctest-dev libcli11-dev libssl-dev libzstd-dev
  libcurl4-openssl-dev)
llvm_packages=(llvm-19-dev libclang-19-dev liblld-19-dev zlib1g-dev libtinfo-dev libxml2-dev libz3-dev)
test_packages=(git clang-format clang-tidy)

say() { echo "setup: $*"; }

# Runs as root, through sudo where we are not.
as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else return 1; fi
}

missing_packages() {
  local package
  for package in "$@"; do
    dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || echo "$package"
  done
}

apt_updated=false
# install_packages PURPOSE PACKAGE...: installs the missing ones; fails with a message when that cannot be done.
install_packages() {
  local purpose=$1 missing
  shift
  if ! command -v dpkg-query >/dev/null; then
    say "not a Debian system: make sure that these are installed ($purpose): $*"
    return 0
  fi
  mapfile -t missing < <(missing_packages "$@")
  [ ${#missing[@]} -gt 0 ] || return 0
  say "installing ${missing[*]} ($purpose)"
  if ! $apt_updated; then
    as_root apt-get update -qq || say "apt-get update failed; trying the package lists that are here"
    apt_updated=true
  fi
  if ! as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" \
      >/dev/null; then
    say "could not install them. No permission or no network? Run: sudo apt-get install ${missing[*]}"
    return 1
  fi
}

# python_has NAME[==VERSION]: is that distribution in .venv?
python_has() {
  .venv/bin/python - "$1" <<'PYTHON' 2>/dev/null
import importlib.metadata
import sys
name, _, version = sys.argv[1].partition("==")
found = importlib.metadata.version(name)
sys.exit(0 if not version or found == version or version.endswith(".*") and found.startswith(version[:-1]) else 1)
PYTHON
}

make_venv() {
  [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1 && return 0
  if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    install_packages "Python environment" python3 python3-venv || return 1
  fi
  say "making .venv"
  python3 -m venv --clear .venv
}

install_wheels() {
  local purpose=$1 missing=() wheel
  shift
  for wheel in "$@"; do python_has "$wheel" || missing+=("$wheel"); done
  [ ${#missing[@]} -gt 0 ] || return 0
  say "installing ${missing[*]} into .venv ($purpose)"
  if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check "${missing[@]}"; then
    say "could not install them. No network? Run: .venv/bin/pip install ${missing[*]}"
    return 1
  fi
}

has_cuda_toolkit() {
  local root
  for root in "${CUDA_HOME-}" "${CUDA_PATH-}" /usr/local/cuda; do
    if [ -n "$root" ] && [ -e "$root/include/cuda.h" ] && [ -e "$root/include/nvrtc.h" ] &&
        compgen -G "$root/lib64/libnvrtc.so.*" >/dev/null; then
      return 0
    fi
  done
  return 1
}

complete=true
install_packages "compiler and libraries" "${build_packages[@]}" || exit 3
install_packages "CPU backend" "${llvm_packages[@]}" || { say "going on without the CPU backend"; complete=false; }
if $for_tests; then install_packages "tests" "${test_packages[@]}" || complete=false; fi

if make_venv; then
  install_wheels "Python package" numpy || { say "going on without NumPy"; complete=false; }
  if ! has_cuda_toolkit; then
    install_wheels "GPU backend: headers and NVRTC" 'nvidia-cuda-runtime==13.0.*' nvidia-cuda-nvrtc==13.0.88 ||
      { say "going on without the GPU backend"; complete=false; }
  fi
  if $for_tests; then
    install_wheels "tests: NVRTC for sm_60 to sm_72" nvidia-cuda-nvrtc-cu12==12.9.86 || complete=false
    install_wheels "tests: bfloat16 for NumPy" ml_dtypes || complete=false
  fi
else
  say "going on without Python's packages"
  complete=false
fi

if $for_tests && ! $complete; then
  say "the tests need everything above"
  exit 3
fi
say "done"
