#!/usr/bin/env bash
# Measures every committed CPU result again, in pieces of some minutes, and fills the tables and
# figures from them. For a machine with nothing else to do.
#
#   bench/cpu_suite.sh [OUT]        OUT: bench/results/cpu-2core-zen5
#
# A piece whose result file is there is skipped: FORCE=1 runs all again, FORCE=NAME one. DRY=1
# prints the commands.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results/cpu-2core-zen5}
logs=runs/cpu_suite
LIMIT=${LIMIT:-1800}
. bench/pieces.sh
[ "${DRY:-0}" = 1 ] || mkdir -p "$out"

bench="$python -m directclr_fast bench --device cpu --no-figures --out $out"

piece loss-small loss-small.json \
  $bench --name loss-small --rows 64 128 256 512 1024 2048 --rounds 11
piece loss-large loss-large.json $bench --name loss-large --rows 4096 8192
piece loss-16384 loss-16384.json $bench --name loss-16384 --rows 16384 --rounds 3
piece loss-widths loss-widths.json \
  $bench --name loss-widths --rows 4096 --dim 128 512 2048 --budget 45
piece both both.json $bench --name both --negatives both --rows 128 256 1024 4096 --budget 30
piece quick quick.json $bench --name quick --quick
# What the test suite compares with, on one thread: ratios there hold on a busy machine too.
piece ci-baseline ci-baseline.json env OMP_NUM_THREADS=1 \
  $bench --name ci-baseline --rows 1024 2048 --rounds 9 --variants released eager torch cpu
piece memory memory.json $python -m directclr_fast.bench.memory --out "$out/memory.json"
piece stages stages.json $python -m directclr_fast.bench.stages --n 8192 --out "$out/stages.json"
piece trainer trainer.json \
  $python -m directclr_fast.bench.trainer --rows 4096 8192 16384 --rounds 3 --out "$out/trainer.json"
piece trainer-32 trainer-32.json \
  $python -m directclr_fast.bench.trainer --rows 4096 --image-size 32 --rounds 3 --out "$out/trainer-32.json"
piece distributed distributed.json \
  $python -m directclr_fast.bench.processes --rows 4096 8192 --out "$out/distributed.json"
piece gradcache gradcache_memory.json \
  $python -m directclr_fast.bench.gradcache --out "$out/gradcache_memory.json"
piece pytest-benchmark pytest-benchmark.json \
  $python -m pytest bench --benchmark-only --benchmark-json "$out/pytest-benchmark.json"

[ "${DRY:-0}" = 1 ] && exit 0
$python bench/fig_loss.py "$out"/loss-*.json --out docs/loss-cpu.png
for kind in memory roofline accuracy; do
  $python bench/fig_loss.py "$out"/loss-*.json --kind $kind --out "docs/$kind-cpu.png" > /dev/null
done
$python bench/tables.py "$out"
report_failed
