"""Where the CPU backend's time goes: each native stage beside the FMA peak of the same run.

    python -m directclr_fast.bench.stages --n 8192 --d 360 --width 2048 --threads 2 4 8 16
                                          [--precision bf16] [--keep 0.5] [--isa avx2]

Every round measures the peak, then every stage once, so that all figures share the machine's state;
medians over the rounds. The processor time is that of all threads: with more of them than cores it
says whether cutting the work into more parts makes more of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator

import torch

from ..backends import cpu
from ..machine import processor
from . import study
from .timing import interleaved

FLAGS = {
    "--n": {"type": int, "default": 4096},
    "--d": {"type": int, "default": 360},
    "--width": {"type": int, "default": 2048},
    "--threads": {"type": int, "nargs": "+", "default": [torch.get_num_threads()]},
    "--rounds": {"type": int, "default": 7},
    "--keep": {"type": float, "default": 0.0, "help": "fraction of S kept for backward"},
    "--precision": {"default": "highest", "choices": ("highest", "bf16", "tf32")},
    "--isa": {"default": ""},
}


def stages(args, threads):
    """(name, operations, bytes that must move, call) of each stage."""
    from .. import _cpu

    n, d, width = args.n, args.d, args.width
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
        workspace=kept.data_ptr() if len(kept) else 0,
        workspace_bytes=4 * len(kept),
        operands=cpu.OPERANDS[args.precision],
    )
    arrays = dict(
        z1=z1, z2=z2, rnorm1=rnorm1, rnorm2=rnorm2, dz1=dz1, dz2=dz2, row_lse=lse,
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
        _cpu.sums(**of("z1", "z2"), **shape, upper=False, **keep, **row, logits=pos.data_ptr())

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
    return [
        ("normalize", 8.0 * n * d, 16 * n * d, lambda: [normalize(0), normalize(1)]),
        ("sums", c, 8 * n * d, sums),
        ("products", (3 - args.keep) * c, 24 * n * d,
         lambda: _cpu.products(**pair, **shape, upper=False, **keep, **weights,
                               **of("dz1", "dz2"))),
        ("finish", 12.0 * n * d, n * (16 * d + 8 * width), lambda: [finish(0), finish(1)]),
    ]  # fmt: skip


def measure(args: argparse.Namespace) -> Iterator[tuple[dict, str]]:
    """A case for each number of threads, as a table."""
    from .. import _cpu

    _cpu.force_isa(args.isa)
    for threads in args.threads:
        yield _case(args, threads)


def _case(args: argparse.Namespace, threads: int) -> tuple[dict, str]:
    from .. import _cpu

    table = stages(args, threads)
    iterations = 500_000
    calls = {"peak": lambda: _cpu.fma_peak(threads=threads, iterations=iterations)}
    operations = calls["peak"]()
    work = {name: [] for name, *_ in table}

    def timed(name, call):
        start = time.process_time()
        call()
        work[name].append(time.process_time() - start)

    calls |= {name: lambda n=name, c=call: timed(n, c) for name, _, _, call in table}
    medians = {name: times["median"] for name, times in interleaved(calls, args.rounds).items()}
    peak = operations / medians.pop("peak")
    both = sum(medians.values())
    text = [
        f"{processor()}, {_cpu.isa()}, {threads} threads, N = {args.n}, d = {args.d} of "
        f"{args.width}, {_cpu.arithmetic()}, kept {args.keep}, fp32 FMA peak {peak / 1e9:.0f} "
        "GFLOP/s",
        f"{'stage':10} {'ms':>9} {'share':>6} {'GFLOP/s':>8} {'of peak':>8} {'GB/s':>6}"
        f" {'processor ms':>13}",
    ]
    lines = []
    for name, operations, moved, _ in table:
        s = medians[name]
        rate = operations / s
        text.append(
            f"{name:10} {1e3 * s:9.3f} {s / both:6.1%} {rate / 1e9:8.1f} {rate / peak:8.1%} "
            f"{moved / s / 1e9:6.1f} {1e3 * statistics.median(work[name]):13.3f}"
        )
        lines.append(
            {"stage": name, "seconds": s, "gflops": rate / 1e9, "of_peak": rate / peak,
             "processor_seconds": statistics.median(work[name])}
        )  # fmt: skip
    rate = 8 * args.n * args.n * args.d / both
    text.append(
        f"all: {1e3 * both:.2f} ms, {rate / 1e9:.0f} GFLOP/s counting 8 N^2 d operations, "
        f"{rate / peak:.1%} of the peak"
    )
    case = {
        "isa": _cpu.isa(), "products": _cpu.arithmetic(), "threads": threads, "fma_peak": peak,
        "seconds": both, "stages": lines,
    }  # fmt: skip
    return case, "\n".join(text)


if __name__ == "__main__":
    study.main(sys.modules[__name__])
