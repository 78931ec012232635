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
import statistics
import sys
from collections.abc import Callable, Iterable

import torch

from .. import machine
from ..loss import fast_directclr_loss
from ..testing import evaluate, relative_error
from . import ceilings, memory, timing
from .settings import Settings
from .variants import ALLOWED, Case, Variant

FORMAT = 2
CHECKED_ROWS = 1024  # a size that grids hold, so that nothing is compiled for the check alone
SHORT = 1e-3  # seconds; a step below is timed with a backlog too, on a GPU


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
    progress("ceilings", 0.0)
    result = {
        "format": FORMAT,
        "machine": machine.machine(),
        "command": list(sys.argv if command is None else command),
        "settings": dataclasses.asdict(settings),
        "ceilings": ceilings.measure(settings.device),
        "cases": [],
    }
    rows = []
    for case, plan in zip(cases, plans):
        rows.append({v.name: {"family": v.family, "precision": v.precision} for v in plan})
        reasons = {v.name: v.why_not(case) for v in plan}
        for name in filter(reasons.get, reasons):
            rows[-1][name]["why_not"] = reasons[name]
    # The share of the work that is done is guessed: peaks are a quarter, where there are any; a
    # case costs its operations and a fixed part for checks and compilers.
    begin = 0.0
    if settings.memory and settings.device == "cpu" and memory.supported():
        begin = 0.25
        _peaks(cases, rows, lambda text, share: progress(text, begin * share))
    costs = [2e9 + case.work for case in cases]
    checked: dict[tuple, dict] = {}
    for number, (case, plan) in enumerate(zip(cases, plans)):
        share = begin + (1 - begin) * (sum(costs[:number]) + costs[number] / 2) / sum(costs)

        def tick(name: str, case=case, share=share) -> None:
            progress(f"N {case.rows}, d {case.dim}, {case.negatives}: {name}", share)

        tick("checks")
        result["cases"].append(
            _measure(case, plan, rows[number], settings, checked, result["ceilings"], tick)
        )
        save(result)
    progress("done", 1.0)
    return result


def _peaks(cases: list[Case], rows: list[dict], tick: Callable[[str, float], None]) -> None:
    """Writes the peak of every variant that can run into its row; Linux, CPU."""
    asked = [
        (case, name, row)
        for case, of_case in zip(cases, rows)
        for name, row in of_case.items()
        if "why_not" not in row
    ]
    for number, (case, name, row) in enumerate(asked):
        tick(f"memory: N {case.rows}, {name}", number / len(asked))
        row.update(memory.of_step(case, name))


def _measure(
    case: Case,
    plan: list[Variant],
    rows: dict[str, dict],
    settings: Settings,
    checked: dict[tuple, dict],
    shared: dict[str, float],
    tick: Callable[[str], None],
) -> dict:
    """The record of one case.

    ``rows``: by variant, why it cannot run and, on the CPU, its peak. ``shared``: the ceilings that
    do not depend on the case.
    """
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

        def peak() -> float | None:
            return ceilings.fma_peak(5) if device == "cpu" else None

        calls = {name: lambda name=name: step(name) for name in functions}
        how = {"device": device, "warm_seconds": 0.2, "budget": settings.budget, "after": tick}
        before = peak()
        times = timing.interleaved(calls, settings.rounds, **how)
        after = peak()
        if device == "cuda":
            _device_only(calls, times, rows, settings.rounds)
        r1.grad = r2.grad = None
    own = _own_ceilings(case, {rows[name]["precision"] for name in functions})
    if before and after:
        own["fma fp32"] = (before + after) / 2
    for name, of_turns in times.items():
        row = rows[name]
        row |= of_turns
        if "median" in row:
            row["loss"] = float(values[name])
            row["rate"] = case.work / row["median"]
            roof = ceilings.roof({**shared, **own}, row["precision"])
            row["of_roof"] = row["rate"] / roof if roof else None
            products = own.get(f"products {ceilings.unit_of(row['precision'])}")
            row["of_library"] = row["rate"] / products if products else None
    _disqualify(rows)
    return {**dataclasses.asdict(case), "work": case.work, "ceilings": own, "variants": rows}


def _own_ceilings(case: Case, precisions: set[str]) -> dict[str, float]:
    """The library's rates at this case's N and d."""
    rates = {}
    for unit in sorted({ceilings.unit_of(p) for p in precisions}):
        if case.device == "cpu" and unit not in ceilings.PRECISIONS["cpu"]:
            continue
        try:
            rate = ceilings.products_rate(unit, case.rows, case.dim, case.device)
        except Exception as error:
            if not timing.out_of_memory(error):
                raise
            continue
        if rate is not None:
            rates[f"products {unit}"] = rate
    return rates


def _device_only(calls: dict, times: dict, rows: dict, rounds: int) -> None:
    """GPU: peaks, and the time of short steps without the gaps between their launches."""
    for name, call in calls.items():
        if "median" not in times[name]:
            continue
        try:
            rows[name]["peak_mib"] = round(memory.on_device(call), 2)
        except Exception as error:
            times[name] = timing.failure(error)
            continue
        if times[name]["median"] < SHORT:
            alone = timing.interleaved({name: call}, rounds, device="cuda", backlog=True)[name]
            times[name]["device_median"] = alone.get("median")


def _check(case: Case, variant: Variant, function, checked: dict[tuple, dict]) -> dict:
    """Errors of loss and gradients against the reference in fp64, on fewer rows of the same kind;
    a failure where they are too large for the same loss."""
    rows = min(case.rows, CHECKED_ROWS)
    key = (variant.name, rows, case.width, case.dim, case.dtype, case.negatives)
    if key not in checked:
        checked[key] = errors(case, function, rows, copies=variant.family in ("ours", "plain"))
    check = checked[key]
    worst = max(check["error"], check["value_error"])
    if not worst < ALLOWED[variant.precision]:
        text = f"not the same loss: off by {worst:.1e}, allowed {ALLOWED[variant.precision]:.0e}"
        return {**check, "failed": text, "out_of_memory": False}
    return check


def errors(case: Case, function, rows: int, copies: bool = False) -> dict:
    """{"error", "value_error"}: relative errors of the gradient of both views and of the loss.

    ``copies``: for half inputs also "error_fp32", the error of the gradient for fp32 copies of the
    same values, which no rounding of the gradient itself hides. It is for functions whose products
    have the same precision either way.
    """
    r1, r2 = case.views(rows, seed=1)
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
    relative = {"error": gradient, "value_error": value}
    if copies and case.dtype != "float32":
        relative["error_fp32"] = of(r1.float(), r2.float())[0]
    return relative


def _disqualify(rows: dict[str, dict]) -> None:
    """Removes the time of a variant whose loss at full size disagrees with the rest."""
    timed = [row for row in rows.values() if "loss" in row and row["family"] != "neighbour"]
    if len(timed) < 2:
        return
    middle = statistics.median_low(row["loss"] for row in timed)
    for row in timed:
        off = abs(row["loss"] - middle) / max(abs(middle), 1e-30)
        if not off < ALLOWED[row["precision"]]:
            for key in ("median", "quartiles", "seconds", "rate", "of_roof", "of_library"):
                row.pop(key, None)
            row["failed"] = f"not the loss of the others at this size: off by {off:.1e}"
            row["out_of_memory"] = False
