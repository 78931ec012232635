"""The loss's grid under pytest-benchmark, for its storage and comparison.

    pytest bench --benchmark-only --benchmark-autosave
    pytest bench --benchmark-only --benchmark-compare --benchmark-compare-fail=median:30%

Its clock is the host's, so a step synchronises. ``extra_info`` has what the package's own timing
gives: device seconds, the rate at 8c, the share of the roof, the error against fp64, and the ratio
to eager PyTorch in turns, which holds on a machine that drifts where single times do not.
"""

from __future__ import annotations

import functools

import pytest
import torch

from directclr_fast.bench import ceilings, grid, timing, variants
from directclr_fast.bench.variants import ALLOWED, Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"
SIZES = {"cpu": (256, 1024, 4096), "cuda": (4096, 16384, 32768)}[DEVICE]
BASE = "eager"
CASES = [Case(rows, dtype=DTYPE, device=DEVICE) for rows in SIZES]
GRID = [(case, v.name) for case in CASES for v in variants.catalogue(case) if not v.why_not(case)]


@functools.cache
def machine_ceilings() -> dict[str, float]:
    """The ceilings, measured once."""
    return ceilings.measure(DEVICE)


def stepper(case: Case, name: str, r1, r2):
    """(variant, its loss function, a call of one synchronised step)."""
    variant = next(v for v in variants.catalogue(case) if v.name == name)
    function = variant.build(case)

    def step() -> None:
        r1.grad = r2.grad = None
        function(r1, r2).backward()
        timing.synchronise()

    return variant, function, step


@pytest.mark.parametrize("case,name", GRID, ids=[f"{name}-{case.rows}" for case, name in GRID])
def test_loss(benchmark, case, name):
    torch._dynamo.reset()
    benchmark.group = f"N {case.rows}, d {case.dim}"
    r1, r2 = (r.requires_grad_() for r in case.views(seed=2))
    variant, function, step = stepper(case, name, r1, r2)
    if variant.family != "neighbour":
        errors = grid.errors(case, function, min(case.rows, grid.CHECKED_ROWS))
        assert max(errors["error"], errors["value_error"]) < ALLOWED[variant.precision]
        benchmark.extra_info.update(errors)
    base = stepper(case, BASE, r1, r2)[2]
    calls = {name: step} if name == BASE else {name: step, BASE: base}
    turns = timing.interleaved(calls, 5, device=DEVICE)
    if "failed" in turns[name]:
        benchmark.extra_info.update(turns[name])
        pytest.skip(turns[name]["failed"])  # out of memory is a result, kept above, and no error
    roof = ceilings.roof(machine_ceilings(), variant.precision)
    rate = case.work / turns[name]["median"]
    benchmark.extra_info.update(
        precision=variant.precision,
        device_seconds=turns[name]["median"],
        rate_at_8c=rate,
        of_roof=None if roof is None else rate / roof,
        times_of_eager=timing.ratio(turns[name], turns[BASE]),
    )
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
