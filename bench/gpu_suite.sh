#!/usr/bin/env bash
# Everything that only a GPU can tell, in pieces of less than ten minutes each.
#
#   bench/gpu_suite.sh test|sanitize|time|large|tune [OUT]     OUT: bench/results/<gpu> by default
#   bench/gpu_suite.sh all [OUT]
#
# Python, torch with CUDA and this package (or this checkout, see below) must be there. A piece
# leaves its files under OUT and a line in OUT/pieces.log; a piece already marked done is not run
# again unless FORCE=1.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
gpu=$($python -c 'import torch; print(torch.cuda.get_device_name().split()[-1].lower())') || exit 1
out=${2:-bench/results/$gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)

if ! $python -c 'import directclr_fast.kernels' 2>/dev/null; then
  # Not installed: a tree of links with kernels/ where an installation puts it.
  links=$(mktemp -d)
  mkdir "$links/directclr_fast"
  for item in "$PWD"/directclr_fast/*; do ln -s "$item" "$links/directclr_fast/"; done
  ln -s "$PWD/kernels" "$links/directclr_fast/kernels"
  export PYTHONPATH="$links${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONUNBUFFERED=1

piece() { # name, command...
  local name=$1
  shift
  if [ "${FORCE:-0}" != 1 ] && grep -q "^$name done" "$out/pieces.log" 2>/dev/null; then
    echo "$name: done before"
    return 0
  fi
  echo "== $name: $*"
  local start=$SECONDS status
  timeout "${LIMIT:-560}" "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  local word=done
  [ "$status" = 0 ] || word="failed ($status)"
  echo "$name $word in $((SECONDS - start)) s" | tee -a "$out/pieces.log"
  return "$status"
}

run_test() {
  piece doctor $python -m directclr_fast doctor
  piece exactness $python -m pytest -q -p no:cacheprovider tests/test_triton_gpu.py
}
run_sanitize() {
  for tool in memcheck racecheck; do
    piece "$tool" compute-sanitizer --tool "$tool" --error-exitcode 7 \
      $python bench/gpu_sanitize.py
  done
}
run_time() {
  piece loss-360 $python bench/gpu_loss.py --dim 360 --rows 4096 16384 32768 \
    --precisions fp16 bf16 fp8 --out "$out/loss-360.json"
  piece loss-widths $python bench/gpu_loss.py --dim 128 256 512 768 2048 --rows 16384 \
    --out "$out/loss-widths.json"
}
run_large() {
  piece loss-large $python bench/gpu_loss.py --dim 360 --rows 131072 --rounds 5 \
    --out "$out/loss-large.json"
  piece loss-million $python bench/gpu_loss.py --dim 360 --width 360 --rows 1048576 --rounds 2 \
    --precisions fp16 --out "$out/loss-million.json"
}
run_tune() {
  piece tune $python bench/tune_triton.py --dim 360 --out "$out/tune-360.json"
  piece tune-narrow $python bench/tune_triton.py --dim 128 --kernel sums weights \
    --out "$out/tune-128.json"
}

case "${1:-}" in
  test | sanitize | time | large | tune) "run_$1" ;;
  all) for name in test sanitize time large tune; do "run_$name"; done ;;
  *)
    sed -n '2,11p' "$0"
    exit 2
    ;;
esac
