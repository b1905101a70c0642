#!/usr/bin/env bash
# Runs every test that this machine can run and ends with one line: N passed, N failed, N skipped.
#
# tools/test.sh              everything, from a fresh clone: 20 to 25 minutes on two cores
# tools/test.sh STEP...      only these: release asan tsan no_cuda no_llvm format tidy
#
# Each step prints its time; every skipped test is listed with its reason. Exit status: 0 when nothing failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

all_steps=(format no_cuda no_llvm release tidy asan tsan)
jobs=$(nproc)
passed=0
failed=0
skipped=0
skips=()

pass() { passed=$((passed + 1)); }
fail() {
  failed=$((failed + 1))
  echo "FAILED: $*"
}
skip() {
  skipped=$((skipped + 1))
  skips+=("$*")
}

# configure_and_build NAME TARGETS [CMAKE ARGUMENT...]: builds build/NAME; a failure counts as one failed test. TARGETS
# are words, none for everything.
configure_and_build() {
  local name=$1 targets=$2
  shift 2
  if ! cmake "$@" >"build/$name.configure.log" 2>&1; then
    tail -20 "build/$name.configure.log"
    fail "$name: configure"
    return 1
  fi
  # shellcheck disable=SC2086  # words, as said
  if ! cmake --build "build/$name" ${targets:+--target $targets} -- --quiet; then
    fail "$name: build"
    return 1
  fi
}

# The test executables that these arguments of CTest choose: its name LABEL.TARGET says which target a test runs.
test_targets() {
  ctest --test-dir "build/$1" -N "${@:2}" | sed -n 's/^ *Test *#[0-9]*: [a-z]*\.\([a-z0-9_]*_test\)$/\1/p' | tr '\n' ' '
}

# What the failed tests of a CTest log printed, then their names.
failures_of() {
  sed -n '/\*\*\*\(Failed\|Timeout\|Exception\|Not Run\)/,/^ *[0-9]*\/[0-9]* Test/p' "$1"
  sed -n '/^The following tests FAILED/,/^Errors while/p' "$1"
}

# run_ctest NAME [CTEST ARGUMENT...]: runs build/NAME's tests and adds up what its report says.
run_ctest() {
  local name=$1 report="$PWD/build/$1.junit.xml" counts reason
  shift
  rm -f "$report"
  ctest --test-dir "build/$name" --parallel "$jobs" --output-on-failure --no-tests=error --output-junit "$report" "$@" \
    >"build/$name.ctest.log" 2>&1
  if [ ! -s "$report" ]; then
    tail -20 "build/$name.ctest.log"
    fail "$name: ctest"
    return 1
  fi
  # One line with three counts, then one a skipped test.
  mapfile -t counts < <(python3 tools/junit_counts.py "$report")
  local this_passed this_failed this_skipped
  read -r this_passed this_failed this_skipped <<<"${counts[0]}"
  passed=$((passed + this_passed))
  failed=$((failed + this_failed))
  skipped=$((skipped + this_skipped))
  for reason in "${counts[@]:1}"; do skips+=("$name: $reason"); done
  echo "$name: $this_passed passed, $this_failed failed, $this_skipped skipped"
  [ "$this_failed" = 0 ] || failures_of "build/$name.ctest.log"
}

step_release() {
  configure_and_build release "" --preset release || return 1
  run_ctest release
}

# build_and_test NAME TARGETS CONFIGURE_ARGUMENTS -- CTEST_ARGUMENTS: the targets and the tests that CTest chooses, without
# those of kernels compiled at run time, which the release step has run.
build_and_test() {
  local name=$1 targets=$2 configure=() choice=(-LE kernels)
  shift 2
  while [ "$1" != -- ]; do configure+=("$1"); shift; done
  choice+=("${@:2}")
  configure_and_build "$name" "$targets" "${configure[@]}" || return 1
  configure_and_build "$name" "$(test_targets "$name" "${choice[@]}")" "${configure[@]}" || return 1
  run_ctest "$name" "${choice[@]}"
}

# Tests ask for impossible amounts of memory and for processes that fork, which the sanitizers refuse unless told. LLVM
# keeps what it allocates at load for the process's life: no leak of ours to find.
step_asan() {
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
    build_and_test asan attune --preset asan -- -L 'unit|golden|fuzz|stress|driver' -R '_test$'
}
step_tsan() {
  TSAN_OPTIONS=die_after_fork=0:allocator_may_return_null=1 \
    build_and_test tsan attune --preset tsan -- -L threads -R '_test$'
}

# A build that lacks a part still builds, and the tests that can tell pass. In the release build's folder, before it: what
# a part does not change is compiled once for all three.
lacking() {
  build_and_test release "attune attune_command" --preset release "$1" -- -L parts
}

step_no_cuda() { lacking -DATTUNE_CUDA=OFF; }
step_no_llvm() { lacking -DATTUNE_LLVM=OFF; }

step_format() {
  if ! clang-format --version 2>/dev/null | grep -q 'version 14\.'; then
    skip "format: needs clang-format 14, whose layout the tree has"
    return
  fi
  if git ls-files -z '*.h' '*.cpp' '*.c' '*.cuh' | xargs -0 clang-format --dry-run -Werror; then
    pass
  else
    fail "format: run clang-format -i on the files above"
  fi
}

# The modules without a backend's headers; needs the release build's compile commands.
step_tidy() {
  if ! clang-tidy --version 2>/dev/null | grep -q 'version 14\.'; then
    skip "tidy: needs clang-tidy 14, whose checks the tree passes"
    return
  fi
  if [ ! -e build/release/compile_commands.json ]; then
    cmake --preset release >/dev/null || { fail "tidy: configure"; return 1; }
  fi
  if git ls-files -z 'base/*.cpp' 'cache/*.cpp' 'codegen/*.cpp' |
      xargs -0 -n 1 -P "$jobs" clang-tidy -p build/release --quiet >build/tidy.log 2>/dev/null; then
    pass
  else
    grep -E 'error|warning' build/tidy.log | sort -u
    fail "tidy"
  fi
}

steps=("$@")
[ $# -gt 0 ] || steps=("${all_steps[@]}")
for step in "${steps[@]}"; do
  if [[ " ${all_steps[*]} " != *" $step "* ]]; then
    echo "tools/test.sh: no step $step; there are: ${all_steps[*]}" >&2
    exit 2
  fi
done

tools/setup.sh --tests || exit $?
export VIRTUAL_ENV="$PWD/.venv"  # where setup.sh put the wheels with NVRTC
mkdir -p build
begin=$SECONDS
for step in "${steps[@]}"; do
  step_begin=$SECONDS
  echo "== $step"
  "step_$step"
  echo "== $step took $((SECONDS - step_begin)) s"
done

echo
for reason in "${skips[@]}"; do echo "skipped: $reason"; done
echo "elapsed: $(((SECONDS - begin) / 60)) min $(((SECONDS - begin) % 60)) s"
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
