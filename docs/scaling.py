"""What a process sends in a step of the loss, counted; the tables of scaling.md from result files.

python docs/scaling.py bench/results/hosts/cost.json bench/results/*/distributed.json
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from directclr_fast.plots import markdown


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


def table(path: str) -> str:
    """Markdown, of a file of tests/hosts/cost.py or of `bench.processes`."""
    cases = json.loads(Path(path).read_text())["cases"]
    return over_processes(cases) if "variants" in cases[0] else over_hosts(cases)


def over_hosts(cases: list[dict]) -> str:
    """Bytes at a host's interface, beside the count, and the median step."""
    rows = []
    for case in cases:
        mb, share = case["sent_bytes"] / 1e6, case["sent_bytes"] / case["model_bytes"]
        cells = [case["hosts"], case["gather"], f"{case['gbit_s']:g}", f"{mb:.2f}", f"{share:.3f}"]
        rows.append([*cells, f"{1e3 * statistics.median(case['seconds']):.0f}"])
    return markdown(("hosts", "gather", "Gbit/s", "MB sent", "of the count", "ms"), rows)


def over_processes(cases: list[dict]) -> str:
    """Two processes against one."""
    head = ("N", "gather", "one process, ms", "two, ms", "faster")
    rows = []
    for case in cases:
        one, busy = case["variants"]["one"]["median"], case["processor_seconds"]
        for way in ("all", "ring"):
            two = case["variants"][way]["median"]
            cells = [f"{1e3 * one:.0f}", f"{1e3 * two:.0f}", f"{one / two:.2f}x"]
            rows.append([case["rows"], way, *cells, f"{busy['one'] / busy[way]:.2f}x"])
    return markdown((*head, "processor seconds of each, less"), rows)


if __name__ == "__main__":
    print(*map(table, sys.argv[1:]), sep="\n\n")
