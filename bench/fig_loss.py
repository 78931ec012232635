"""Draws time against N from the result files of bench/loss.py and prints their table; no measuring.

python bench/fig_loss.py bench/results/cpu-2core-zen5/loss-*.json --out docs/loss-cpu.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from directclr_fast.plots import figure

VARIANTS = ("released", "eager", "compiled", "torch", "cpu")


def load(paths: list[str]) -> list[dict]:
    """Every case of the files, by dim and rows."""
    cases = [case for path in paths for case in json.loads(Path(path).read_text())["cases"]]
    return sorted(cases, key=lambda case: (case["dim"], case["rows"]))


def milliseconds(case: dict, name: str) -> float | None:
    """Median of one variant, None where it failed."""
    median = case["variants"].get(name, {}).get("median")
    return None if median is None else 1e3 * median


def table(cases: list[dict]) -> str:
    """Markdown: ms of each variant, the native backend's rate, and its ratios to the others."""
    lines = [
        "| N | d | " + " | ".join(f"{name}, ms" for name in VARIANTS) + " | cpu at 8c, GFLOP/s "
        "| of the FMA peak | x released | x compiled |",
        "|---" * (len(VARIANTS) + 6) + "|",
    ]
    for case in cases:
        times = {name: milliseconds(case, name) for name in VARIANTS}
        cells = [f"{case['rows']}", f"{case['dim']}"]
        cells += [
            "-" if t is None else f"{t:.3g}" if t < 100 else f"{t:.0f}" for t in times.values()
        ]
        rate = case["variants"]["cpu"]["gflops_at_8c"]
        cells += [f"{rate:.0f}", f"{100 * rate / case['fma_peak_gflops']:.0f} %"]
        cells += [
            "-" if times[name] is None else f"{times[name] / times['cpu']:.2f}"
            for name in ("released", "compiled")
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(cases: list[dict], path: str) -> None:
    """Milliseconds of a forward and backward pass against N, both on log scales."""
    cases = [case for case in cases if case["dim"] == 360]
    title = "Loss forward + backward, fp32, 360 of 2048 columns, 2 cores (AMD Zen 5)"
    with figure(path, title) as axes:
        for name in VARIANTS:
            points = [(case["rows"], milliseconds(case, name)) for case in cases]
            points = [(rows, t) for rows, t in points if t is not None]
            wide = 2.5 if name == "cpu" else 1.3
            axes.loglog(*zip(*points), marker="o", markersize=3, linewidth=wide, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("N, rows of each view")
        axes.set_ylabel("ms")
        axes.legend()


def main() -> None:
    """Prints the table; draws where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    cases = load(arguments.files)
    print(table(cases))
    if arguments.out:
        draw(cases, arguments.out)


if __name__ == "__main__":
    main()
