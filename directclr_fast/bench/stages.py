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
import time
from collections.abc import Iterator

import torch

from .. import _cpu, dispatch
from ..backends.base import Weights
from ..machine import processor
from . import study
from .timing import interleaved
from .variants import Case

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


def stages(args: argparse.Namespace) -> list[tuple]:
    """(name, operations, bytes that must move, call) of each stage."""
    backend, n, d, width, scale = dispatch.load("cpu"), args.n, args.d, args.width, 10.0
    problem = Case(n, width, d, temperature=1 / scale).problem(args.precision)
    problem = problem.replace(workspace_bytes=int(args.keep * _cpu.workspace_bytes(n, n)))
    views = [torch.randn(n, width) for _ in range(2)]
    lse, weight, diagonal = (torch.full((n,), x, dtype=torch.float64) for x in (12, 5 / n, -5 / n))
    pair = Weights(weight, lse, weight, lse, diagonal)

    def normalize() -> list:
        return [backend.normalize(problem, r, None) for r in views]

    (z1, rnorm1), (z2, rnorm2) = normalize()
    kept, logits = backend.kept_buffer(problem, z1), torch.empty_like(lse)

    def sums() -> None:
        backend.sums(problem, z1, z2, scale, kept, logits)

    def products() -> tuple:
        return backend.products(problem, z1, z2, scale, pair, kept, (True, True))

    sums()
    dz1, dz2 = products()
    grads = [torch.zeros(n, width) for _ in range(2)]
    sides = ((z1, rnorm1, dz1, grads[0]), (z2, rnorm2, dz2, grads[1]))
    c = 2.0 * n * n * d
    return [
        ("normalize", 8.0 * n * d, 16 * n * d, normalize),
        ("sums", c, 8 * n * d, sums),
        ("products", (3 - args.keep) * c, 24 * n * d, products),
        ("finish", 12.0 * n * d, n * (16 * d + 8 * width),
         lambda: [backend.finish(problem, *side, None) for side in sides]),
    ]  # fmt: skip


def measure(args: argparse.Namespace) -> Iterator[tuple[dict, str]]:
    """A case for each number of threads, as a table."""
    _cpu.force_isa(args.isa)
    for threads in args.threads:
        yield _case(args, threads)


def _case(args: argparse.Namespace, threads: int) -> tuple[dict, str]:
    torch.set_num_threads(threads)
    table = stages(args)
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


study.as_script(__name__)
