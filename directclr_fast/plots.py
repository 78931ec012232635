"""What reports are made of: tables, and figures that open without a screen and save themselves.

The one place that touches matplotlib.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from .machine import needs


def markdown(head: Iterable, rows: Iterable[Iterable]) -> str:
    """A table in Markdown."""
    line, *lines = (f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows))
    return "\n".join([line, "|---" * len([*head]) + "|", *lines])


@contextlib.contextmanager
def panels(
    path: str | Path,
    columns: int,
    title: str = "",
    size: tuple[float, float] = (7.0, 4.2),
    rows: int | None = None,
) -> Iterator:
    """Yields the axes (columns,), or (rows, columns), of a new figure and writes it to ``path``
    afterwards.

    ``size``: of each, inches. What has a label gets a legend.
    """
    with needs("plots", "matplotlib", "'directclr-fast[plot]'"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    drawing = Figure(figsize=(columns * size[0], (rows or 1) * size[1]), layout="constrained")
    FigureCanvasAgg(drawing)
    drawing.suptitle(title, fontsize="medium")
    grid = drawing.subplots(rows or 1, columns, squeeze=False)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    yield grid[0] if rows is None else grid
    for axes in grid.flat:
        if axes.get_legend_handles_labels()[1] and axes.get_legend() is None:
            axes.legend(fontsize="x-small")
    drawing.savefig(path, dpi=120)


@contextlib.contextmanager
def figure(path: str | Path, title: str = "", size: tuple[float, float] = (7.0, 4.2)) -> Iterator:
    """Yields axes of a new figure and writes it to ``path`` afterwards."""
    with panels(path, 1, title, size) as (axes,):
        yield axes


def curves(log: str | Path, path: str | Path, title: str = "") -> None:
    """Loss and online accuracy against the step, from a run's log.jsonl, as a picture."""
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    records = [line for line in lines if "loss" in line]
    steps = [record["step"] for record in records]
    with figure(path, title) as axes:
        loss = [float(record["loss"]) for record in records]
        (line,) = axes.plot(steps, loss, label="loss")
        axes.set(xlabel="step", ylabel="loss (nats)")
        other = axes.twinx()
        accuracy = [100 * float(record["accuracy"]) for record in records]
        (second,) = other.plot(steps, accuracy, color="tab:orange", label="online accuracy")
        other.set(ylabel="online linear head on training views, %", ylim=(0, 100))
        axes.legend(handles=[line, second], loc="center right")
