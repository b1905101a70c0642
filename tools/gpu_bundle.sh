#!/usr/bin/env bash
# tools/gpu_bundle.sh FOLDER: builds, and puts into FOLDER (about 20 MB) what a machine with a GPU, PyTorch and no compiler
# needs to check and measure this tree. There run FOLDER/check.sh (tools/gpu_check.sh).
set -euo pipefail
[ $# = 1 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
folder=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."

tests=(gpu_numerics_test gpu_backward_test gpu_dropout_test gpu_tiles_test gpu_streams_test)
cmake --preset release >/dev/null
cmake --build --preset release --target attune attune_command "${tests[@]}" -- --quiet

mkdir -p "$folder"/{bin,lib,bench,examples,tests/golden,tests/gpu}
for program in attune "${tests[@]}"; do strip -o "$folder/bin/$program" "build/release/bin/$program"; done
for file in libattune.so attune-compile; do strip -o "$folder/lib/$file" "build/release/lib/$file"; done
# The libraries of the distribution that the other machine may lack.
ldd build/release/bin/attune | awk '$1 ~ /^lib(fmt|zstd|crypto)\./ { print $3 }' | xargs -I{} cp -L {} "$folder/lib"
cp -r python "$folder"
cp bench/*.py "$folder/bench"
cp -r tests/python "$folder/tests"
cp tests/gpu/*.py "$folder/tests/gpu"
cp -r examples/data "$folder/examples"
cp tests/golden/masks.json "$folder/tests/golden"
cp tools/gpu_check.sh "$folder/check.sh"

# What tests/gpu/carried_pack.py runs where there is no compiler.
ATTUNE_CACHE_DIR=$(mktemp -d)
export ATTUNE_CACHE_DIR
trap 'rm -r "$ATTUNE_CACHE_DIR"' EXIT
build/release/bin/attune precompile --arch sm_90a --problem "dtype=f32 head_dim=32 window_right=bounded lse=write" \
  --problem "dtype=bf16 head_dim=128 window_right=bounded boxes=1 extent=few_tiles"
build/release/bin/attune cache pack "$folder/hopper.pack"
echo "gpu_bundle: $(du -sh "$folder" | cut -f1) in $folder"
