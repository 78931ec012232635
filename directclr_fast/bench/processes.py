"""Times the loss over one and two processes of this machine: Gloo, one thread each.

One process with all rows and two with half of them each ("all", "ring") take turns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from ..loss import fast_directclr_loss
from ..testing import make_views
from . import study
from .timing import interleaved

PROCESSES = 2
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
    return {
        "rows": rows, "width": width, "dim": dim, "processes": PROCESSES, "variants": times,
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


study.as_script(__name__)
