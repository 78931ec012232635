"""Peak memory of a forward and backward pass, above the inputs, each in a process of its own.

    python bench/memory.py --rows 8192 16384 32768 --out bench/results/cpu-2core-zen5/memory.json

Prints MiB beside what the backend must hold: z and dz of both views and the full-width gradients.
A plain eager step is run only where its matrices fit in --eager-gib. Linux (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from timing import machine

CHILD = """
import sys, torch
from directclr_fast import fast_directclr_loss
from directclr_fast.testing import eager_loss

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024

rows, width, dim, name = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
def loss(a, b):
    if name == "eager":
        return eager_loss(a, b, dim)
    return fast_directclr_loss(a, b, dim, backend=name)
generator = torch.Generator().manual_seed(0)
r1 = torch.randn(rows, width, generator=generator).requires_grad_()
r2 = torch.randn(rows, width, generator=generator).requires_grad_()
loss(r1[:64], r2[:64]).backward()
r1.grad = r2.grad = None
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
loss(r1, r2).backward()
print(status("VmHWM") - before)
"""


def peak_mib(rows: int, width: int, dim: int, name: str) -> float:
    """Peak resident MiB of one step above what stands before it."""
    command = [sys.executable, "-c", CHILD, str(rows), str(width), str(dim), name]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 2**20


def main() -> None:
    """Measures the rows asked for and prints them as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[8192])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=360)
    parser.add_argument("--eager-gib", type=float, default=8.0)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    results = {"machine": machine(), "cases": []}
    for rows in arguments.rows:
        padded = -(-arguments.dim // 16) * 16
        case = {
            "rows": rows,
            "width": arguments.width,
            "dim": arguments.dim,
            "gradients_mib": 2 * rows * arguments.width * 4 / 2**20,
            "z_and_dz_mib": 4 * rows * padded * 4 / 2**20,
            "peak_mib": {},
        }
        for name in ("cpu", "torch", "eager"):
            if name == "eager" and 5 * rows * rows * 4 / 2**30 > arguments.eager_gib:
                continue
            case["peak_mib"][name] = peak_mib(rows, arguments.width, arguments.dim, name)
        must = case["gradients_mib"] + case["z_and_dz_mib"]
        shown = ", ".join(f"{n} {p:.0f} ({p - must:+.0f})" for n, p in case["peak_mib"].items())
        print(f"N {rows}: gradients, z and dz {must:.0f} MiB; peak {shown}", flush=True)
        results["cases"].append(case)
    if arguments.out:
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
