#!/usr/bin/env bash
# The native libraries' own checks: format, lint, tests, sanitizers, aarch64 under qemu, and the CUDA
# kernels, which run on the host in the tests, also as the PTX of an nvcc where there is one. It builds in
# a temporary directory. PYTHON is a Python whose jaxlib has the FFI headers.
set -euo pipefail
cd "$(dirname "$0")"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
calls=${FUZZ_CALLS:-2000}
rooms=(core cpu cuda ascend bench standin tests)
operator=dequant_rope_quant_kvcache

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
  find "${rooms[@]}" -name '*.h' -o -name '*.cc' -o -name '*.cu' | xargs clang-format --dry-run --Werror
fi

linted=(core cpu ascend bench)
if has nvcc "the CUDA kernels on nvcc, and the lint of cuda/"; then linted+=(cuda); fi
# Two generations are enough to see nvcc's warnings; the wheel has them all.
build release "-DCMAKE_CUDA_ARCHITECTURES=80-real;90-real"
ctest --test-dir "$work/release" --output-on-failure --parallel 2
expected=$(hash_of "$work/release/tests/${operator}_kernel_test")

if has clang-tidy "C++ lint"; then
  # The kernels are left out: most of what is reported there is in the compilers' intrinsics. cann_check.cc
  # needs CANN's headers.
  find "${linted[@]}" -name '*.cc' ! -name '*_variant.cc' ! -name cann_check.cc -print0 |
    xargs -0 clang-tidy --quiet -p "$work/release" 2> "$work/tidy.log" || {
    cat "$work/tidy.log"
    exit 1
  }
fi

build address -DSANITIZE=address
"$work/address/tests/${operator}_kernel_test" 500
"$work/address/tests/${operator}_plan_test"
"$work/address/tests/${operator}_fuzz_test" "$calls"
"$work/address/tests/${operator}_cuda_test" 300
"$work/address/tests/decode_attention_cuda_test" 42
"$work/address/tests/decode_attention_kernel_test" 60 2000
"$work/address/tests/decode_attention_fuzz_test" "$calls"
"$work/address/tests/decode_attention_guard_test" 200

build thread -DSANITIZE=thread
for test in "${operator}_threads_test" decode_attention_threads_test; do
  if ! "$work/thread/tests/$test" 4 2> "$work/tsan.log"; then
    cat "$work/tsan.log"
    exit 1
  fi
done

if has aarch64-linux-gnu-g++ "aarch64" && has qemu-aarch64 "aarch64"; then
  build aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
  run=(qemu-aarch64 -L /usr/aarch64-linux-gnu)
  "${run[@]}" "$work/aarch64/tests/simd_test_baseline"
  got=$(hash_of "${run[@]}" "$work/aarch64/tests/${operator}_kernel_test")
  if [ "$got" != "$expected" ]; then
    echo "aarch64 gives other bits: hash $got, here $expected" >&2
    exit 1
  fi
  echo "aarch64: the same bits, hash $got"
  "${run[@]}" "$work/aarch64/tests/decode_attention_kernel_test" 60 2000
  "${run[@]}" "$work/aarch64/tests/decode_attention_guard_test" 100
fi
