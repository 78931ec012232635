"""Device time of every launch of a GPU step: which kernel the time is in, at what rate.

Each launch of a backend runs between two events, with the L2 cache overwritten before a step; the
medians of ``--rounds`` steps are shown. Host time between launches is not in them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator

import torch

from .. import dispatch, driver
from ..backends import hopper
from ..backends.packed import Packed
from ..problem import Problem
from ..world import ALONE
from . import study
from .timing import FLUSH_BYTES
from .variants import Case

FLAGS = {
    "--rows": {"type": int, "nargs": "+", "default": [4096, 32768]},
    "--dim": {"type": int, "nargs": "+", "default": [128, 256, 360, 768]},
    "--backend": {"nargs": "+", "default": ["cuda", "triton"]},
    "--precision": {"default": "fp16"},
    "--rounds": {"type": int, "default": 20},
    "--schedules": {
        "action": "store_true",
        "help": "cuda with a tile for each warpgroup (ping-pong) and with one for both, whatever d",
    },
    "--device": {"default": "cuda", "help": "cpu: a rehearsal, kernels interpreted, no times"},
}
PRODUCTS = {"sums": 1, "weights": 1, "product": 2}  # of 2 M N d operations, in a step


class Spans:
    """A backend's launchers; each call is a span of device time."""

    def __init__(self, kernels, timed: bool) -> None:
        self.kernels, self.timed, self.spans = kernels, timed, []

    def __getattr__(self, name: str):
        function = getattr(self.kernels, name)
        if not callable(function) or name in ("lines", "combine_blocks"):
            return function

        def launch(*args, **options):
            first, last = (self._event() for _ in range(2))
            result = function(*args, **options)
            if self.timed:
                last.record()
            self.spans.append((name, first, last))
            return result

        return launch

    def _event(self):
        if not self.timed:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def taken(self) -> dict[str, float]:
        """Milliseconds by launch since the last call; 0 in a rehearsal."""
        total = defaultdict(float)
        if self.timed:
            torch.cuda.synchronize()
        for name, first, last in self.spans:
            total[name] += first.elapsed_time(last) if self.timed else 0.0
        self.spans.clear()
        return dict(total)


def step_of(backend: Packed, problem: Problem):
    """(function that does one step, its Spans)."""
    shape = (problem.rows, problem.width)
    r1, r2 = (torch.randn(shape, device=problem.device_type) for _ in range(2))
    upstream = torch.ones((), device=problem.device_type)
    spans = Spans(backend.kernels, problem.device_type == "cuda")
    scale, need = 1 / problem.temperature, (True, True, False)

    @torch.no_grad()
    def step():
        backend.kernels, before = spans, backend.kernels
        try:
            _, states, _ = driver.forward(backend, problem, ALONE, r1, r2, None, scale)
            driver.backward(backend, problem, ALONE, upstream, states, None, scale, need)
        finally:
            backend.kernels = before

    return step, spans


def medians(backend: Packed, problem: Problem, rounds: int) -> dict[str, float]:
    """Milliseconds of each launch of a step, the L2 cache overwritten before it."""
    device = problem.device_type
    step, spans = step_of(backend, problem)
    flush = torch.empty(FLUSH_BYTES if device == "cuda" else 1, device=device).byte()
    taken = defaultdict(list)
    for turn in range(3 + rounds):
        flush.zero_()
        step()
        for launch, ms in spans.taken().items():
            taken[launch] += [ms] * (turn >= 3)  # warm-up, and kernels are compiled
    return {launch: statistics.median(ms or [0.0]) for launch, ms in taken.items()}


def rate(launch: str, problem: Problem, ms: float) -> float:
    """TFLOP/s of a launch that multiplies; 0 where nothing was timed."""
    operations = 2.0 * PRODUCTS[launch] * problem.rows * problem.candidates * problem.dim
    return operations / ms / 1e9 if ms else 0.0


def measure(arguments: argparse.Namespace) -> Iterator[tuple[dict, str]]:
    """Every backend at every size; one that cannot run is a case with its reasons."""
    device, usual = arguments.device, hopper.PINGPONG_PITCH
    schedules = {"cooperative": 0, "ping-pong": 2**30} if arguments.schedules else {"": usual}
    for rows, dim, name in itertools.product(arguments.rows, arguments.dim, arguments.backend):
        problem = Case(rows, dim, dim, device=device).problem(arguments.precision)
        problem = problem.replace(backend=name)
        for schedule, pitch in schedules.items() if name == "cuda" else [("", usual)]:
            hopper.PINGPONG_PITCH = pitch
            try:
                yield _case(problem, schedule, arguments.rounds)
            finally:
                hopper.PINGPONG_PITCH = usual


def _case(problem: Problem, schedule: str, rounds: int) -> tuple[dict, str]:
    name, rows, dim, precision = problem.backend, problem.rows, problem.dim, problem.precision
    case = {"rows": rows, "dim": dim, "backend": name, "precision": precision}
    case |= {"schedule": schedule} if schedule else {}
    title = ", ".join(filter(None, (name, f"N = {rows}", f"d = {dim}", precision, schedule)))
    if reasons := dispatch.load(name).why_not(problem):
        return case | {"why_not": reasons}, f"{title}: {'; '.join(reasons)}"
    of_launch = medians(dispatch.load(name), problem, rounds)
    both = sum(of_launch.values())
    whole = sum(rate(launch, problem, both) for launch in PRODUCTS)
    lines = [f"{title}: {both:.3f} ms, {whole:.0f} TFLOP/s at 8c"]
    for launch, ms in of_launch.items():
        share = ""
        if launch in PRODUCTS:
            share = f"  {rate(launch, problem, ms):7.0f} TFLOP/s"
        lines.append(f"  {launch:16} {ms:9.3f} ms{share}")
    return case | {"ms": of_launch, "total_ms": both}, "\n".join(lines)


study.as_script(__name__)
