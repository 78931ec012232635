#!/bin/sh
# Builds the kernels and csrc/cpu/test_main.cpp with AddressSanitizer and UndefinedBehaviorSanitizer
# and runs them; `csrc/sanitize.sh thread` uses ThreadSanitizer instead. `csrc/sanitize.sh python
# FILE ARGUMENTS` runs a Python file with the extension built under AddressSanitizer, python naming an
# interpreter that has torch, pybind11 and setuptools.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=
case ${1:-} in *python*)
  python=$1
  script=$(realpath "$2")
  shift 2
  set -- address "$@"
  ;;
esac
cd "$root/csrc/cpu"
kind=${1:-address,undefined}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cxx=${CXX:-c++}
flags="-std=c++17 -O1 -g -pthread -fno-omit-frame-pointer -fno-math-errno -ffp-contract=fast"
flags="$flags -fsanitize=$kind -fno-sanitize-recover=all -Wno-ignored-attributes"
if [ -n "$python" ]; then
  shift
  # A copy of the package whose _cpu is this one; the sanitizer must be there before any other.
  cp -r "$root/directclr_fast" "$out/"
  rm -rf "$out"/directclr_fast/_cpu* "$out/directclr_fast/kernels"
  cp -r "$root/kernels" "$out/directclr_fast/kernels"
  CXX=$cxx CXXFLAGS=$flags LDFLAGS=$flags "$python" "$root/csrc/build.py" "$out/directclr_fast"
  LD_PRELOAD=$($cxx -print-file-name=libasan.so):$($cxx -print-file-name=libstdc++.so) \
    ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$out "$python" "$script" "$@"
  exit
fi
avx512="-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl"
bodies="portable tiles"
[ "$(uname -m)" = x86_64 ] && bodies="portable tiles avx2 avx512 avx512_bf16 tiles_avx512 amx"
for body in $bodies; do
  case $body in
    avx2) isa="-mavx2 -mfma" ;;
    avx512 | tiles_avx512) isa=$avx512 ;;
    amx) isa="$avx512 -mamx-tile -mamx-int8 -mamx-bf16" ;;
    avx512_bf16) isa="$avx512 -mavx512bf16" ;;
    *) isa="" ;;
  esac
  # shellcheck disable=SC2086
  $cxx $flags $isa -c "body_$body.cpp" -o "$out/body_$body.o"
done
# shellcheck disable=SC2086
$cxx $flags isa.cpp stages.cpp step.cpp test_main.cpp "$out"/body_*.o -o "$out/test_main"
"$out/test_main"
