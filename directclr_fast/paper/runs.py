"""One training of a comparison and what is measured of it, as a small JSON; many side by side.

A run is named by what sets it apart from the others of its comparison; everything else they share
(:class:`~directclr_fast.paper.compare.Plan`). It resumes from its checkpoint where it was stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..train import checkpoint, probe, supervise
from ..train.config import TrainConfig
from ..train.loop import Model, Trainer, TrainingDiverged
from ..train.objective import default_dim
from ..train.supervise import Signals, TrainingStopped
from . import mechanism, spectrum

ROUNDING = 2.0**-23  # of fp32, relative
SMALL = 1e-4  # of the largest eigenvalue; counted beside the collapsed ones
EPOCHS, MANY, FEWER = 100, 20_000, 25  # the linear probe has FEWER epochs above MANY samples
REPORT_EVERY = 0.5  # seconds between two reports of a run's step to the process that started it


@dataclass(frozen=True)
class Run:
    """``mode`` is one of the trainer's, or "untrained" (the encoder as it starts) or "pixels".

    ``batch_size``, ``encoder`` None: that of all runs. ``search``: settings are on trial, so all is
    measured inside the training part (probe.held_out). ``rounded``: each initial weight is moved by
    at most one rounding error. ``keep``: the final weights are kept. ``watch``: it is looked at on
    the way (mechanism.py).
    """

    mode: str
    seed: int
    learning_rate: float = 0.0
    dim: int | None = None
    loss: str = "fast"
    search: bool = False
    rounded: bool = False
    keep: bool = False
    batch_size: int | None = None
    encoder: str | None = None
    watch: bool = False

    @property
    def trains(self) -> bool:
        return self.mode not in ("untrained", "pixels")

    @property
    def name(self) -> str:
        """Name of the run's files, unique in a comparison."""
        words = [self.mode, f"seed{self.seed}"]
        words += [f"rate{self.learning_rate:g}"] if self.trains else []
        words += [f"dim{self.dim}"] if self.dim is not None else []
        words += [f"batch{self.batch_size}"] if self.batch_size is not None else []
        words += [self.encoder] if self.encoder is not None else []
        words += [self.loss] if self.loss != "fast" else []
        words += [w for w in ("search", "rounded") if getattr(self, w)]
        return "-".join(words)


def same_settings(out: Path, now: dict) -> None:
    """Keeps the settings of all runs in ``out``; ValueError where older runs there had others."""
    path = out / "settings.json"
    if not path.exists():
        checkpoint.write_json(path, now, indent=1)
        return
    before = json.loads(path.read_text())
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{name}: expected {before.get(name)!r} as in the runs in {out}, "
                f"got {now.get(name)!r}; give another --out"
            )


def config_of(run: Run, settings: dict, work: Path) -> TrainConfig:
    """The resolved settings of a run: those of all runs, and what sets this one apart."""
    own = {"mode": run.mode, "dim": run.dim, "learning_rate": run.learning_rate, "loss": run.loss}
    also = {"batch_size": run.batch_size, "encoder": run.encoder}
    own |= {name: value for name, value in also.items() if value is not None}
    if not run.trains:
        own = {}
    folder = {"checkpoint_dir": str(work), "name": run.name}
    return TrainConfig(**{**settings, **own, **folder, "seed": run.seed}).resolve()


def execute(run: Run, settings: dict, out: Path, on_step: Callable[[dict], None]) -> dict:
    """Trains and measures; writes ``out/runs/<name>.json`` and returns what is in it.

    ``settings``: of every run, by the names of TrainConfig. ``on_step`` gets each line of the log.
    A run that diverges is a result. Raises TrainingStopped where a signal ended the training.
    """
    began = time.perf_counter()
    config = config_of(run, settings, out / "work")
    result = {"run": asdict(run), "diverged": False}
    if run.trains:
        folder = Path(config.checkpoint_dir) / config.name
        resume = checkpoint.exists(folder / "checkpoint.pt")
        trainer = Trainer(config, resume=resume, overwrite=not resume, progress=False)
        if run.rounded and trainer.step == 0:
            _round(trainer.model, run.seed)
        model, channels = trainer.model, trainer.channels
        try:
            trainer.run(on_step, _watched(config, folder / "trace.json") if run.watch else None)
        except TrainingDiverged as error:
            result |= {"diverged": True, "why": str(error).partition(";")[0]}
        lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        result["loss"] = [line["loss"] for line in lines if "loss" in line]  # text if not finite
        if run.watch:
            result["trace"] = json.loads((folder / "trace.json").read_text())
    else:
        images = config.images(False)
        channels = images.shape[0]
        model = Model(config, channels, images.num_classes).to(config.device)
    if not result["diverged"]:
        encoder = None if run.mode == "pixels" else model.eval().encoder
        result |= _measure(run, config, model, encoder, channels)
        if run.keep:
            checkpoint.save(out / "weights" / f"{run.name}.pt", {"model": model.state_dict()})
    result["seconds"] = round(time.perf_counter() - began, 2)
    (out / "runs").mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(out / "runs" / f"{run.name}.json", result)
    if run.trains:
        shutil.rmtree(folder)
    return result


def _watched(config: TrainConfig, path: Path) -> Callable[[Trainer], None]:
    """What looks at a trainer where it is due, and keeps what it saw at ``path``: a run that goes
    on comes to the same places with the same weights."""
    trace = json.loads(path.read_text()) if path.exists() else []
    seen = {look["step"] for look in trace}

    def look(trainer: Trainer) -> None:
        end = min(trainer.total_steps, config.max_steps or trainer.total_steps)
        if trainer.step in mechanism.steps(end) and trainer.step not in seen:
            if seen_now := mechanism.look(trainer.model, config):
                trace.append({"step": trainer.step, **seen_now})
            checkpoint.write_json(path, trace)

    return look


