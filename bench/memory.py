"""Peak memory of a forward and backward pass, above the inputs, each in a process of its own.

    python bench/memory.py --out bench/results/cpu-2core-zen5/memory.json

Every variant at every --rows until it runs out of memory. Prints MiB, fits them with a constant, a
term in N and a term in N^2, and says the largest N that the fit puts into so many GiB, the inputs
included. Linux, CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from directclr_fast import machine
from directclr_fast.bench import memory, variants
from directclr_fast.bench.variants import Case


def wanted(case: Case, names: list[str] | None) -> list[str]:
    """The variants that can run here, or those of ``names``."""
    found = [v.name for v in variants.catalogue(case) if not v.why_not(case)]
    return found if names is None else [name for name in names if name in found]


def growth(cases: list[dict]) -> dict[str, dict]:
    """The fit of every variant that has enough sizes."""
    peaks: dict[str, list] = {}
    for case in cases:
        for name, peak in case["peak_mib"].items():
            peaks.setdefault(name, []).append((case["rows"], peak))
    return memory.fits(peaks, 2 * cases[0]["width"] * 4 / 2**20)


def save(cases: list[dict], arguments: argparse.Namespace) -> None:
    """Writes what there is so far to --out."""
    if not arguments.out:
        return
    results = {
        "machine": machine.machine(),
        "command": ["bench/memory.py", *sys.argv[1:]],
        "cases": cases,
        "growth": growth(cases),
    }
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    """Measures the rows asked for and prints them as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768]
    )
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=360)
    parser.add_argument("--negatives", default="cross", choices=("cross", "both"))
    parser.add_argument("--variants", nargs="+")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    if not memory.supported():
        sys.exit("memory: expected Linux with /proc/self/clear_refs, got a system without")
    cases, gone = [], {}
    for rows in sorted(arguments.rows):
        case = Case(rows, arguments.width, arguments.dim, negatives=arguments.negatives)
        padded = -(-case.dim // 16) * 16
        record = {
            "rows": rows,
            "width": case.width,
            "dim": case.dim,
            "negatives": case.negatives,
            "gradients_mib": 2 * rows * case.width * 4 / 2**20,
            "z_and_dz_mib": 4 * rows * padded * 4 / 2**20,
            "peak_mib": {},
            "failed": dict(gone),
        }
        names = [name for name in wanted(case, arguments.variants) if name not in gone]
        found = memory.in_processes([(case, name) for name in names])
        for name, peak in zip(names, found):
            if "peak_mib" in peak:
                record["peak_mib"][name] = peak["peak_mib"]
            else:
                record["failed"][name] = peak["failed"]
                gone[name] = f"failed at N = {rows}"
        must = record["gradients_mib"] + record["z_and_dz_mib"]
        shown = ", ".join(f"{n} {p:.0f} ({p - must:+.0f})" for n, p in record["peak_mib"].items())
        shown += "".join(f", {name}: {text}" for name, text in record["failed"].items())
        print(f"N {rows}: gradients, z and dz {must:.0f} MiB; peak {shown}", flush=True)
        cases.append(record)
        save(cases, arguments)
    print("\n".join(memory.lines(growth(cases))))


if __name__ == "__main__":
    main()
