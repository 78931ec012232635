"""Times the loss over one and two processes of this machine: Gloo, one thread each.

    python -m directclr_fast.bench.processes --rows 4096 --out distributed.json

One process with all rows and two with half of them each ("all", "ring") take turns. The result also
has the constants with which docs/scaling.py models two processes: the rate of the one, and the link
as the two see it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from .. import flops
from ..loss import fast_directclr_loss
from ..testing import make_views
from ..world import all_gather
from . import study
from .timing import interleaved

PROCESSES = 2
ROUNDS_OF_LINK = 15
FLAGS = {
    "--rows": {"type": int, "nargs": "+", "default": [4096]},
    "--width": {"type": int, "default": 2048},
    "--dim": {"type": int, "default": 360},
    "--rounds": {"type": int, "default": 7},
}


def step(spent: list[float], r1, r2, dim: int, **options) -> None:
    """Forward and backward; gradients are made anew. Adds its processor seconds to ``spent``."""
    r1.grad = r2.grad = None
    before = time.process_time()
    fast_directclr_loss(r1, r2, dim, **options).backward()
    spent.append(time.process_time() - before)


def link(block: int) -> tuple[float, float]:
    """(bytes/s one process sends in an all-gather of such blocks, seconds of a tiny one)."""

    def gather(elements: int):
        own, into = torch.zeros(elements), torch.empty(PROCESSES * elements)
        return lambda: all_gather(into, own)

    times = interleaved({"tiny": gather(8), "whole": gather(block // 4)}, ROUNDS_OF_LINK)
    tiny, whole = (times[name]["median"] for name in ("tiny", "whole"))
    return block * (PROCESSES - 1) / max(whole - tiny, 1e-9), tiny


def case_of(rank: int, rows: int, arguments: argparse.Namespace) -> dict:
    """One N. The case is the return value of the first process."""
    width, dim = arguments.width, arguments.dim
    whole = [r.requires_grad_() for r in make_views(rows, width)]
    half = rows // PROCESSES
    own = [r.detach()[rank * half : (rank + 1) * half].requires_grad_() for r in whole]
    spent = {name: [] for name in ("one", "all", "ring")}

    def alone() -> None:
        if rank == 0:
            step(spent["one"], *whole, dim)
        dist.barrier()

    def together(gather: str) -> None:
        step(spent[gather], *own, dim, group="world", gather=gather)
        dist.barrier()

    times = interleaved(
        {"one": alone, "all": lambda: together("all"), "ring": lambda: together("ring")},
        arguments.rounds,
    )
    speed, latency = link(half * -(-dim // 16) * 16 * 4)
    constants = {
        "rate": flops.total(rows, rows, dim) / times["one"]["median"],
        "near": speed, "far": speed, "per_node": PROCESSES,
        "near_hop": latency, "far_hop": 0.0, "launch": 0.0,
    }  # fmt: skip
    return {
        "rows": rows, "width": width, "dim": dim, "processes": PROCESSES, "variants": times,
        "constants": constants,
        "processor_seconds": {n: statistics.median(v[1:]) for n, v in spent.items() if v},
    }  # fmt: skip


def joined(rank: int, folder: str, arguments: argparse.Namespace) -> Iterator[dict]:
    """The cases, as one of the two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/init", timedelta(minutes=10), PROCESSES, rank)
    for rows in arguments.rows:
        yield case_of(rank, rows, arguments)
    dist.barrier()
    dist.destroy_process_group()


def second(folder: str, arguments: argparse.Namespace) -> None:
    """The other process."""
    for _ in joined(1, folder, arguments):
        pass


def measure(arguments: argparse.Namespace) -> Iterator[tuple[dict, str]]:
    """Every N, this process being the first of the two."""
    with tempfile.TemporaryDirectory() as folder:
        other = multiprocessing.get_context("spawn").Process(
            target=second, args=(folder, arguments), daemon=True
        )
        other.start()
        for case in joined(0, folder, arguments):
            one, busy = case["variants"]["one"]["median"], case["processor_seconds"]
            lines = []
            for gather in ("all", "ring"):
                two = case["variants"][gather]["median"]
                lines.append(
                    f"N {case['rows']}, {gather}: one process {1e3 * one:.0f} ms, two "
                    f"{1e3 * two:.0f} ms ({one / two:.2f}x, processor seconds of each "
                    f"{busy['one'] / busy[gather]:.2f}x less)"
                )
            yield case, "\n".join(lines)
        other.join()


if __name__ == "__main__":
    study.main(sys.modules[__name__])