def side_by_side(
    known: Callable[[dict], list[Run]],
    done: dict[str, dict],
    jobs: int,
    settings: dict,
    out: Path,
    on_step: Callable[[str, int], None],
    on_result: Callable[[str, dict], None],
    how: Callable[..., dict] | None = None,
) -> None:
    """Executes in ``jobs`` processes what ``known(done)`` asks for, until ``done`` has it all.

    ``done``: results by name of the run; each joins when its run ends and may make more known.
    ``settings``, ``out``: as for :func:`execute`. ``on_step(name, step)`` is called now and then
    with a run's step, ``on_result(name, result)`` at the end of each run. ``how``: a function of a
    module in the place of :func:`execute`.

    A process has one thread, so no result depends on how many there are. RuntimeError names a run
    that failed. A signal is passed on to the runs, which save, and raises TrainingStopped; a second
    Ctrl-C ends them at once.
    """
    context = multiprocessing.get_context("spawn")
    steps = context.SimpleQueue()
    others = set(multiprocessing.active_children())
    running: dict[Future, str] = {}

    def end(how: str) -> None:
        for process in set(multiprocessing.active_children()) - others:
            getattr(process, how)()

    with Signals() as signals:
        try:
            with ProcessPoolExecutor(jobs, context, _begin, (steps,)) as pool:
                try:
                    while True:
                        for run in known(done):
                            if len(running) < jobs and run.name not in {*done, *running.values()}:
                                running[pool.submit(_in_pool, run, settings, out, how)] = run.name
                        if not running:
                            break
                        ended, _ = wait(running, 0.2, FIRST_COMPLETED)
                        if signals.caught:
                            raise TrainingStopped(
                                f"stopped by {signals.caught}; what is done is kept, "
                                "the same command continues"
                            )
                        while not steps.empty():
                            on_step(*steps.get())
                        for future in [f for f in running if f in ended]:
                            name = running.pop(future)
                            done[name] = _result(future, [name, *running.values()])
                            on_result(name, done[name])
                except BaseException:
                    end("terminate")
                    raise
        finally:
            end("kill")  # only after a second Ctrl-C is one left


def _result(future: Future, names: list[str]) -> dict:
    """The result of run ``names[0]``; the other names are the runs beside it when it ended."""
    try:
        return future.result()
    except BrokenProcessPool:
        runs, got = " or ".join(names), "its process ended"
    except RuntimeError as error:
        runs, got = names[0], error
    raise RuntimeError(f"run {runs}: expected its result, got {got}")


def _begin(steps) -> None:
    """What a process of the pool does first."""
    global _steps
    _steps = steps
    supervise.follow_parent()
    # Ctrl-C reaches every process of the terminal; the parent passes it on as SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _in_pool(run: Run, settings: dict, out: Path, how: Callable[..., dict] | None) -> dict:
    reported = 0.0

    def on_step(record: dict) -> None:
        nonlocal reported
        if time.monotonic() - reported > REPORT_EVERY:
            reported = time.monotonic()
            _steps.put((run.name, record["step"]))

    try:
        return (how or execute)(run, settings, out, on_step)
    except TrainingStopped:
        os._exit(supervise.STOPPED)  # a process that returned would wait for another run
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from None  # can always be sent


def _round(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        step = torch.randint(-1, 2, p.shape, generator=generator)
        p.data *= 1 + ROUNDING * step.to(p)


def _measure(run: Run, config: TrainConfig, model, encoder, channels: int) -> dict:
    """Probes of r and r[:, :d0] and spectra; of a run with a batch size of its own the linear probe
    of r."""
    device = config.device
    if run.search:
        images = config.images(True)
        r, labels = probe.encode(encoder, images, config.image_size, device)
        features = probe.held_out(r, labels, images.num_classes)
    else:
        features = probe.load_features(encoder, config, channels)
    how = {"seed": run.seed, "device": device}
    how["epochs"] = EPOCHS if len(features.train) <= MANY else FEWER
    if run.batch_size is not None:
        return {"accuracy": {"r": {"linear": probe.linear_probe(features, **how)}}}
    result = {"accuracy": {"r": probe.scores(features, **how)}}
    if run.search:
        result["held_out"] = result["accuracy"]["r"]["linear"]
    if run.trains:
        spectra = spectrum.of_model(model, features.test)
    else:
        spectra = {"representation": spectrum.collapse_report(features.test)}
    if run.mode != "pixels":
        result["dim"] = run.dim or default_dim(model.width)
        part = features.columns(slice(0, result["dim"]))
        result["accuracy"]["sub-vector"] = probe.scores(part, **how)
    parts = [part for part in ("representation", "embedding") if part in spectra]
    result["spectra"] = {part: _short(spectra[part]) for part in parts}
    return result


def _short(report: spectrum.CollapseReport) -> dict:
    """A spectrum as log10 relative to its largest eigenvalue, to three digits."""
    names = ("dimensions", "samples", "collapsed", "effective_rank")
    same = {name: getattr(report, name) for name in names}
    small = spectrum.collapsed(torch.tensor(report.spectrum, dtype=torch.float64), SMALL)
    return {**same, "small": small, "log10": spectrum.logs(report.spectrum)}


def apart(a: Path, b: Path) -> float:
    """|a - b| / |b| of the encoder's weights and statistics in two kept files, as one vector."""

    def values(path: Path) -> Tensor:
        state = checkpoint.load(path)["model"]
        own = [v for k, v in state.items() if k.startswith("encoder.") and v.is_floating_point()]
        return torch.cat([v.double().flatten() for v in own])

    a, b = values(a), values(b)
    return ((a - b).norm() / b.norm()).item()
