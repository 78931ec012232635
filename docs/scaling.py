r"""A model of the loss's step time over many GPUs. A formula with named constants: not measured.

    python docs/scaling.py --out docs/scaling.png                  # its table and figure
    python docs/scaling.py --measured bench/results/*/distributed.json   # beside two processes
    python docs/scaling.py --hosts bench/results/hosts/cost.json   # beside hosts, and what follows

For N rows over W processes, n = N/W, c = N^2 d, z in s bytes an element, dz in 4, R operations/s of
the loss on one device; beta bytes/s that a collective moves through each device, b bytes/s from one
device to the next, lambda(W) the latency of a collective:

.. code-block:: text

    all    T = (8c/W)/R + launch + [n d (s + 4) + 24 n] (W - 1) / beta + 5 lambda
    ring   T = t2 + max(t2, x) (W - 1)          forward,  t2 = 2 n^2 d / R,  x = n d s / b
             + t6 + max(t6, y) (W - 1)          backward, t6 = 6 n^2 d / R,  y = n d (s + 4) / b
             + launch W + 4 n d / b + 24 n (W - 1) / beta + 3 lambda

x moves a block of z2 to the next process, y that and its dz2, which has one hop more to go. "all"
waits for its collectives (z2, the column sums, the statistics, the upstream gradient, dz2); the
ring hides its own behind the products of a block while n > s R / 2b and n > (s + 4) R / 6b. Between
nodes a collective uses every device's port at once, the ring the one at its border. The model knows
no stragglers, no contention and no clock that falls under load.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from directclr_fast import flops
from directclr_fast.plots import figure, markdown

DIM = 360
ROWS = tuple(2**k for k in range(12, 23))  # 4k to 4M
PROCESSES = (1, 8, 64, 1024)


@dataclass(frozen=True)
class Machine:
    """The constants of the model. ``source`` says where they are from."""

    rate: float  # operations/s of the loss at 8c on one device
    near: float  # bytes/s a device sends within a node
    far: float  # bytes/s a device sends between nodes
    per_node: int
    near_hop: float  # seconds a collective needs for each device of a node
    far_hop: float  # seconds for each further node
    launch: float  # seconds a forward and backward pass takes however small
    source: str

    def collective(self, processes: int) -> float:
        """beta: rings over all ports of a node, as NCCL lays them."""
        return self.near if processes <= self.per_node else min(self.near, self.far * self.per_node)

    def hop(self, processes: int) -> float:
        """b: all blocks move in step, so the slowest link of the ring sets the pace."""
        return self.near if processes <= self.per_node else self.far

    def latency(self, processes: int) -> float:
        """lambda: a ring through the devices of a node, then through the nodes."""
        if processes == 1:
            return 0.0
        nodes = -(-processes // self.per_node)
        return self.near_hop * (min(processes, self.per_node) - 1) + self.far_hop * (nodes - 1)


H200 = Machine(
    rate=500e12,
    near=360e9,
    far=40e9,
    per_node=8,
    near_hop=2e-6,
    far_hop=5e-6,
    launch=50e-6,
    source=(
        "rate: the target of docs/design.md section 5 for d = 360, not reached by measurement; "
        "near: 80 % of the 450 GB/s that NVLink 4 carries one way (NVIDIA H200 datasheet: 900 GB/s "
        "both ways); far: 80 % of one 400 Gb/s NDR InfiniBand port per GPU (DGX H200 datasheet); "
        "hops and launch: assumed, of the order that NCCL and nine kernel launches take"
    ),
)


class Step(NamedTuple):
    """Seconds of a forward and backward pass of the loss, and what a device holds for it."""

    total: float
    compute: float
    exposed: float  # communication that nothing hides, latency and launches included
    held_bytes: float  # z, dz of the own rows; with "all" the gathered z2 and dz2 too


def step_time(
    rows: float,
    dim: int,
    processes: int,
    gather: str = "all",
    machine: Machine = H200,
    itemsize: int = 2,
) -> Step:
    """The formula above, for ``rows`` = N in all, symmetric, negatives "cross"."""
    own, others = rows / processes, processes - 1
    link, latency = machine.collective(processes), machine.latency(processes)
    compute = 8 * flops.unit(rows, rows, dim) / processes / machine.rate
    block = own * dim
    held = 2 * block * (itemsize + 4)
    statistics = 24 * own * others / link
    if gather == "all":
        exposed = block * (itemsize + 4) * others / link + statistics + 5 * latency
        if others:
            held += flops.gathered_bytes(rows, dim, itemsize)
        return Step(compute + machine.launch + exposed, compute, machine.launch + exposed, held)
    forward, backward = 0.25 * compute / processes, 0.75 * compute / processes
    hop = machine.hop(processes)
    there, back = block * itemsize / hop, block * (itemsize + 4) / hop
    waits = max(0.0, there - forward) + max(0.0, back - backward)
    exposed = waits * others + (4 * block / hop if others else 0.0) + statistics + 3 * latency
    exposed += machine.launch * processes
    return Step(
        compute + exposed, compute, exposed, held + (2 * block * (itemsize + 4) if others else 0)
    )


def sent_bytes(
    rows: int,
    dim: int,
    processes: int,
    gather: str,
    itemsize: int = 4,
    negatives: str = "cross",
) -> int:
    """Bytes each of W processes sends in a forward and backward pass (and receives), symmetric, one
    group, equal blocks of n = N/W rows of z with ``itemsize`` bytes an element.

    "all": its block of z2 to W - 1 others, and of the fp32 dz2 every other's block. "ring": z2's
    block W - 1 hops in each pass, dz2 W hops. Both: column log-sums, then losses and log-sums of
    every row, fp64. "both" carries z1 with z2, and one more log-sum.
    """
    block, others = rows // processes * dim, processes - 1
    views = 2 if negatives == "both" else 1
    statistics = 8 * (rows // processes) * others * (2 + views)
    if gather == "ring":
        return block * (2 * views * itemsize * others + 4 * processes) + statistics
    return block * others * (views * itemsize + 4) + statistics


def table() -> str:
    """Markdown: ms of a step and GiB held, per N and W; the faster of both ways to gather."""
    head = ("N", "W", "all, ms", "ring, ms", "all, GiB held", "ring, GiB held", "efficiency")
    rows = []
    for n, processes in itertools.product((2**12, 2**15, 2**18, 2**20, 2**22), PROCESSES):
        steps = all_, ring = [step_time(n, DIM, processes, way) for way in ("all", "ring")]
        cells = [f"{1e3 * step.total:.3g}" for step in steps]
        cells += [f"{step.held_bytes / 2**30:.3f}" for step in steps]
        share = ring.compute / min(all_.total, ring.total)
        rows.append([f"{n:,}", processes, *cells, f"{100 * share:.0f} %"])
    return markdown(head, rows)


def measured(path: str) -> str:
    """Markdown: the times in a file of `bench.processes`, and the model with its constants."""
    head = ("N", "gather", "one process, ms", "two, ms", "faster")
    head += ("processor seconds of each, less", "model, ms", "model, faster")
    rows = []
    for case in json.loads(Path(path).read_text())["cases"]:
        here = Machine(**case["constants"], source=path)
        one, busy = case["variants"]["one"]["median"], case["processor_seconds"]
        for way in ("all", "ring"):
            two = case["variants"][way]["median"]
            size = (case["rows"], case["dim"], case["processes"])
            model = step_time(*size, way, here, itemsize=4).total
            cells = [f"{1e3 * one:.0f}", f"{1e3 * two:.0f}", f"{one / two:.2f}x"]
            cells += [f"{busy['one'] / busy[way]:.2f}x"]
            cells += [f"{1e3 * model:.0f}", f"{one / model:.2f}x"]
            rows.append([case["rows"], way, *cells])
    return markdown(head, rows)


def over_hosts(path: str) -> tuple[str, str]:
    """Markdown: bytes and times in a file of tests/hosts/cost.py beside the model's; and what the
    model says of more such hosts, with its constants at 1 Gbit/s."""
    cases = json.loads(Path(path).read_text())["cases"]
    rows = []
    for case in cases:
        cells = [case["hosts"], case["gather"], f"{case['gbit_s']:g}"]
        cells += [f"{case['sent_bytes'] / 1e6:.2f}"]
        cells += [f"{case['sent_bytes'] / case['model_bytes']:.3f}"]
        cells += [f"{1e3 * statistics.median(case['seconds']):.0f}"]
        rows.append([*cells, f"{1e3 * case['model_seconds']:.0f}"])
    head = ("hosts", "gather", "Gbit/s", "MB sent", "of the model's", "ms", "model, ms")
    known = next(c["constants"] for c in reversed(cases) if c["gbit_s"] == 1.0)
    more = []
    for n, size in itertools.product((2**14, 2**16, 2**18), (8, 64, 1024)):
        here = Machine(**{**known, "per_node": size}, source=path)
        all_, ring = (step_time(n, DIM, size, way, here, 4) for way in ("all", "ring"))
        share = all_.compute / min(all_.total, ring.total)
        cells = [f"{step.total:.3g}" for step in (all_, ring)]
        more.append([f"{n:,}", size, *cells, f"{100 * share:.0f} %"])
    return markdown(head, rows), markdown(("N", "W", "all, s", "ring, s", "efficiency"), more)


def draw(path: str) -> None:
    """Milliseconds against N for each number of GPUs, both ways to gather."""
    title = "MODEL, NOT MEASURED: loss forward + backward over W GPUs, d = 360"
    with figure(path, title, (7.0, 4.8)) as axes:
        for number, processes in enumerate(PROCESSES):
            rows = [n for n in ROWS if n >= processes]
            for way, style in (("all", "-"), ("ring", "--")):
                if processes == 1 and way == "ring":
                    continue
                times = [1e3 * step_time(n, DIM, processes, way).total for n in rows]
                label = f"W = {processes}" + (f", {way}" if processes > 1 else "")
                axes.loglog(rows, times, style, color=f"C{number}", linewidth=1.4, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xlabel(
            "N, rows of each view\n"
            f"assumed: {H200.rate / 1e12:.0f} TFLOP/s at 8c on each GPU, "
            f"{H200.near / 1e9:.0f} GB/s within {H200.per_node} GPUs, {H200.far / 1e9:.0f} GB/s "
            f"per port beyond;\nhops {1e6 * H200.near_hop:.0f} and {1e6 * H200.far_hop:.0f} us, "
            f"launches {1e6 * H200.launch:.0f} us; fp16 z, fp32 dz",
            fontsize="small",
        )
        axes.set_ylabel("ms")


def main() -> None:
    """Prints a table; draws where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="the figure's file")
    parser.add_argument("--measured", metavar="FILE", help="of bench.processes: beside these")
    parser.add_argument("--hosts", metavar="FILE", help="of tests/hosts/cost.py: beside these")
    arguments = parser.parse_args()
    if arguments.hosts:
        print(*over_hosts(arguments.hosts), sep="\n\n")
        return
    print(measured(arguments.measured) if arguments.measured else table())
    if arguments.out:
        draw(arguments.out)


if __name__ == "__main__":
    main()
