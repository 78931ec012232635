"""Where the CPU backend's time goes: each native stage beside the FMA peak of the same run.

    python -m directclr_fast.bench.stages --n 8192 --d 360 --width 2048 --threads 2
                                [--bf16] [--keep 0.5] [--isa avx2]

Every round measures the peak, then every stage once, so that all figures share the machine's state;
medians over the rounds. Prints one table; --json FILE writes it with the machine.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

from directclr_fast import _cpu
from directclr_fast.bench.timing import interleaved
from directclr_fast.machine import machine


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--d", type=int, default=360)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", type=float, default=0.0, help="fraction of S kept for backward")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--isa", default="")
    parser.add_argument("--json")
    return parser.parse_args()


def stages(args):
    """(name, operations, bytes that must move, call) of each stage."""
    n, d, width, threads = args.n, args.d, args.width, args.threads
    eps, scale = 1e-12, 10.0
    pitch = _cpu.pitch(d)
    x1, x2 = torch.randn(n, width), torch.randn(n, width)
    z1, z2, dz1, dz2 = (torch.zeros(n, pitch) for _ in range(4))
    grads = [torch.zeros(n, width) for _ in range(2)]
    rnorm1, rnorm2 = (torch.zeros(n) for _ in range(2))
    wide = [torch.full((n,), x, dtype=torch.float64) for x in (0, 12, 5 / n, -5 / n)]
    pos, lse, weight, diagonal = wide
    acc = torch.zeros(4, n, dtype=torch.float64)
    kept = torch.empty(int(args.keep * _cpu.workspace_bytes(n, n)) // 4)
    keep = dict(
        workspace=kept.data_ptr() if len(kept) else 0, workspace_bytes=4 * len(kept), bf16=args.bf16
    )
    arrays = dict(
        z1=z1, z2=z2, rnorm1=rnorm1, rnorm2=rnorm2, dz1=dz1, dz2=dz2, pos=pos, row_lse=lse,
        col_lse=lse, row_weight=weight, col_weight=weight, diagonal=diagonal,
    )  # fmt: skip
    views = [(x.data_ptr(), _cpu.FLOAT32, width, 1, 0) for x in (x1, x2)]
    specs = [(g.data_ptr(), _cpu.FLOAT32, width, 1, 0, width, True) for g in grads]
    arrays.update(x1=x1, x2=x2, grad1=grads[0], grad2=grads[1], kept=kept)  # kept alive by `of`
    shape = dict(m=n, n=n, d=d, row_offset=0, scale=scale, threads=threads)

    def of(*names):
        return {name: arrays[name].data_ptr() for name in names}

    weights = of("row_lse", "col_lse", "row_weight", "col_weight", "diagonal")

    def sums():
        acc.zero_()
        a = acc.data_ptr()
        row = dict(row_sum=a, row_ref=a + 8 * n, col_sum=a + 16 * n, col_ref=a + 24 * n)
        logits = 0 if args.bf16 else pos.data_ptr()
        _cpu.sums(**of("z1", "z2"), **shape, upper=False, **keep, **row, logits=logits)

    def normalize(i):
        _cpu.normalize(
            x=views[i], rows=n, d=d, eps=eps, z=(z1, z2)[i].data_ptr(),
            rnorm=(rnorm1, rnorm2)[i].data_ptr(), threads=threads,
        )  # fmt: skip

    def finish(i):
        _cpu.finish(
            z=(z1, z2)[i].data_ptr(), dz=(dz1, dz2)[i].data_ptr(),
            rnorm=(rnorm1, rnorm2)[i].data_ptr(), rows=n, d=d, eps=eps, grad=specs[i],
            threads=threads,
        )  # fmt: skip

    normalize(0), normalize(1), sums()
    c = 2.0 * n * n * d
    pair = of("z1", "z2")
    exact = (
        "positives",
        2.0 * n * d,
        8 * n * d,
        lambda: _cpu.positives(**pair, m=n, d=d, row_offset=0, **of("pos"), threads=threads),
    )
    return [
        ("normalize", 8.0 * n * d, 16 * n * d, lambda: [normalize(0), normalize(1)]),
        *([exact] if args.bf16 else []),
        ("sums", c, 8 * n * d, sums),
        ("products", (3 - args.keep) * c, 24 * n * d,
         lambda: _cpu.products(**pair, **shape, upper=False, **keep, **weights,
                               **of("dz1", "dz2"))),
        ("finish", 12.0 * n * d, n * (16 * d + 8 * width), lambda: [finish(0), finish(1)]),
    ]  # fmt: skip


def main():
    args = arguments()
    _cpu.force_isa(args.isa)
    table = stages(args)
    operations = 0

    def peak_loop():
        nonlocal operations
        operations = _cpu.fma_peak(threads=args.threads, iterations=500_000)

    calls = {"peak": peak_loop} | {name: call for name, _, _, call in table}
    medians = {name: found["median"] for name, found in interleaved(calls, args.rounds).items()}
    peak = operations / medians.pop("peak")
    both = sum(medians.values())
    print(
        f"{platform.processor() or platform.machine()}, {_cpu.isa()}, {args.threads} threads, "
        f"N = {args.n}, d = {args.d} of {args.width}, bf16 {args.bf16}, kept {args.keep}, "
        f"fp32 FMA peak {peak / 1e9:.0f} GFLOP/s"
    )
    print(f"{'stage':10} {'ms':>9} {'share':>6} {'GFLOP/s':>8} {'of peak':>8} {'GB/s':>6}")
    lines = []
    for name, operations, moved, _ in table:
        s = medians[name]
        rate = operations / s
        print(
            f"{name:10} {1e3 * s:9.3f} {s / both:6.1%} {rate / 1e9:8.1f} {rate / peak:8.1%} "
            f"{moved / s / 1e9:6.1f}"
        )
        lines.append({"stage": name, "seconds": s, "gflops": rate / 1e9, "of_peak": rate / peak})
    c = 2.0 * args.n * args.n * args.d
    rate = 4 * c / both
    print(
        f"both: {1e3 * both:.2f} ms, 8c at {rate / 1e9:.0f} GFLOP/s, {rate / peak:.1%} of the peak"
    )
    if args.json:
        result = {
            "machine": machine(),
            "command": ["directclr_fast/bench/stages.py", *sys.argv[1:]],
            "settings": {key: value for key, value in vars(args).items() if key != "json"},
            "isa": _cpu.isa(),
            "fma_peak": peak,
            "seconds": both,
            "stages": lines,
        }
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
