r"""A model of the loss's step time over many GPUs. A formula with named constants: not measured.

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

from dataclasses import dataclass
from typing import NamedTuple

from . import flops


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
        return self.near if processes <= self.per_node else min(self.near, self.all_far)

    def hop(self, processes: int) -> float:
        """b: all blocks move in step, so the slowest link of the ring sets the pace."""
        return self.near if processes <= self.per_node else self.far

    @property
    def all_far(self) -> float:
        """Bytes/s a whole node sends."""
        return self.far * self.per_node

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
