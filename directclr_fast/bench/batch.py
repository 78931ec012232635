"""What a large batch buys: one encoder, trained on the same number of images at several N.

    python -m directclr_fast.bench.batch --out batch.json

With the fast and the reference loss and several seeds, on one thread a run; AdamW, no warm-up, a
cosine to the last step, and a learning rate of the recipe's times sqrt(N / 256). Beyond --chunk
images a batch is encoded by chunks of that many, each normalised by its own statistics. Measured of
each run: a linear probe (25 epochs) of the test part, processor time an image, resident memory
above that of the process before. A run that memory does not hold is a result.

Every finished run is kept in the folder batch/ beside batch.json, and one that was stopped goes on
from its checkpoint, by the same command; --jobs 0 trains nothing. batch.png is drawn of what there
is after every run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from .. import plots
from ..paper import runs
from ..paper.runs import Run
from ..train import checkpoint
from ..train.config import TrainConfig
from ..train.supervise import TrainingStopped
from . import memory, study, timing

FLAGS = {
    "--rows": {"type": int, "nargs": "+", "default": [64, 256, 1024, 4096, 16384]},
    "--images": {"type": int, "default": 12 * 2**14, "help": "that a run sees"},
    "--seeds": {"type": int, "default": 3},
    "--losses": {"nargs": "+", "default": ["fast", "reference"]},
    "--data": {"default": "fashion-mnist"},
    "--amp": {"default": "bf16", "choices": ("none", "bf16")},
    "--chunk": {"type": int, "default": 4096},
    "--jobs": {"type": int, "default": 1, "help": "runs side by side"},
}


def execute(run: Run, settings: dict, out: Path, on_step: Callable[[dict], None]) -> dict:
    """`runs.execute` with what the run cost, or that it ran out of memory."""
    images, chunk, n = settings["images"], settings["chunk"], run.batch_size
    of_all = {k: v for k, v in settings.items() if k not in ("images", "chunk")}
    of_all |= {"steps": images // n}
    of_all |= {"chunk_size": chunk, "cache_bn": "chunk"} if n > chunk else {}
    seen = []

    def step(record: dict) -> None:
        seen.append((record["step"], time.process_time(), memory.status("VmHWM")))
        on_step(record)

    before = memory.reset_peak()
    try:
        result = runs.execute(run, of_all, out, step)
    except (MemoryError, RuntimeError) as error:
        if not timing.out_of_memory(error):
            raise
        result = {"run": asdict(run), "diverged": False, **timing.failure(error)}
    else:
        (first, begin, _), (last, end, peak) = seen[0], seen[-1]
        if last > first:
            result["cpu_seconds_per_image"] = (end - begin) / (last - first) / n
        result["peak_mib"] = (peak - before) / memory.MIB
    checkpoint.write_json(out / "runs" / f"{run.name}.json", result)
    return result


def measure(arguments: argparse.Namespace) -> Iterator[tuple[dict, str]]:
    """Each run, those that are there first; the figure after each."""
    if arguments.images % math.lcm(*arguments.rows):
        got = f"{arguments.images} with N of {arguments.rows}"
        raise ValueError(f"images: expected a multiple of every N, got {got}")
    out = Path(arguments.out or "runs/batch.json").with_suffix("")
    own = {"data": arguments.data, "amp": arguments.amp, "warmup_epochs": 0, "device": "cpu"}
    rate = TrainConfig(**own).resolve().learning_rate
    settings = {**own, "images": arguments.images, "chunk": arguments.chunk}
    out.joinpath("runs").mkdir(parents=True, exist_ok=True)
    runs.same_settings(out, settings)
    asked = [
        Run("directclr", seed, rate * math.sqrt(n / 256), loss=loss, batch_size=n)
        for seed in range(1, arguments.seeds + 1)
        for loss in arguments.losses
        for n in arguments.rows
    ]
    files = {run.name: out / "runs" / f"{run.name}.json" for run in asked}
    done = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    cases = []
    for part in _parts(asked, done, max(arguments.jobs, 1)):
        missing = [run for run in part if run.name not in done]
        if missing and arguments.jobs:
            show = (lambda name, step: None, lambda name, result: None)
            with memory.limited():
                known = lambda _, missing=missing: missing  # noqa: E731
                runs.side_by_side(known, done, arguments.jobs, settings, out, *show, execute)
        for run in part:
            if run.name in done:
                cases.append(_case(run, done[run.name], arguments.images))
                draw(cases, out.with_suffix(".png"))
                yield cases[-1], _words(cases[-1])
    print(table(cases))


def _parts(asked: list[Run], done: dict, jobs: int) -> Iterator[list[Run]]:
    there = [run for run in asked if run.name in done]
    left = [run for run in asked if run.name not in done]
    yield there
    for k in range(0, len(left), jobs):
        yield left[k : k + jobs]


def _case(run: Run, result: dict, images: int) -> dict:
    case = {"rows": run.batch_size, "loss": run.loss, "seed": run.seed}
    case |= {"learning_rate": run.learning_rate, "steps": images // run.batch_size}
    if "accuracy" in result:
        case["accuracy"] = result["accuracy"]["r"]
        case["last_loss"] = result["loss"][-1]
    names = ("failed", "out_of_memory", "diverged", "cpu_seconds_per_image", "peak_mib", "seconds")
    return case | {name: result[name] for name in names if name in result}


def _words(case: dict) -> str:
    how = f"N {case['rows']:>5}, {case['loss']}, seed {case['seed']}: "
    if "accuracy" not in case:
        return how + case.get("failed", "diverged")
    return how + (
        f"linear probe {100 * case['accuracy']['linear']:.1f} %, "
        f"{1e3 * case.get('cpu_seconds_per_image', math.nan):.2f} ms an image, "
        f"{case['peak_mib']:.0f} MiB"
    )


def _points(cases: list[dict]) -> dict[tuple[str, int], dict]:
    """By loss and N, the values of all seeds of each thing that was measured."""
    points: dict[tuple[str, int], dict] = {}
    for case in sorted(cases, key=lambda case: (case["loss"], case["rows"])):
        of = points.setdefault((case["loss"], case["rows"]), {"accuracy": [], "ms": [], "mib": []})
        if "accuracy" in case:
            of["accuracy"].append(100 * case["accuracy"]["linear"])
            of["mib"].append(case["peak_mib"])
        if "cpu_seconds_per_image" in case:
            of["ms"].append(1e3 * case["cpu_seconds_per_image"])
    return points


def table(cases: list[dict]) -> str:
    """Markdown: a row for each N and loss, means over the seeds; the accuracy's least and most."""
    rows = []
    for (loss, n), of in sorted(_points(cases).items(), key=lambda item: item[0][::-1]):
        seeds = len(of["accuracy"])
        cells = ["no memory, or diverged", "", ""]
        if seeds:
            low, high = min(of["accuracy"]), max(of["accuracy"])
            cells = [f"{statistics.mean(of['accuracy']):.1f} ({low:.1f} to {high:.1f})"]
            cells += [f"{statistics.mean(of['ms']):.2f}" if of["ms"] else ""]
            cells += [f"{statistics.mean(of['mib']):.0f}"]
        rows.append([n, loss, seeds, *cells])
    return plots.markdown(("N", "loss", "seeds", "linear probe, %", "ms an image", "MiB"), rows)


def draw(cases: list[dict], path: Path) -> None:
    """Probe, time and memory against N, a line for each loss."""
    named = {
        "accuracy": "linear probe, %",
        "ms": "processor time an image, ms",
        "mib": "resident memory, MiB",
    }
    with plots.panels(path, 3, size=(4.2, 3.6)) as row:
        for axes, (key, label) in zip(row, named.items()):
            for loss, mark in (("fast", "o-"), ("reference", "x--")):
                points = {n: of[key] for (which, n), of in _points(cases).items() if which == loss}
                points = {n: values for n, values in points.items() if values}
                middle = [statistics.mean(values) for values in points.values()]
                ends = [min(v) for v in points.values()], [max(v) for v in points.values()]
                if points:
                    axes.plot([*points], middle, mark, label=loss)
                    axes.vlines([*points], *ends, color=axes.lines[-1].get_color())
            axes.set_xscale("log", base=2)
            axes.set_xlabel("N")
            axes.set_ylabel(label)
        row[-1].set_yscale("log", base=2)
        row[0].legend()


if __name__ == "__main__":
    try:
        study.main(sys.modules[__name__])
    except TrainingStopped as stopped:
        sys.exit(f"{stopped}")
