#!/usr/bin/env bash
# The native library's own checks: format, lint, tests, sanitizers, and aarch64 under qemu. The work
# goes to a temporary directory. PYTHON names a Python whose jaxlib has the FFI headers.
set -euo pipefail
cd "$(dirname "$0")"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
calls=${FUZZ_CALLS:-2000}

has() {
  command -v "$1" > /dev/null && return
  echo "=== SKIPPED: $2 ($1 is not installed) ==="
  return 1
}

build() {  # build NAME CMAKE_ARGUMENTS...
  local name=$1
  shift
  echo "=== $name ==="
  cmake -S . -B "$work/$name" -DTESTS=ON -DWERROR=ON -DPython_EXECUTABLE="${PYTHON:-$(command -v python3)}" "$@" > "$work/$name.log" || {
    cat "$work/$name.log"
    return 1
  }
  cmake --build "$work/$name" --parallel 2 > "$work/$name.log" 2>&1 || {
    tail -40 "$work/$name.log"
    return 1
  }
}

hash_of() { "$@" | sed -n 's/.*hash //p'; }

if has clang-format "C++ format"; then
  clang-format --dry-run --Werror ./*.h ./*.cc standin/*.h standin/*.cc tests/*.h tests/*.cc
fi

build release
ctest --test-dir "$work/release" --output-on-failure --parallel 2
expected=$(hash_of "$work/release/tests/kernel_test")

if has clang-tidy "C++ lint"; then
  clang-tidy --quiet -p "$work/release" ascend.cc cann_*[!k].cc canonical.cc cpu.cc kernel.cc library.cc plan.cc validate.cc 2> "$work/tidy.log" || {
    cat "$work/tidy.log"
    exit 1
  }
fi

build address -DSANITIZE=address
"$work/address/tests/kernel_test" 500
"$work/address/tests/plan_test"
"$work/address/tests/fuzz_test" "$calls"

build thread -DSANITIZE=thread
if ! "$work/thread/tests/threads_test" 4 2> "$work/tsan.log"; then
  cat "$work/tsan.log"
  exit 1
fi

if has aarch64-linux-gnu-g++ "aarch64" && has qemu-aarch64 "aarch64"; then
  build aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
  run=(qemu-aarch64 -L /usr/aarch64-linux-gnu)
  "${run[@]}" "$work/aarch64/tests/simd_test_baseline"
  got=$(hash_of "${run[@]}" "$work/aarch64/tests/kernel_test")
  if [ "$got" != "$expected" ]; then
    echo "aarch64 gives other bits: hash $got, here $expected" >&2
    exit 1
  fi
  echo "aarch64: the same bits, hash $got"
fi
