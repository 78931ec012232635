#!/bin/sh
# Builds the kernels and csrc/cpu/test_main.cpp with AddressSanitizer and UndefinedBehaviorSanitizer
# and runs them; `csrc/sanitize.sh thread` uses ThreadSanitizer instead.
set -eu
cd "$(dirname "$0")/cpu"
kind=${1:-address,undefined}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cxx=${CXX:-c++}
flags="-std=c++17 -O1 -g -pthread -fno-omit-frame-pointer -fno-math-errno -ffp-contract=fast"
flags="$flags -fsanitize=$kind -fno-sanitize-recover=all -Wno-ignored-attributes"
avx512="-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl"
bodies="portable"
[ "$(uname -m)" = x86_64 ] && bodies="portable avx2 avx512 avx512_bf16"
for body in $bodies; do
  case $body in
    avx2) isa="-mavx2 -mfma" ;;
    avx512) isa=$avx512 ;;
    avx512_bf16) isa="$avx512 -mavx512bf16" ;;
    *) isa="" ;;
  esac
  # shellcheck disable=SC2086
  $cxx $flags $isa -c "body_$body.cpp" -o "$out/body_$body.o"
done
# shellcheck disable=SC2086
$cxx $flags isa.cpp stages.cpp test_main.cpp "$out"/body_*.o -o "$out/test_main"
"$out/test_main"
