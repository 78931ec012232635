"""Runs the grid: every case, every variant, checks before times; one result as plain values.

A result is {"format", "machine", "command", "settings", "ceilings", "cases"}; a case carries its
fields, the ceilings of its own size, and a row for each variant: either its figures ("median",
"quartiles", "seconds" by round, "rate" in operations/s counting 8 N^2 d, its share "of_roof" and
"of_library", "peak_mib", "error" of the gradient and "value_error" of the loss against fp64) or why
there are none ("why_not", "failed").
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable

import torch

from .. import machine
from ..loss import fast_directclr_loss
from ..testing import evaluate, relative_error
from . import ceilings, memory, timing, variants
from .variants import ALLOWED, Case, Variant

FORMAT = 2
CHECKED_ROWS = 1024  # a size that grids hold, so that nothing is compiled for the check alone
SHORT = 1e-3  # seconds; a step below is timed with a backlog too, on a GPU


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured: the product of sizes, and how long.

    ``dtype`` None takes bfloat16 on a GPU and float32 elsewhere. ``both_rows``: sizes also measured
    with negatives "both", next to ``negatives``. ``names``: variants wanted, None for all.
    ``budget``: seconds of rounds for each case, None for all ``rounds``.
    """

    rows: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    dims: tuple[int, ...] = (360,)
    width: int = 2048
    negatives: str = "cross"
    both_rows: tuple[int, ...] = (128, 1024)
    dtype: str | None = None
    device: str = "auto"
    precisions: tuple[str, ...] | None = None
    names: tuple[str, ...] | None = None
    rounds: int = 7
    budget: float | None = None
    memory: bool = True

    def resolved(self) -> Settings:
        """With the device and dtype of this machine. ValueError for what cannot be."""
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in ("cpu", "cuda"):
            raise ValueError(f"device: expected auto, cpu or cuda, got {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: expected one of this machine, got 'cuda'")
        dtype = self.dtype or ("bfloat16" if device == "cuda" else "float32")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype!r}")
        for name, least in (("rows", 2), ("dims", 1), ("both_rows", 2)):
            for value in getattr(self, name):
                if value < least:
                    raise ValueError(f"{name}: expected at least {least}, got {value}")
        if not self.rows or not self.dims:
            raise ValueError("rows: expected at least one size, got none")
        if self.rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {self.rounds}")
        if self.negatives not in ("cross", "both"):
            raise ValueError(f"negatives: expected 'cross' or 'both', got {self.negatives!r}")
        return dataclasses.replace(self, device=device, dtype=dtype)

    def cases(self) -> list[Case]:
        """The grid, small sizes first."""
        found = []
        pairs = [(self.negatives, self.rows)]
        if self.negatives == "cross":
            pairs.append(("both", self.both_rows))
        for negatives, sizes in pairs:
            for dim in self.dims:
                for rows in sizes:
                    width = max(self.width, dim)
                    found.append(Case(rows, width, dim, self.dtype, self.device, negatives))
        return found

    def catalogue(self, case: Case) -> list[Variant]:
        """The variants wanted for a case. ValueError for a name that none has."""
        found = variants.catalogue(case, self.precisions)
        if self.names is None:
            return found
        known = {v.name for v in found}
        if unknown := [name for name in self.names if name not in known]:
            raise ValueError(
                f"variants: expected names of {', '.join(sorted(known))}, got {', '.join(unknown)}"
            )
        return [v for v in found if v.name in self.names]


QUICK = Settings(rows=(256, 1024, 4096), both_rows=(128, 1024), rounds=5, budget=8.0)


def run(
    settings: Settings,
    progress: Callable[[str, float], None] = lambda text, share: None,
    save: Callable[[dict], None] = lambda result: None,
    command: Iterable[str] | None = None,
) -> dict:
    """Measures the grid. ``progress``(what is being done, share done) is called all along;
    ``save``(result so far) after every case."""
    settings = settings.resolved()
    cases = settings.cases()
    plans = [settings.catalogue(case) for case in cases]
    result = {
        "format": FORMAT,
        "machine": machine.machine(),
        "command": list(sys.argv if command is None else command),
        "settings": dataclasses.asdict(settings),
        "ceilings": {},
        "cases": [],
    }
    progress("ceilings", 0.0)
    result["ceilings"] = ceilings.of_machine(settings.device)
    rows = [{v.name: _row(v, v.why_not(case)) for v in plan} for case, plan in zip(cases, plans)]
    share = _Share(cases, rows, settings.memory and settings.device == "cpu")
    if share.memory:
        _peaks(cases, rows, lambda text: progress(text, share.peaked()))
    checked: dict[tuple, dict] = {}
    for number, (case, plan) in enumerate(zip(cases, plans)):
        text = f"N {case.rows}, d {case.dim}, {case.negatives}"

        def tick(name: str, text=text, number=number) -> None:
            progress(f"{text}: {name}", share.of(number))

        tick("checks")
        found = _measure(case, plan, rows[number], settings, checked, result["ceilings"], tick)
        result["cases"].append(found)
        share.done(number)
        save(result)
    progress("done", 1.0)
    return result


