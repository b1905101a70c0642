#!/usr/bin/env bash
# check.sh [--cases N] [--seed S] [--log FOLDER] [STEP...]: checks and measures the bundle it lies in (tools/gpu_bundle.sh) on
# this machine's GPU. One line a step and what it found wrong; everything printed is kept in FOLDER, default ./log.
#
#   masks     every golden mask: materialize, and what running kernels attend to
#   forward   N random problems (default 512) of each family, and bitwise dropout
#   backward  N random gradients of each family
#   streams   8 threads on 8 streams, captured graphs, several contexts, a fork; then with compilers in children
#   pack      first calls with kernels that were compiled elsewhere, without NVRTC
#   python    the package on CUDA tensors of PyTorch
#   sanitize  compute-sanitizer on a few problems of each family
#   speed     what first calls cost, and ratios to PyTorch's kernels
#
# Exit status: 0 when every step passed.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cases=512 seed=$RANDOM log=log steps=()
while [ $# -gt 0 ]; do
  case $1 in
    --cases) cases=$2; shift 2 ;;
    --seed) seed=$2; shift 2 ;;
    --log) log=$2; shift 2 ;;
    -*) sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    *) steps+=("$1"); shift ;;
  esac
done
[ ${#steps[@]} -gt 0 ] || steps=(masks forward backward streams pack python sanitize speed)
mkdir -p "$log"
log=$(cd "$log" && pwd)
export LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" PYTHONUNBUFFERED=1 ATTUNE_TEST_SEED=$seed
failed=0
cd "$here" || exit

# run NAME COMMAND...: its output goes to a file; what went wrong, and its last line, here.
run() {
  local name=$1 begin=$SECONDS status
  shift
  "$@" >"$log/$name.txt" 2>&1
  status=$?
  echo "== $name: exit $status, $((SECONDS - begin)) s: $(tail -1 "$log/$name.txt" | cut -c1-200)"
  [ "$status" = 0 ] && return
  failed=$((failed + 1))
  grep -aE '^wrong:|ERROR|FAIL|Error|hazard' "$log/$name.txt" | cut -c1-400 | head -8
}

step_masks() { run masks bin/attune verify masks tests/golden/masks.json --backend cuda; }

step_forward() {
  run forward bin/gpu_numerics_test --cases "$cases"
  run dropout bin/gpu_dropout_test
  run tiles bin/gpu_tiles_test
}

step_backward() { run backward bin/gpu_backward_test --cases "$cases"; }

step_streams() {
  run streams bin/gpu_streams_test
  run streams_child env ATTUNE_COMPILE_IN=child bin/gpu_streams_test
}

step_pack() { run pack python3 tests/gpu/carried_pack.py; }

step_python() {
  local module
  for module in test_torch.OnTheGpu test_examples_torch test_gradients_torch.OnTheGpu; do
    run "$module" python3 tests/python/run.py "$here/lib/libattune.so" "$module"
  done
}

step_sanitize() {
  local tool test sanitizer
  sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
  for test in gpu_numerics_test gpu_backward_test; do
    for tool in memcheck racecheck initcheck synccheck; do
      run "${tool}_$test" "$sanitizer" --tool "$tool" --error-exitcode 1 "bin/$test" --cases 12
    done
  done
}

step_speed() {
  local pass
  run first_call python3 bench/first_call.py bin/attune
  cat "$log/first_call.txt"
  for pass in forward backward; do
    run "speed_$pass" python3 -W ignore "bench/gpu_$pass.py" "$here/lib/libattune.so" --head-dim 64 128 --length 4096
    cat "$log/speed_$pass.txt"
  done
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || echo "no nvidia-smi" >&2
echo "seed $seed, $cases cases a family"
for step in "${steps[@]}"; do
  declare -F "step_$step" >/dev/null || { echo "no step $step" >&2; exit 2; }
  "step_$step"
done
echo "$failed failed"
[ "$failed" = 0 ]
