"""The paper's comparison of projectors in small: every mode, several seeds, one command.

Each mode's learning rate is that of three which scores best, on a seed of its own, in a probe
inside the training part (probe.held_out). Then it is trained with each seed at that rate, and only
these runs are tested on the test part. docs/paper.md says what stands beside them.

Every finished run has a file of its own, so the same command continues a stopped comparison,
trainings from their checkpoints, and it may ask for more seeds or modes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..progress import Progress
from ..train import checkpoint, data, encoders
from ..train.config import MODES, TrainConfig, check_setting, resolve_device
from ..train.objective import default_dim
from . import report
from .runs import Run, same_settings, side_by_side

SEARCH_SEED = 0  # the seeds of the table are 1, 2, ...
FACTORS = (0.25, 1.0, 4.0)  # of the recipe's learning rate: the search
SHARES = (0.25, 0.5, 2.0, 4.0)  # of the default d0: the sweep, beside d0 itself and all columns
# What differs from the trainer's recipe of the set, so that all of it takes some 20 minutes on two
# cores, about 200 steps a run; on fashion-mnist, where it is meant to tell projectors apart, hours.
_SMALL = {
    "encoder": "small",
    "optimizer": "adamw",
    "batch_size": 128,
    "learning_rate": 2e-3,
    "weight_decay": 1e-4,
    "amp": "none",  # differences are held against one of rounding
}
BUDGETS = {
    "patches": {**_SMALL, "image_size": 24, "epochs": 5, "warmup_epochs": 1},
    "cifar10": {**_SMALL, "image_size": 24, "epochs": 1, "warmup_epochs": 0},
    "cifar100": {**_SMALL, "image_size": 24, "epochs": 1, "warmup_epochs": 0},
    "fashion-mnist": {
        **_SMALL,
        "encoder": "small-deep",
        "image_size": 20,
        "batch_size": 256,
        "learning_rate": 8e-3,
        "epochs": 2,
        "warmup_epochs": 0,
        "amp": None,  # the recipe's
    },
    "digits": {**_SMALL, "epochs": 20, "warmup_epochs": 2},
}
QUICK = {"epochs": 1, "warmup_epochs": 0}
SEEDS, FEW = {"fashion-mnist": 5}, 3  # of the table where not 3; at most so many beside the table
CUT = {"small-deep": "small-cut"}  # encoders by those whose last block has a shortcut to cut
# Settings of TrainConfig that a run has for itself, and those that do not change its result.
_OF_A_RUN = ("mode", "dim", "learning_rate", "loss", "seed", "checkpoint_dir", "name")
_FREE = ("data_root", "download", "device", "workers")


@dataclass(frozen=True)
class Plan:
    """``settings``: of every run, by the names of TrainConfig. ``dims``: d0 of the sweep, beside
    DirectCLR's own. ``losses``: whether a mode is trained with both losses; ``shortcut``: whether
    modes are trained without the last block's, too."""

    settings: dict
    modes: tuple[str, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    dims: tuple[int, ...]
    losses: bool = True
    shortcut: bool = True

    @property
    def few(self) -> tuple[int, ...]:
        """The seeds of what stands beside the table."""
        return self.seeds[:FEW]

    @property
    def agreement(self) -> str:
        """The mode that is trained with both losses."""
        return "directclr" if "directclr" in self.modes else self.modes[0]

    def search(self, mode: str) -> list[Run]:
        """The runs that choose the learning rate of a mode."""
        if len(self.rates) == 1:
            return []
        return [Run(mode, SEARCH_SEED, rate, search=True) for rate in self.rates]

    def chosen(self, mode: str, done: dict[str, dict]) -> float | None:
        """The learning rate of a mode, None before its search has ended. The lower of equals."""
        search = self.search(mode)
        if not search:
            return self.rates[0]
        if any(run.name not in done for run in search):
            return None
        return max(search, key=lambda run: done[run.name].get("held_out", -1.0)).learning_rate

    def table(self, mode: str, rate: float) -> list[Run]:
        """The runs of a mode's row; the first is looked at on the way."""
        how = {"keep": self.losses and mode == self.agreement}
        return [Run(mode, s, rate, watch=s == self.seeds[0], **how) for s in self.seeds]

    def sweep(self, rate: float) -> list[Run]:
        return [Run("directclr", seed, rate, dim) for dim in self.dims for seed in self.few]

    def cut(self, mode: str, rate: float) -> list[Run]:
        """A mode without the last block's shortcut; of an encoder that has one, the modes that the
        paper's argument is about."""
        encoder = CUT.get(self.settings["encoder"])
        if encoder is None or not self.shortcut or mode not in ("directclr", "baseline"):
            return []
        return [Run(mode, seed, rate, encoder=encoder) for seed in self.few]

    def again(self, rate: float) -> list[Run]:
        """The runs that the loss backends' agreement is read from, beside the mode's own."""
        common = {"learning_rate": rate, "keep": True}
        return [
            Run(self.agreement, seed, **common, **how)
            for how in ({"loss": "reference"}, {"rounded": True})
            for seed in self.few
            if self.losses
        ]

    def runs(self, rates: dict[str, float]) -> list[Run]:
        """Every run: the search and, of modes whose learning rate is known, the table, the rest."""
        runs = [run for mode in self.modes for run in self.search(mode)]
        runs += [run for mode, rate in rates.items() for run in self.table(mode, rate)]
        runs += [Run(mode, s) for mode in ("untrained", "pixels") for s in self.few]
        if self.agreement in rates:
            runs += self.again(rates[self.agreement])
        runs += [run for mode, rate in rates.items() for run in self.cut(mode, rate)]
        return runs + (self.sweep(rates["directclr"]) if "directclr" in rates else [])

    def known(self, done: dict[str, dict]) -> list[Run]:
        """Every run whose settings are decided by what is done."""
        rates = {mode: self.chosen(mode, done) for mode in self.modes}
        return self.runs({mode: rate for mode, rate in rates.items() if rate is not None})

    @property
    def trainings(self) -> int:
        """How many trainings there will be."""
        return sum(run.trains for run in self.runs(dict.fromkeys(self.modes, 0.0)))


def plan(
    *,
    data_spec: str | None = None,
    modes: Sequence[str] | None = None,
    seeds: int | None = None,
    quick: bool = False,
    rates: Sequence[float] | None = None,
    dims: Sequence[int] | None = None,
    **settings,
) -> Plan:
    """The comparison on a set: ``settings`` by the names of TrainConfig go over the set's budget.

    ``data_spec`` None is CIFAR-10 where it is there or may be downloaded, otherwise the patches.
    ``seeds`` None is 5 on fashion-mnist, otherwise 3. ``quick``: DirectCLR and no projector, three
    seeds, one epoch at the recipe's learning rate, and nothing beside them.
    """
    modes = modes or (("directclr", "baseline") if quick else MODES)
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ValueError(f"modes: expected some of {', '.join(MODES)}, got {unknown[0]!r}")
    if len(set(modes)) < len(modes):
        raise ValueError(f"modes: expected each once, got {','.join(modes)}")
    if seeds is not None:
        check_setting("seeds", seeds, low=1)
    given = {k: v for k, v in settings.items() if v is not None}
    spec = data_spec or _present(given.get("data_root"), bool(given.get("download")))
    budget = dict(BUDGETS.get(spec, {}))
    if resolve_device(given.get("device", "auto")) != "cpu" and spec.startswith("cifar"):
        budget = {"epochs": 20}  # the trainer's recipe, a tenth as long
    config = TrainConfig(data=spec, **{**budget, **(QUICK if quick else {}), **given}).resolve()
    settings = {k: getattr(config, k) for k in config.to_dict() if k not in _OF_A_RUN}
    if rates is None:
        rates = [factor * config.learning_rate for factor in ((1.0,) if quick else FACTORS)]
    width = encoders.build(config.encoder, image_size=config.image_size).width
    if dims is None:
        dims = [round(share * default_dim(width)) for share in SHARES if not quick]
    if wrong := [dim for dim in dims if not 0 < dim <= width]:
        raise ValueError(f"dims: expected 1 to {width} (the encoder's width), got {wrong[0]}")
    # DirectCLR first: most runs wait for its learning rate.
    modes = sorted(modes, key=lambda mode: (mode != "directclr", MODES.index(mode)))
    seeds = tuple(range(1, 1 + (seeds or (3 if quick else SEEDS.get(spec, 3)))))
    more = {"losses": spec not in SEEDS and not quick, "shortcut": not quick}
    return Plan(settings, tuple(modes), seeds, tuple(rates), tuple(dims), **more)


def _present(root: str | None, download: bool) -> str:
    """CIFAR-10 where it can be had, otherwise the patches."""
    try:
        data.load("cifar10", root=root, train=False, download=download)
        return "cifar10"
    except (FileNotFoundError, ImportError):
        return "patches"


def run(out: str | Path, plan: Plan, *, jobs: int | None = None, progress: bool = True) -> dict:
    """Trains what is not done yet, writes the report into ``out`` and returns its numbers.

    ``jobs``: processes; None is one for each core, on a GPU one. Raises TrainingStopped after
    SIGTERM or Ctrl-C, with everything kept that the same call needs to continue.
    """
    settings = plan.settings
    on_cpu = resolve_device(settings["device"]) == "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if jobs is None:
        jobs = cores if on_cpu else 1
    check_setting("jobs", jobs, low=1)
    out = checkpoint.writable("out", out)
    same_settings(out, {k: v for k, v in settings.items() if k not in _FREE})
    # Downloads here, not in several processes at a time.
    images = TrainConfig(seed=SEARCH_SEED, **settings).images(True, settings["download"])
    settings["download"] = False
    done = _finished(out, plan)
    steps = settings["epochs"] * (len(images) // settings["batch_size"])
    steps = min(steps, settings["max_steps"] or steps)
    with _Shown(progress, plan, done, steps) as show:
        side_by_side(plan.known, done, jobs, settings, out, show.steps, show.finished)
    shutil.rmtree(out / "work", ignore_errors=True)
    numbers = report.summary(plan, done, out / "weights", steps)
    # Of all runs one after another: they may have been made by several calls.
    numbers["seconds"] = round(sum(result["seconds"] for result in done.values()))
    report.write(numbers, out)
    return numbers


def _finished(out: Path, plan: Plan) -> dict[str, dict]:
    """Results by name of the runs that need not be repeated."""
    done: dict[str, dict] = {}
    while True:  # results of the search decide which others belong to the plan
        before = len(done)
        for known in plan.known(done):
            path = out / "runs" / f"{known.name}.json"
            whole = not known.keep or (out / "weights" / f"{known.name}.pt").exists()
            if known.name not in done and path.exists():
                result = json.loads(path.read_text())
                if whole or result["diverged"]:
                    done[known.name] = result
        if len(done) == before:
            return done


class _Shown(Progress):
    """The steps of all trainings; elsewhere than on a terminal a line for each run."""

    def __init__(self, show: bool, plan: Plan, done: dict, each: int) -> None:
        self.each, self.done = each, len(done)
        self.runs = plan.trainings + 2 * len(plan.few)
        self.before = each * sum(Run(**result["run"]).trains for result in done.values())
        self.now: dict[str, int] = {}  # steps by name of a run of this call
        self.begin = time.monotonic()
        banner = (
            f"{self.runs} runs, {plan.trainings} of them trainings of {each} steps on "
            f"{plan.settings['data']}; done: {self.done}"
        )
        super().__init__(each * plan.trainings, self.before, show=show, banner=banner)

    def steps(self, name: str, step: int) -> None:
        """A run has come to ``step``."""
        self.now[name] = step
        self.to(self.before + sum(self.now.values()), name)

    def finished(self, name: str, result: dict) -> None:
        """A run has ended."""
        self.done += 1
        if Run(**result["run"]).trains:
            self.steps(name, self.each)
        if result["diverged"]:
            text = "diverged"
        elif "held_out" in result:
            text = f"inside the training part {100 * result['held_out']:.1f} %"
        else:
            text = f"linear probe {100 * result['accuracy']['r']['linear']:.1f} %"
        if taken := sum(self.now.values()):
            steps = self.total - self.before - taken
            left = steps * (time.monotonic() - self.begin) / taken
            text += f"  ({left / 60:.0f} min left)" if left > 90 else f"  ({left:.0f} s left)"
        self.say(f"{self.done:>4}/{self.runs}  {name}: {text}")