def _row(variant: Variant, reasons: list[str]) -> dict:
    row = {"family": variant.family, "precision": variant.precision}
    return {**row, "why_not": reasons} if reasons else row


class _Share:
    """The share of the work that is done, by a guess of what each part costs."""

    def __init__(self, cases: list[Case], rows: list[dict], with_memory: bool) -> None:
        self.memory = with_memory
        self.costs = [2e9 + case.work for case in cases]  # a fixed part for checks and compilers
        self.total = sum(self.costs) * (1.3 if with_memory else 1.0)
        self.before = 0.0
        self.jobs = max(1, sum("why_not" not in row for found in rows for row in found.values()))

    def peaked(self) -> float:
        self.before += 0.3 / 1.3 * self.total / self.jobs
        return min(1.0, self.before / self.total)

    def of(self, number: int) -> float:
        return min(1.0, (self.before + self.costs[number] / 2) / self.total)

    def done(self, number: int) -> None:
        self.before += self.costs[number]


def _peaks(cases: list[Case], rows: list[dict], tick: Callable[[str], None]) -> None:
    """Writes the peak of every variant that can run into its row; Linux, CPU."""
    if not memory.supported():
        return
    places = [
        (number, name)
        for number, found in enumerate(rows)
        for name, row in found.items()
        if "why_not" not in row
    ]

    def keep(job: int, found: dict) -> None:
        number, name = places[job]
        rows[number][name].update(found)
        tick(f"memory: N {cases[number].rows}, {name}")

    tick("memory")
    memory.in_processes([(cases[number], name) for number, name in places], keep)


def _measure(
    case: Case,
    plan: list[Variant],
    rows: dict[str, dict],
    settings: Settings,
    checked: dict[tuple, dict],
    of_machine: dict[str, float],
    tick: Callable[[str], None],
) -> dict:
    """The record of one case; ``rows`` says who cannot run and, on the CPU, what each needs."""
    torch._dynamo.reset()
    device = case.device
    functions = {}
    with memory.limited() if device == "cpu" else contextlib.nullcontext():
        for variant in plan:
            row = rows[variant.name]
            if "why_not" in row or "failed" in row:
                continue
            tick(f"check of {variant.name}")
            try:
                function = variant.build(case)
                if variant.family != "neighbour":
                    row.update(_check(case, variant, function, checked))
            except Exception as error:
                row.update(timing.failure(error))
            if "failed" not in row:
                functions[variant.name] = function
        r1, r2 = (r.requires_grad_() for r in case.views(seed=2))
        values: dict[str, torch.Tensor] = {}

        def step(name: str) -> None:
            r1.grad = r2.grad = None
            loss = functions[name](r1, r2)
            loss.backward()
            values[name] = loss.detach()

        before = _fma(device)
        calls = {name: lambda name=name: step(name) for name in functions}
        found = timing.interleaved(
            calls,
            settings.rounds,
            device=device,
            warm_seconds=0.2,
            budget=settings.budget,
            after=tick,
        )
        after = _fma(device)
        if device == "cuda":
            _device_only(calls, found, rows, settings.rounds)
        r1.grad = r2.grad = None
    own = _own_ceilings(case, {v.precision for v in plan if v.name in functions})
    if before and after:
        own["fma fp32"] = (before + after) / 2
    precisions = {v.name: v.precision for v in plan}
    for name, row in found.items():
        row = rows[name] | row
        if "median" in row:
            row["loss"] = float(values[name])
            row["rate"] = case.work / row["median"]
            roof = ceilings.roof({**of_machine, **own}, precisions[name])
            row["of_roof"] = row["rate"] / roof if roof else None
            products = own.get(f"products {ceilings.unit_of(precisions[name])}")
            row["of_library"] = row["rate"] / products if products else None
        rows[name] = row
    _disqualify(rows, {v.name: v for v in plan})
    return {**dataclasses.asdict(case), "work": case.work, "ceilings": own, "variants": rows}


