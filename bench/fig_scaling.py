"""Draws the modelled step time of the loss on many GPUs and prints its table; no measuring.

python bench/fig_scaling.py --out docs/scaling.png
"""

from __future__ import annotations

import argparse

from directclr_fast.plots import figure
from directclr_fast.scaling import H200, step_time

DIM = 360
ROWS = tuple(2**k for k in range(12, 23))  # 4k to 4M
PROCESSES = (1, 8, 64, 1024)


def table() -> str:
    """Markdown: ms of a step and GiB held, per N and W; the faster of both ways to gather."""
    lines = ["| N | W | all, ms | ring, ms | all, GiB held | ring, GiB held | efficiency |"]
    lines.append("|---" * 7 + "|")
    for rows in (2**12, 2**15, 2**18, 2**20, 2**22):
        for processes in PROCESSES:
            all_, ring = (step_time(rows, DIM, processes, way) for way in ("all", "ring"))
            share = ring.compute / min(all_.total, ring.total)
            cells = [f"{rows:,}", f"{processes}"]
            cells += [f"{1e3 * step.total:.3g}" for step in (all_, ring)]
            cells += [f"{step.held_bytes / 2**30:.3f}" for step in (all_, ring)]
            lines.append("| " + " | ".join([*cells, f"{100 * share:.0f} %"]) + " |")
    return "\n".join(lines)


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
        axes.legend(fontsize="small")


def main() -> None:
    """Prints the table; draws where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    arguments = parser.parse_args()
    print(table())
    if arguments.out:
        draw(arguments.out)


if __name__ == "__main__":
    main()
