#!/usr/bin/env bash
# Everything that only a GPU can tell, in pieces of less than ten minutes each.
#
#   bench/gpu_suite.sh build|test|sanitize|time|large|tune|train|all [OUT]
#
# OUT is bench/results/<gpu> by default. Python, torch with CUDA and this package (or this checkout,
# see below) must be there; pytest for the tests. PEERS=FOLDER adds packages that are not installed
# (memeff, inf_cl, siglip_kernel, cutlass_library unpacked). A piece whose result file is in OUT is
# skipped: FORCE=1 runs all again, FORCE=NAME one. DRY=1 prints the commands and needs no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
. bench/pieces.sh
gpu=dry
if [ "${DRY:-0}" != 1 ]; then
  gpu=$($python -c 'import torch; print(torch.cuda.get_device_name().split()[-1].lower())') || exit 1
fi
out=${2:-bench/results/$gpu}
if [ "${DRY:-0}" != 1 ]; then
  mkdir -p "$out"
  out=$(cd "$out" && pwd)
fi

[ -n "${PEERS:-}" ] && export PYTHONPATH="$PEERS${PYTHONPATH:+:$PYTHONPATH}"
if ! $python -c 'import directclr_fast.kernels' 2>/dev/null; then
  # Not installed: a tree of links with kernels/ where an installation puts it.
  links=$(mktemp -d)
  mkdir "$links/directclr_fast"
  for item in "$PWD"/directclr_fast/*; do ln -s "$item" "$links/directclr_fast/"; done
  ln -s "$PWD/kernels" "$links/directclr_fast/kernels"
  export PYTHONPATH="$links${PYTHONPATH:+:$PYTHONPATH}"
  export PYTHONSAFEPATH=1 # or the checkout, which lacks kernels/ inside, would be found first
fi
bench="$python -m directclr_fast bench --device cuda --out $out"

run_build() { # the Hopper kernels, where nvcc and CUTLASS's headers are
  piece build-cuda - bash -c "$python csrc/build.py build/hopper cuda && \
    cp build/hopper/_cuda*.so directclr_fast/"
  if [ -n "${links:-}" ] && [ "${DRY:-0}" != 1 ]; then
    ln -sf "$PWD"/directclr_fast/_cuda*.so "$links/directclr_fast/"
  fi
}
run_test() {
  piece doctor - $python -m directclr_fast doctor
  local file
  for file in tests/test_*_gpu.py; do
    piece "$(basename "$file" .py)" - $python -m pytest -q -p no:cacheprovider "$file"
  done
}
run_sanitize() {
  local tool
  for tool in memcheck racecheck; do
    piece "$tool" - compute-sanitizer --tool "$tool" --error-exitcode 7 \
      $python tests/gates/sanitize.py
  done
}
run_time() {
  piece loss-360 loss-360.json $bench --name loss-360 --rows 1024 4096 16384 32768 --rounds 11
  piece loss-fp32 loss-fp32.json $bench --name loss-fp32 --dtype float32 --rows 4096 16384 \
    --precisions auto tf32 fp16
  piece loss-narrow loss-narrow.json $bench --name loss-narrow --dim 128 256 --rows 16384
  piece loss-wide loss-wide.json $bench --name loss-wide --dim 512 768 2048 --rows 16384
  piece both both.json $bench --name both --negatives both --rows 512 4096 16384 --budget 60
}
run_large() {
  piece loss-131072 loss-131072.json $bench --name loss-131072 --rows 131072 --rounds 5
  piece loss-million loss-million.json $bench --name loss-million --rows 1048576 --width 360 \
    --precisions auto --rounds 3 --variants $(large_variants)
}
large_variants() { # at a million rows a peer takes minutes a step
  $python - << 'END'
from directclr_fast import dispatch

print(*(name for name in dispatch.PRIORITY if name not in ("cpu", "torch", "reference")))
END
}
run_tune() {
  piece tune-360 tune-360.json $python -m directclr_fast.bench.tune --dim 360 --out "$out/tune-360.json"
  piece tune-128 tune-128.json $python -m directclr_fast.bench.tune --dim 128 --kernel sums weights \
    --out "$out/tune-128.json"
}
run_train() {
  piece trainer-resnet18 trainer-resnet18.json $python -m directclr_fast.bench.trainer --rows 4096 8192 \
    --encoder resnet18 --image-size 32 --amp bf16 --out "$out/trainer-resnet18.json"
  piece trainer-small trainer-small.json $python -m directclr_fast.bench.trainer --rows 4096 16384 32768 \
    --encoder small --image-size 32 --amp bf16 --out "$out/trainer-small.json"
}

case "${1:-}" in
  build | test | sanitize | time | large | tune | train) "run_$1" ;;
  all) for name in build test sanitize time large tune train; do "run_$name"; done ;;
  *)
    sed -n '2,10p' "$0"
    exit 2
    ;;
esac
report_failed
