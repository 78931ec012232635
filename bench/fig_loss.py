"""Draws time against N from result files of `directclr-fast bench`; measures nothing.

python bench/fig_loss.py bench/results/cpu-2core-zen5/loss-*.json --out docs/loss-cpu.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from directclr_fast.bench import report

KINDS = {
    "time": report.draw_time,
    "memory": report.draw_memory,
    "roofline": report.draw_roofline,
    "accuracy": report.draw_accuracy,
}


def main() -> None:
    """Prints the table of the files; draws the figure asked for where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--kind", choices=KINDS, default="time")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    result = report.load(arguments.files)
    print(report.table(result))
    if arguments.out:
        KINDS[arguments.kind](result, report.main_cases(result), Path(arguments.out))


if __name__ == "__main__":
    main()
