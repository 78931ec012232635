"""The loss over hosts: bytes at their interfaces, and time by the rate of their links.

    python tests/hosts/cost.py --out bench/results/hosts/cost.json

For each number of hosts, way to gather and rate: the bytes that a host sent in a step, beside those
that docs/scaling.py counts, and the time. Hosts that are namespaces share this machine's cores:
with more of them than cores, or with other work on it, bytes are as exact and times say little.
Linux, root.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bridge
import torch
import torch.distributed as dist

from directclr_fast import fast_directclr_loss, flops
from directclr_fast.machine import machine
from directclr_fast.testing import make_views
from directclr_fast.train.checkpoint import write_json

COUNT = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "scaling.py"))["sent_bytes"]
DIM, PITCH, WIDTH = 360, 368, 2048


def rank_of(rank: int, size: int, folder: str) -> None:
    """One host's process: {"rows", "gather", "steps"} per line of stdin; seconds of each step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=size)
    for line in sys.stdin:
        command = json.loads(line)
        gather, rows = command["gather"], command["rows"]
        whole = make_views(rows, WIDTH)
        share = slice(rank * rows // size, (rank + 1) * rows // size)
        own = [r if gather == "one" else r[share] for r in whole]
        own = [r.clone().requires_grad_() for r in own]
        group = {} if gather == "one" else {"group": "world", "gather": gather}

        def step(gather=gather, own=own, group=group) -> None:
            if gather != "one" or rank == 0:
                fast_directclr_loss(*own, DIM, **group).backward()

        seconds, processor = [], time.process_time()
        for _ in range(command["steps"]):
            if gather != "one":
                dist.barrier()
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
        busy = (time.process_time() - processor) / command["steps"]
        print(json.dumps({"seconds": seconds, "processor": busy}), flush=True)


class Processes:
    """One on each host."""

    def __init__(self, hosts: list[bridge.Host], folder: str) -> None:
        own = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": own}
        command = [sys.executable, __file__, "--folder", folder, "--hosts", len(hosts), "--rank"]
        self.hosts = hosts
        self.all = [host.start([*command, rank], **pipes) for rank, host in enumerate(hosts)]

    def run(self, **command) -> tuple[list[dict], list[int]]:
        """What each process says, and the bytes that each host sent meanwhile."""
        before = [host.bytes()[0] for host in self.hosts]
        for process in self.all:
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        said = [json.loads(process.stdout.readline()) for process in self.all]
        return said, [host.bytes()[0] - b for host, b in zip(self.hosts, before)]


def measure(arguments: argparse.Namespace):
    """Cases, one after the other."""
    rows = arguments.rows
    for size in arguments.hosts:
        with bridge.hosts(size) as hosts, tempfile.TemporaryDirectory() as folder:
            processes = Processes(hosts, folder)
            alone = processes.run(rows=rows, gather="one", steps=arguments.steps + 1)[0][0]
            one = statistics.median(alone["seconds"][1:])
            for gather in ("all", "ring"):  # connections and memory
                processes.run(rows=rows, gather=gather, steps=1)
            for rate in arguments.rates:
                for host in hosts:
                    host.rate(rate * 1e9)
                for gather in ("all", "ring"):
                    steps = {"rows": rows, "gather": gather, "steps": arguments.steps}
                    said, sent = processes.run(**steps)
                    there = [max(times) for times in zip(*(told["seconds"] for told in said))]
                    yield {
                        "hosts": size, "rows": rows, "dim": DIM, "gather": gather,
                        "gbit_s": rate, "seconds": there, "one_process_seconds": one,
                        "processor_seconds": max(told["processor"] for told in said),
                        "sent_bytes": max(sent) / arguments.steps,
                        "model_bytes": COUNT(rows, PITCH, size, gather),
                        "gathered_bytes": flops.gathered_bytes(rows, PITCH, 4),
                    }  # fmt: skip


def main() -> None:
    """Writes the cases, or is one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.5, 1.0, 5.0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        return rank_of(arguments.rank, arguments.hosts[0], arguments.folder)
    if reason := bridge.why_not():
        sys.exit(f"cost: {reason}")
    cases = []
    for case in measure(arguments):
        cases.append(case)
        seconds = statistics.median(case["seconds"])
        print(
            f"{case['hosts']} hosts, {case['gather']}, {case['gbit_s']} Gbit/s: "
            f"{case['sent_bytes']:,.0f} bytes sent ({case['sent_bytes'] / case['model_bytes']:.3f} "
            f"of the count), {1e3 * seconds:.0f} ms",
            flush=True,
        )
        if arguments.out:
            write_json(arguments.out, {"machine": machine(), "cases": cases}, indent=1)
    return None


if __name__ == "__main__":
    main()
