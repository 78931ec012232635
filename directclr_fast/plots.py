"""The one place that touches matplotlib: a figure that opens without a screen and saves itself."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def figure(path: str | Path, title: str = "", size: tuple[float, float] = (7.0, 4.2)) -> Iterator:
    """Yields axes of a new figure and writes it to ``path`` afterwards."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"plots: expected matplotlib, got {error}; "
            "install it with: pip install 'directclr-fast[plot]'"
        ) from error
    drawing = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.add_subplot()
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize="medium")
    yield axes
    drawing.savefig(path, dpi=120)


def curves(log: str | Path, path: str | Path, title: str = "") -> None:
    """Loss and online accuracy against the step, from a run's log.jsonl, as a picture."""
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    records = [line for line in lines if "loss" in line]
    steps = [record["step"] for record in records]
    with figure(path, title) as axes:
        loss = [float(record["loss"]) for record in records]
        (line,) = axes.plot(steps, loss, label="loss")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats)")
        other = axes.twinx()
        accuracy = [100 * float(record["accuracy"]) for record in records]
        (second,) = other.plot(steps, accuracy, color="tab:orange", label="online accuracy")
        other.set_ylabel("online linear head on training views, %")
        other.set_ylim(0, 100)
        axes.legend(handles=[line, second], loc="center right")
