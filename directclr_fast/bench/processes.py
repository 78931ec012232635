"""Times the loss over one and two processes of this machine (Gloo, one thread each); one JSON file.

    python -m directclr_fast.bench.processes --rows 4096 --out distributed.json

Two processes take turns at: one process with all rows, two with half of them each ("all", "ring").
Beside the times stand the constants that docs/scaling.py models two processes with: the rate of the
one, and the link as the two see it. Two threads of one processor share its caches and its memory,
which the model does not know; on a machine with other work, processor seconds of the first process
say more than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from directclr_fast import fast_directclr_loss, flops
from directclr_fast.bench.timing import interleaved
from directclr_fast.machine import machine
from directclr_fast.testing import make_views

PROCESSES = 2
ROUNDS_OF_LINK = 15


def step(spent: list[float], r1, r2, dim: int, **options) -> None:
    """Forward and backward; gradients are made anew. Adds its processor seconds to ``spent``."""
    r1.grad = r2.grad = None
    before = time.process_time()
    fast_directclr_loss(r1, r2, dim, **options).backward()
    spent.append(time.process_time() - before)


def link(block: int) -> tuple[float, float]:
    """(bytes/s one process sends in an all-gather of such blocks, seconds of a tiny one)."""
    small, large = torch.zeros(8), torch.zeros(block // 4)
    into = {t.numel(): t.new_empty(PROCESSES * t.numel()) for t in (small, large)}
    found = interleaved(
        {
            str(t.numel()): lambda t=t: dist.all_gather_into_tensor(into[t.numel()], t)
            for t in (small, large)
        },
        ROUNDS_OF_LINK,
    )
    tiny, whole = (found[str(t.numel())]["median"] for t in (small, large))
    return block * (PROCESSES - 1) / max(whole - tiny, 1e-9), tiny


def work(rank: int, folder: Path, arguments: argparse.Namespace) -> None:
    """One of the two processes; the first writes the result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/init", world_size=PROCESSES, rank=rank)
    cases = []
    for rows in arguments.rows:
        r1, r2 = make_views(rows, arguments.width)
        whole = [r.requires_grad_() for r in (r1, r2)]
        half = rows // PROCESSES
        own = [r.detach()[rank * half : (rank + 1) * half].requires_grad_() for r in whole]

        spent = {name: [] for name in ("one", "all", "ring")}

        def alone(whole=whole, spent=spent):
            if rank == 0:
                step(spent["one"], *whole, arguments.dim)
            dist.barrier()

        def together(gather, own=own, spent=spent):
            step(spent[gather], *own, arguments.dim, group="world", gather=gather)
            dist.barrier()

        times = interleaved(
            {"one": alone, "all": lambda: together("all"), "ring": lambda: together("ring")},
            arguments.rounds,
        )
        pitch = -(-arguments.dim // 16) * 16
        speed, latency = link(half * pitch * 4)
        one = times["one"]["median"]
        case = {
            "rows": rows,
            "width": arguments.width,
            "dim": arguments.dim,
            "processes": PROCESSES,
            "variants": times,
            "constants": {
                "rate": flops.total(rows, rows, arguments.dim) / one,
                "near": speed,
                "far": speed,
                "per_node": PROCESSES,
                "near_hop": latency,
                "far_hop": 0.0,
                "launch": 0.0,
            },
            "processor_seconds": {n: statistics.median(v[1:]) for n, v in spent.items() if v},
        }
        for gather in ("all", "ring") if rank == 0 else ():
            seconds, busy = times[gather]["median"], case["processor_seconds"]
            print(
                f"N {rows}, {gather}: one process {1e3 * one:.0f} ms, two {1e3 * seconds:.0f} ms "
                f"({one / seconds:.2f}x, processor seconds of each "
                f"{busy['one'] / busy[gather]:.2f}x less)",
                flush=True,
            )
        cases.append(case)
    if rank == 0 and arguments.out:
        results = {"machine": machine(), "command": ["distributed.py", *sys.argv[1:]]}
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.out).write_text(json.dumps(results | {"cases": cases}, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Starts the two processes and waits for them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[4096])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=360)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        work(int(os.environ["RANK"]), Path(os.environ["FOLDER"]), arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, *sys.argv],
                env=os.environ | {"RANK": str(rank), "FOLDER": folder, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(PROCESSES)
        ]
        try:
            codes = [process.wait(timeout=600) for process in started]
        finally:
            for process in started:
                process.kill()
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
