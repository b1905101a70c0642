#!/usr/bin/env bash
# From a fresh clone to attention on real data: installs what is missing, builds, and runs causal and plain attention
# over tensors captured from a trained model, on the GPU if there is one, else on the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."

tools/setup.sh
export VIRTUAL_ENV="$PWD/.venv"  # where setup.sh put NVRTC if there is no CUDA toolkit
echo "quickstart: building the library and the attune command"
cmake --preset release | sed -n '/^-- Attune/,/CPU compiler/p'
cmake --build --preset release --target attune attune_command -- --quiet
python3 tools/quickstart.py build/release/bin/attune