def _fma(device: str) -> float | None:
    return ceilings.fma_peak(5) if device == "cpu" else None


def _own_ceilings(case: Case, precisions: set[str]) -> dict[str, float]:
    """The library's rates at this case's N and d."""
    found = {}
    for unit in sorted({ceilings.unit_of(p) for p in precisions}):
        if case.device == "cpu" and unit not in ceilings.PRECISIONS["cpu"]:
            continue
        try:
            rate = ceilings.products_rate(unit, case.rows, case.dim, case.device, rounds=3)
        except Exception as error:
            if not timing.out_of_memory(error):
                raise
            continue
        if rate is not None:
            found[f"products {unit}"] = rate
    return found


def _device_only(calls: dict, found: dict, rows: dict, rounds: int) -> None:
    """GPU: peaks, and the time of short steps without the gaps between their launches."""
    for name, call in calls.items():
        if "median" not in found[name]:
            continue
        try:
            rows[name]["peak_mib"] = round(memory.on_device(call), 2)
        except Exception as error:
            found[name] = timing.failure(error)
            continue
        if found[name]["median"] < SHORT:
            alone = timing.interleaved({name: call}, rounds, device="cuda", backlog=True)[name]
            found[name]["device_median"] = alone.get("median")


def _check(case: Case, variant: Variant, function, checked: dict[tuple, dict]) -> dict:
    """Errors of loss and gradients against the reference in fp64, on fewer rows of the same kind;
    a failure where they are not those of the same loss."""
    rows = min(case.rows, CHECKED_ROWS)
    key = (variant.name, rows, case.width, case.dim, case.dtype, case.negatives)
    if key not in checked:
        checked[key] = errors(case, function, rows, copies=variant.family in ("ours", "plain"))
    found = checked[key]
    worst = max(found["error"], found["value_error"])
    if not worst < ALLOWED[variant.precision]:
        text = f"not the same loss: off by {worst:.1e}, allowed {ALLOWED[variant.precision]:.0e}"
        return {**found, "failed": text, "out_of_memory": False}
    return found


def errors(case: Case, function, rows: int, seed: int = 1, copies: bool = False) -> dict:
    """{"error", "value_error"}: relative errors of the gradient of both views and of the loss.

    ``copies``: for half inputs, "error_fp32" too, that of the gradient for fp32 copies of the same
    values, which the rounding of the gradient itself does not hide. For functions whose products
    have the same precision either way.
    """
    r1, r2 = case.views(rows, seed)
    options = {"negatives": case.negatives, "temperature": case.temperature}
    truth = evaluate(
        fast_directclr_loss, r1.double(), r2.double(), case.dim, backend="reference", **options
    )
    truth_grad = torch.cat([truth.dr1, truth.dr2])

    def of(a, b) -> tuple[float, float]:
        got = evaluate(lambda x, y, **_: function(x, y), a, b)
        grad = torch.cat([got.dr1, got.dr2])
        return relative_error(grad, truth_grad), relative_error(got.loss, truth.loss)

    gradient, value = of(r1, r2)
    found = {"error": gradient, "value_error": value}
    if copies and case.dtype != "float32":
        found["error_fp32"] = of(r1.float(), r2.float())[0]
    return found


def _disqualify(rows: dict[str, dict], plan: dict[str, Variant]) -> None:
    """Removes the time of a variant whose loss at full size disagrees with the rest."""
    timed = {n: r for n, r in rows.items() if "loss" in r and plan[n].family != "neighbour"}
    if len(timed) < 2:
        return
    middle = float(torch.tensor([r["loss"] for r in timed.values()], dtype=torch.float64).median())
    for name, row in timed.items():
        off = abs(row["loss"] - middle) / max(abs(middle), 1e-30)
        if not off < ALLOWED[plan[name].precision]:
            for key in ("median", "quartiles", "seconds", "rate", "of_roof", "of_library"):
                row.pop(key, None)
            row["failed"] = f"not the loss of the others at this size: off by {off:.1e}"
            row["out_of_memory"] = False
